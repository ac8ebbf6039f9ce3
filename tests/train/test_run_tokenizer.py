"""The run's copy of its tokenizer: everything that it encodes by, whatever becomes of the original."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import Sampling
from llama_jax.errors import ConfigError, InputError
from llama_jax.tokenizer import load_tokenizer
from llama_jax.tokenizer.fit import fit_vocabulary
from llama_jax.train.config.data import SourceConfig
from llama_jax.train.config.run import EvalConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from llama_jax.train.data.encode import Encoder
from llama_jax.train.data.records import BadRecord
from llama_jax.train.data.source import open_source
from llama_jax.train.failed_start import discarded_unless_begun
from llama_jax.train.initialization import load_pretrained, model_config
from llama_jax.train.metrics import evaluate
from llama_jax.train.tokenizer import run_tokenizer
from llama_jax.train.trainable import FULL_FINETUNING
from tests import tiny
from tests.random_models import random_model
from tests.tokenizer import vocabularies
from tests.train.test_resuming import started_with

TOKENS = len(tiny.PIECES)


def of(path: Path, **model: object) -> RunConfig:
    return RunConfig(tokenizer=TokenizerConfig(path=str(path)), model=ModelConfig(**model))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def hf_tokenizer(tmp_path: Path) -> Path:
    """A SentencePiece model whose added tokens, end tokens and chat template are in other files."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model())
    size = load_tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<extra>": size + 1}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, size], "model_type": "llama"}))
    return folder


def test_a_run_keeps_added_tokens_end_tokens_and_the_chat_template(hf_tokenizer, tmp_path):
    original, run_dir = load_tokenizer(hf_tokenizer), tmp_path / "run"
    run = of(hf_tokenizer)
    copied = run_tokenizer(run, run_dir)
    shutil.rmtree(hf_tokenizer)
    kept = run_tokenizer(run, run_dir, started_with(run, run_dir))  # no obstacle to resuming
    for tokenizer in (copied, kept):
        assert tokenizer.eos_ids == original.eos_ids and len(original.eos_ids) == 2
        assert tokenizer.chat_template == original.chat_template == "{{ messages }}"
        assert tokenizer.encode("a <extra> b") == original.encode("a <extra> b")
        assert Encoder(tokenizer).fingerprint == Encoder(original).fingerprint


def test_a_run_keeps_the_template_for_conversations_with_tools(hf_tokenizer, tmp_path):
    (hf_tokenizer / "additional_chat_templates").mkdir()
    (hf_tokenizer / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    original, run_dir = load_tokenizer(hf_tokenizer), tmp_path / "run"
    assert "{{ tools }}" in (original.chat_template or "")
    assert run_tokenizer(of(hf_tokenizer), run_dir).chat_template == original.chat_template


def test_of_a_gguf_the_vocabulary_is_kept_without_the_weights(tmp_path):
    fields = vocabularies.spm_fields(vocabularies.sentencepiece_model())
    file = vocabularies.write_gguf(tmp_path / "model.gguf", fields)
    original, size = load_tokenizer(file), file.stat().st_size
    with file.open("ab") as opened:
        opened.write(bytes(1 << 20))
    run, run_dir = of(file), tmp_path / "run"
    run_tokenizer(run, run_dir)
    file.unlink()
    kept = run_tokenizer(run, run_dir, started_with(run, run_dir))
    assert Encoder(kept).fingerprint == Encoder(original).fingerprint
    copy = run_dir / "tokenizer.gguf"
    assert not copy.is_symlink() and copy.stat().st_size <= size


def test_another_tokenizer_is_refused_once_the_run_has_begun_and_replaced_before(tmp_path):
    paths = [tmp_path / name for name in ("tok1.bin", "tok2.bin")]
    tiny.write_vocabulary(paths[0], tiny.PIECES)
    tiny.write_vocabulary(paths[1], tiny.PIECES[:-1])
    run_dir = tmp_path / "run"
    assert run_tokenizer(of(paths[0]), run_dir).vocab_size == TOKENS
    assert run_tokenizer(of(paths[1]), run_dir).vocab_size == TOKENS - 1  # of a start that failed
    started = started_with(of(paths[1]), run_dir)
    with pytest.raises(ConfigError, match=r"tokenizer.path '.*tok1.bin' is not the tokenizer that"):
        run_tokenizer(of(paths[0]), run_dir, started)
    tiny.write_vocabulary(paths[1], tiny.PIECES)  # the file itself has changed
    with pytest.raises(ConfigError, match=r"tokenizer.path '.*tok2.bin' is not the tokenizer that"):
        run_tokenizer(of(paths[1]), run_dir, started)
    paths[1].unlink()
    with pytest.raises(InputError, match=r"^tokenizer.path: 'mine.model' is neither a path nor"):
        run_tokenizer(of(Path("mine.model")), run_dir, started)


def test_a_missing_file_is_an_error_that_names_the_setting(tmp_path):
    with pytest.raises(InputError, match=r"^tokenizer.path: 'tokenizer.model' .* tokenizer.vocab_size"):
        run_tokenizer(of(Path("tokenizer.model")), tmp_path)
    with pytest.raises(InputError, match=r"^model.init_from: '/nowhere' is neither a path"):
        run_tokenizer(RunConfig(model=ModelConfig(init_from="/nowhere")), tmp_path)


def test_a_failed_start_removes_what_it_wrote(base, tmp_path):
    for existing in (False, True):  # nothing else
        run_dir = tmp_path / f"run{existing}"
        run_dir.mkdir()
        if existing:
            (run_dir / "notes.txt").write_text("mine")
        with pytest.raises(KeyError), discarded_unless_begun(run_dir):  # noqa: PT012
            run_tokenizer(of(base), run_dir)
            (run_dir / "metrics.jsonl").write_text("")
            raise KeyError
        assert [path.name for path in run_dir.iterdir()] == ["notes.txt"] * existing
    with pytest.raises(KeyError), discarded_unless_begun(run_dir):  # noqa: PT012
        run_tokenizer(of(base), run_dir)
        (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
        raise KeyError
    assert (run_dir / "tokenizer.bin").exists()


@pytest.mark.parametrize("size", [TOKENS, TOKENS + 5, 384])
def test_model_vocab_size_pads_the_vocabulary(size):
    model = RunConfig(model=ModelConfig(preset="tiny", vocab_size=size)).model
    assert model.build(TOKENS).vocab_size == size
    with pytest.raises(ConfigError, match=rf"has {size + 1} tokens: leave it out, or give at least"):
        model.build(size + 1)


def test_pretrained_weights_are_padded_by_rows_of_their_mean(base):
    run = RunConfig(model=ModelConfig(init_from=str(base), vocab_size=TOKENS + 3))
    model = model_config(run, load_tokenizer(base))
    assert model == tiny.CONFIG.replace(vocab_size=TOKENS + 3)
    table = load_pretrained(run, None, FULL_FINETUNING)["embed"]["embedding"]
    rows = lj.load(base).params["embed"]["embedding"]
    np.testing.assert_array_equal(table[:TOKENS], rows)
    np.testing.assert_allclose(table[TOKENS:], np.tile(rows.mean(0), (3, 1)), rtol=1e-5, atol=1e-6)
    small = dataclasses.replace(run, model=ModelConfig(init_from=str(base), vocab_size=TOKENS - 1))
    with pytest.raises(ConfigError, match=rf"vocab_size is {TOKENS - 1} and .* give at least"):
        model_config(small, load_tokenizer(base))


@pytest.fixture
def padded(base, tmp_path) -> Path:
    """A model with two rows more than its tokenizer has tokens, as lj.save writes it."""
    whole = lj.load(base)
    path = lj.save(whole, tmp_path / "padded")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer.model").unlink()
    tiny.write_vocabulary(path / "tok.bin", tiny.PIECES[:-2])
    return path


def test_a_base_with_more_rows_than_tokens_trains(padded, base, tmp_path):
    run = RunConfig(model=ModelConfig(init_from=str(padded)))
    tokenizer = run_tokenizer(run, tmp_path / "run")
    model = model_config(run, tokenizer)
    assert (tokenizer.vocab_size, model.vocab_size) == (TOKENS - 2, TOKENS)
    fitted = fit_vocabulary(tokenizer, model.vocab_size)
    assert Encoder(fitted).fingerprint == Encoder(tokenizer).fingerprint  # token folders stay valid
    own = dataclasses.replace(run, tokenizer=TokenizerConfig(path=str(padded / "tok.bin")))
    assert run_tokenizer(own, tmp_path / "own").vocab_size == TOKENS - 2
    tiny.write_vocabulary(tmp_path / "tok.bin", [*tiny.PIECES[:259], "zz", "yy"])
    other = dataclasses.replace(run, tokenizer=TokenizerConfig(path=str(tmp_path / "tok.bin")))
    with pytest.raises(ConfigError, match=rf"has 261 tokens and .* was trained with {TOKENS}"):
        run_tokenizer(other, tmp_path / "other")


def test_a_base_without_rows_for_added_tokens_trains(hf_tokenizer, tmp_path):
    tokenizer = load_tokenizer(hf_tokenizer)
    config = tiny.CONFIG.replace(vocab_size=tokenizer.vocab_size - 1)
    fitted = fit_vocabulary(tokenizer, config.vocab_size)
    whole = lj.Model(config, random_model(3, config)[1], fitted, tmp_path)
    path = lj.save(whole, tmp_path / "model", format="orbax")
    for file in hf_tokenizer.iterdir():
        if file.name != "config.json":
            shutil.copy(file, path)
    run = RunConfig(model=ModelConfig(init_from=str(path)))
    copy = run_tokenizer(run, tmp_path / "run")
    assert copy.vocab_size == tokenizer.vocab_size
    assert model_config(run, copy).vocab_size == tokenizer.vocab_size - 1


def test_a_text_with_a_token_beyond_the_embedding_is_a_bad_record(hf_tokenizer, tmp_path):
    tokenizer = load_tokenizer(hf_tokenizer)
    fitted = fit_vocabulary(tokenizer, tokenizer.vocab_size - 1)  # without a row for <extra>
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "the fox"}\n{"text": "the <extra> fox"}\n')
    source = open_source(SourceConfig(str(data)), Encoder(fitted))
    assert source.document(0).ids.max() < fitted.vocab_size
    with pytest.raises(BadRecord, match="holds '<extra>'") as caught:
        source.document(1)
    assert "surrogate" not in caught.value.message


def test_sampled_text_has_no_token_of_the_padding(base, monkeypatch):
    tokenizer = fit_vocabulary(load_tokenizer(base), TOKENS + 7)
    settings: list[Sampling] = []

    def generate(model, params, tokens, lengths, key, sampling, **options):
        settings.append(sampling)
        raise InterruptedError

    monkeypatch.setattr(evaluate, "generate", generate)
    model = tiny.CONFIG.replace(vocab_size=TOKENS + 7)
    run = RunConfig(eval=EvalConfig(max_new_tokens=2), train=TrainConfig(dtype="float32"))
    sample = evaluate.make_sample_fn(run, model, "cpu", tokenizer)
    with pytest.raises(InterruptedError):
        sample({"w": np.zeros(1, np.float32)}, jax.random.key(0))
    assert list(settings[0].suppress_tokens) == list(range(TOKENS, TOKENS + 7))
