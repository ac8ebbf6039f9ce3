"""Models as people have them: padded embeddings, tokens without a row, control tokens in prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama_jax as lj
from llama_jax.errors import InputError, TokenizerError
from llama_jax.eval.verify import compare
from llama_jax.text.convert import convert
from tests.tokenizer.test_found_files import V, added, edit

PROMPT = "Once upon a time"
ROWS = 64  # of padding


@pytest.fixture(scope="module")
def base(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of stories260K, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    convert(shared_data / "stories260K" / "stories260K.bin", folder, "hf")
    state = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in state.items() if not re.match(r"model\.layers\.[1-9]", name)}
    save_file(kept, folder / "model.safetensors")
    edit(folder / "config.json", num_hidden_layers=1)
    return folder


def variant(base: Path, folder: Path, *, rows: int = 0, tokens: tuple[dict[str, Any], ...] = ()) -> Path:
    """The model with more rows in its embedding, zero ones, and more added tokens in its tokenizer."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(base / "model.safetensors")
    table = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = np.concatenate(
        [table, np.zeros((rows, table.shape[1]), table.dtype)]
    )
    save_file(state, folder / "model.safetensors")
    edit(folder / "config.json", vocab_size=V + rows)
    old = edit(folder / "tokenizer.json")
    edit(folder / "tokenizer.json", added_tokens=[*old["added_tokens"], *tokens])
    return folder


@pytest.fixture(scope="module")
def chat(base: Path, tmp_path_factory: pytest.TempPathFactory) -> lj.Model:
    """A model with two control tokens of a chat, as large as the padded ones: with the same programs."""
    tokens = tuple(added(V + i, name) for i, name in enumerate(("<|im_start|>", "<|turn|>")))
    return lj.load(variant(base, tmp_path_factory.mktemp("chat") / "hf", rows=ROWS, tokens=tokens))


def test_rows_beyond_the_vocabulary_stand_for_nothing_and_are_never_sampled(
    base: Path, tmp_path: Path
) -> None:
    plain, padded = lj.load(base), lj.load(variant(base, tmp_path / "padded", rows=ROWS))
    assert (padded.config.vocab_size, padded.tokenizer.vocab_size) == (V + 64, V + 64)
    assert padded.tokenizer.decode([403, V, V + 63]) == plain.tokenizer.decode([403])
    assert padded.generate(PROMPT, max_new_tokens=12) == plain.generate(PROMPT, max_new_tokens=12)
    # Zero rows have logit 0: a bias against all else would choose them.
    assert set(range(V, V + 64)) <= {*np.asarray(padded.sampling()[0].suppress_tokens).tolist()}


@pytest.mark.parametrize("format", ["gguf", "meta", "llama2c", "orbax", "hf"])
def test_padded_models_are_converted_as_they_are(format: Any, base: Path, tmp_path: Path) -> None:
    padded = variant(base, tmp_path / "padded", rows=ROWS)
    target = convert(padded, tmp_path / ("m.gguf" if format == "gguf" else "m"), format)
    model = lj.load(target)
    assert model.config.vocab_size == V + 64
    assert model.tokenizer.encode(PROMPT) == lj.load(base).tokenizer.encode(PROMPT)
    assert model.generate(PROMPT, max_new_tokens=4) == lj.load(base).generate(PROMPT, max_new_tokens=4)


def test_added_tokens_without_a_row_load_and_cannot_be_encoded(base: Path, tmp_path: Path) -> None:
    model = lj.load(variant(base, tmp_path / "m", tokens=(added(V, "<pad>"),)))
    assert model.tokenizer.vocab_size == V
    assert model.generate(PROMPT, max_new_tokens=4) == lj.load(base).generate(PROMPT, max_new_tokens=4)
    with pytest.raises(
        TokenizerError, match=rf"holds '<pad>', id {V}, and the model has embeddings for {V} ids"
    ):
        model.encode_prompt("<pad>")
    edit(tmp_path / "m" / "config.json", eos_token_id=[2, V + 7])  # of a larger vocabulary
    assert lj.load(tmp_path / "m").tokenizer.eos_ids == (2,)


def test_the_vocabulary_of_a_larger_model_is_refused(base: Path, tmp_path: Path) -> None:
    folder = variant(base, tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    save_file(
        state | {"model.embed_tokens.weight": state["model.embed_tokens.weight"][:500]},
        folder / "model.safetensors",
    )
    edit(folder / "config.json", vocab_size=500)
    with pytest.raises(TokenizerError, match=r"has 512 tokens and the model only 500; give the model's own"):
        lj.load(folder)


def test_control_tokens_in_a_prompt_are_their_ids_unless_told_otherwise(chat: lj.Model) -> None:
    prompt = "<|im_start|>user\nhi<|turn|>\n"
    ids = chat.encode_prompt(prompt)
    assert ids[:2] == [1, V] and ids.count(V + 1) == 1
    assert not {V, V + 1} & {*chat.encode_prompt(prompt, parse_special=False)}
    assert chat.encode_prompt("<s>[INST]")[:2] != [1, 1]
    for special in (True, False):
        stream = chat.stream(prompt, max_new_tokens=3, parse_special=special)
        assert "".join(stream) == chat.generate(prompt, max_new_tokens=3, parse_special=special)


FORCED = [432, 383, 286, V + 1]


@pytest.mark.parametrize("settings", [{}, {"num_return_sequences": 1}, {"draft": lj.PromptLookup()}], ids=str)
def test_a_control_token_as_stop_string_ends_a_text(settings: dict[str, Any], chat: lj.Model) -> None:
    expected = chat.tokenizer.decode([403, *FORCED[:3]])[len(chat.tokenizer.decode([403])) :]
    shared = {"max_new_tokens": 8, "forced_tokens": FORCED, "stop_strings": ["<|turn|>"]}
    out = chat.generate(PROMPT, **shared, **settings)
    assert (out[0] if settings.get("num_return_sequences") else out) == expected
    assert "".join(chat.stream(PROMPT, **shared)) == expected
    with pytest.raises(InputError, match=r"'<\|turn\|>\\n' holds the control token '<\|turn\|>'.*alone"):
        chat.generate(PROMPT, stop_strings=["<|turn|>\n"])


def test_a_conversation_ends_at_such_a_stop_string(chat: lj.Model) -> None:
    talk = lj.Conversation(chat, template="chatml")
    answer = "".join(talk.say("hi", max_new_tokens=8, forced_tokens=FORCED, stop_strings="<|turn|>"))
    assert talk.finish_reason == "stop"
    assert answer == chat.tokenizer.decode(FORCED[:3])


def test_end_tokens_of_a_gguf_file_that_calls_them_user_defined(base: Path, tmp_path: Path) -> None:
    """llama.cpp goes by their spelling."""
    folder = variant(base, tmp_path / "m", rows=1, tokens=(added(V, "<|im_end|>", special=False),))
    convert(folder, tmp_path / "m.gguf")
    tokenizer = lj.load(tmp_path / "m.gguf").tokenizer
    assert tokenizer.special_tokens["<|im_end|>"] == V
    assert tokenizer.eos_ids == (2, V)
    assert json.loads((folder / "tokenizer.json").read_text())["added_tokens"][-1]["special"] is False


def test_a_model_without_a_tokenizer_works_on_arrays(base: Path, tmp_path: Path) -> None:
    folder = variant(base, tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    model, whole = lj.load(folder), lj.load(base)
    tokens = np.array([[1, 403, 407]], np.int32)
    expected = lj.forward(whole.config, whole.params, tokens)
    np.testing.assert_array_equal(lj.forward(model.config, model.params, tokens), expected)
    for use in (
        lambda: model.generate(PROMPT),
        lambda: next(model.stream(PROMPT)),
        lambda: lj.Conversation(model),
    ):
        with pytest.raises(
            TokenizerError,
            match=r"has no tokenizer \(tokenizer\.json.*copy the model's tokenizer there|no chat template",
        ):
            use()
    with pytest.warns(UserWarning, match="or give it with tokenizer"):
        convert(folder, tmp_path / "m.gguf")
    assert_same_params(lj.load(tmp_path / "m.gguf").params, whole.params)


def assert_same_params(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


DIFFERENT = {
    "template": ({"chat_template": "OTHER"}, "chat template"),
    "end": ({"eos_token": "<|turn|>"}, "a text ends with"),
}


@pytest.mark.parametrize("case", [*DIFFERENT, "control token", "added word"])
def test_verify_sees_other_tokenizer_files(case: str, base: Path, tmp_path: Path) -> None:
    word = added(V, "dragon", normalized=True, special=False)
    token = added(V + 1, "<|turn|>")
    a = variant(base, tmp_path / "a", rows=2, tokens=(word, token))
    changed = {
        "control token": (word, token | {"special": False}),
        "added word": (word | {"normalized": False}, token),
    }
    b = variant(base, tmp_path / "b", rows=2, tokens=changed.get(case, (word, token)))
    assert compare(a, a, outputs=False).same
    fields, message = DIFFERENT.get(case, ({}, "dragon" if case == "added word" else "control tokens differ"))
    edit(b / "tokenizer_config.json", **fields)
    report = compare(a, b, text="a text")
    assert not report.same
    assert any(message in line for line in report.text.differences), report.text
