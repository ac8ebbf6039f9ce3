"""Classifiers and reward models: round trips with labels, adapters with heads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama_jax as lj
from llama_jax import adapters as any_adapter
from llama_jax.adapters import bottleneck, lora, prefix
from llama_jax.cli import main
from llama_jax.errors import CheckpointError, ConfigError, InputError, LlamaJaxError
from llama_jax.eval.verify import compare
from llama_jax.meshes import make_mesh
from llama_jax.model import hidden_states
from llama_jax.text.convert import convert
from llama_jax.text.model import Model
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.scorer import Scorer
from llama_jax.weights import open_source
from llama_jax.weights.adapters import load_head
from llama_jax.weights.derived import Head
from llama_jax.weights.write.adapters import save_adapter
from tests import tiny
from tests.random_models import random_model
from tests.weights import adapters

LABELS = ("bird", "beast", "füsch")
BASE = tiny.CONFIG.replace(tie_word_embeddings=False)
CLASSIFIER = BASE.replace(labels=LABELS)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("vocabulary")
    tiny.write_vocabulary(folder / "tok.bin", tiny.PIECES)
    return Model(CLASSIFIER, random_model(3, CLASSIFIER)[1], load_tokenizer(folder / "tok.bin"), folder)


@pytest.fixture(scope="module")
def saved(classifier, tmp_path_factory) -> Path:
    return lj.save(classifier, tmp_path_factory.mktemp("saved") / "hf")


@pytest.fixture
def editable_copy(saved, tmp_path) -> Path:
    """A copy that a test may modify."""
    folder = tmp_path / "editable_copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(folder: Path, **fields: Any) -> Path:
    """Sets fields of config.json; None removes a field."""
    path = folder / "config.json"
    held = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))
    return folder


def assert_equal_trees(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("tied", [False, True])
def test_head_replaces_the_output_projection(tied):
    config = CLASSIFIER.replace(tie_word_embeddings=tied)
    params = jax.eval_shape(lambda: lj.init(config, jax.random.key(0)))
    assert "lm_head" not in params and params["score"]["kernel"].shape == (16, 3)
    assert config.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("formats", [("hf",), ("orbax", "hf"), ("hf", "orbax")], ids="-".join)
def test_conversions_keep_the_head(formats, classifier, tmp_path):
    path = lj.save(classifier, tmp_path / "0", formats[0])
    for number, format in enumerate(formats[1:], 1):
        path = convert(path, tmp_path / str(number), format)
    again = lj.load(path)
    assert again.config == CLASSIFIER
    assert_equal_trees(again.params, classifier.params)
    if formats[-1] == "hf":
        stored = load_file(path / "model.safetensors")
        assert "lm_head.weight" not in stored and stored["score.weight"].shape == (3, 16)
        fields = json.loads((path / "config.json").read_text())
        assert fields["architectures"] == ["LlamaForSequenceClassification"]
        assert fields["label2id"] == {"bird": 0, "beast": 1, "füsch": 2}
        assert fields["problem_type"] == "single_label_classification"
        # Not `</s>`: a text may end with it, and the score is then read there.
        assert fields["pad_token_id"] == 0 and classifier.tokenizer.eos_id == 2


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_head_is_f32_and_replicated(format, classifier, tmp_path):
    path = lj.save(classifier, tmp_path / "out", format)
    head = classifier.params["score"]["kernel"]
    for options in (
        {"dtype": "bfloat16"},
        {"bits": 8},
        {"mesh": make_mesh("fsdp=4,tensor=2")},
        {"scan_layers": False},
    ):
        found = lj.load(path, **options).params["score"]["kernel"]
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, head)


def test_classifiers_do_not_generate(saved):
    model = lj.load(saved)
    for call in (
        lambda: model.generate("ab", max_new_tokens=2),
        lambda: lj.forward(model.config, model.params, jnp.zeros((1, 2), jnp.int32)),
        lambda: lj.next_token_loss(model.config, model.params, jnp.zeros((1, 2), jnp.int32)),
    ):
        with pytest.raises(ConfigError, match=r"with 3 outputs and no output projection, .*Scorer"):
            call()


def test_inspect_and_verify(saved, classifier, tmp_path, capsys):
    main(["inspect", str(saved)])
    shown = capsys.readouterr().out
    assert "bird, beast, füsch" in shown and "score.weight" in shown and "head" in shown
    other = lj.save(classifier, tmp_path / "other", "orbax")
    report = compare(saved, other)
    assert report.same and report.outputs is None
    assert {"score.weight"} < {tensor.name for tensor in report.tensors}
    params = {**classifier.params, "score": {"kernel": classifier.params["score"]["kernel"] + 1}}
    changed = lj.save(Model(CLASSIFIER, params, classifier.tokenizer, tmp_path), tmp_path / "changed")
    assert [t.name for t in compare(saved, changed).tensors if not t.same] == ["score.weight"]
    model = Model(BASE, random_model(3, BASE)[1], classifier.tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"is a classifier or reward model and .* a language model"):
        compare(saved, lj.save(model, tmp_path / "language"))


@pytest.mark.parametrize("format", ["meta", "gguf", "llama2c"])
def test_formats_without_heads_refuse_classifiers(format, saved, tmp_path):
    with pytest.raises(InputError, match=f"{format} has no place for its head; use hf or orbax"):
        convert(saved, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_default_labels(editable_copy):
    """transformers omits id2label for two classes with default names."""
    edit(editable_copy, id2label=None, label2id=None, num_labels=3)
    assert open_source(editable_copy).config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    edit(editable_copy, num_labels=None)
    assert open_source(editable_copy).config.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "a"}, "problem_type": None}, r"score\.weight \[3, 16\] should be \[1, 16\]"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label does not name each of the classes 0 to 1"),
        ({"id2label": {"0": 1}}, "id2label does not name each"),
        ({"id2label": ["a"]}, "id2label must be an object of 1 to 65536 names"),
        ({"id2label": None, "num_labels": 1 << 30}, "num_labels is 1073741824; it must be from 1 to 65536"),
        ({"problem_type": "multi_label_classification"}, "a head of 3 labels must be single_label"),
        ({"architectures": 5}, "missing tensors: lm_head"),
        ({"pad_token_id": 10_000}, "pad_token_id is '10000'; it must be an id below"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            r"missing tensors: lm_head.*'score\.weight'",
        ),
    ],
    ids=str,
)
def test_invalid_configs_raise_one_line_errors(fields, message, editable_copy):
    edit(editable_copy, **fields)
    with pytest.raises(CheckpointError, match=message) as error:
        lj.load(editable_copy)
    assert "\n" not in str(error.value)


def test_missing_head_is_named(editable_copy):
    stored = load_file(editable_copy / "model.safetensors")
    save_file(
        {name: x for name, x in stored.items() if name != "score.weight"}, editable_copy / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"missing tensors: score\.weight"):
        lj.load(editable_copy)


def test_scores_are_read_at_the_last_non_pad_token(saved, editable_copy):
    """pad_token_id is set to the last token of each text, so that the token before it is used."""
    texts = ["a", "b a daz", "the caz"]
    plain = Scorer.load(saved)
    assert plain.labels == LABELS and plain.objective == "classify"
    tokenizer = plain.model.tokenizer
    pad = tokenizer.encode("z")[-1]
    other = Scorer.load(edit(editable_copy, pad_token_id=pad))
    cut = ["a", "b a da", "the ca"]
    np.testing.assert_allclose(other.scores(texts), plain.scores(cut), atol=1e-5)
    assert other.classes(texts) == plain.classes(cut)
    mesh = lj.make_mesh("data=2,fsdp=2", devices=jax.devices()[:4])  # 3 texts, in batches of 1, of 4 on it
    np.testing.assert_allclose(Scorer.load(saved, mesh=mesh).scores(texts, 1), plain.scores(texts), atol=1e-5)
    # Conversions keep pad_token_id.
    again = convert(
        convert(editable_copy, editable_copy.parent / "orbax", "orbax"), editable_copy.parent / "again"
    )
    assert json.loads((again / "config.json").read_text())["pad_token_id"] == pad


KINDS = {
    "lora": lora.Lora(rank=2, target_modules=("wq",)),
    "prefix": prefix.Prefix(2),
    "bottleneck": bottleneck.Bottleneck(3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_with_a_head(kind, classifier, tmp_path):
    """An adapter's head replaces the base model's output, and is read back with its labels."""
    settings = KINDS[kind]
    params = random_model(3, BASE)[1]
    adapter = any_adapter.init(settings, BASE, params, jax.random.key(0))
    adapter = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), adapter)
    base = lj.save(Model(BASE, params, classifier.tokenizer, tmp_path), tmp_path / "base")
    head = classifier.params["score"]["kernel"]
    held = Head(np.asarray(head).T, LABELS)
    path = save_adapter(tmp_path / "adapter", settings, adapter, BASE, head=held)
    found = lj.load(base, adapter=path)
    assert found.config == CLASSIFIER and "lm_head" not in found.params
    np.testing.assert_array_equal(found.params["score"]["kernel"], head)
    tokens = np.array([[5, 6, 7, 8]])
    expected = hidden_states(BASE, any_adapter.attach(settings, params, adapter), tokens)
    np.testing.assert_allclose(hidden_states(found.config, found.params, tokens), expected, atol=1e-5)
    if kind == "bottleneck":
        fields = json.loads((path / "head_config.json").read_text())
        assert fields["label2id"] == {"bird": 0, "beast": 1, "füsch": 2}
        return
    fields = json.loads((path / "adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_CLS" and fields["modules_to_save"] == ["score"]
    if kind == "lora":
        whole = convert(base, tmp_path / "merged", adapter=path)
        assert_equal_trees(lj.load(whole).params, found.params)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "label2id does not number its labels from 0"),
        ({"a": 0, "b": 2, "c": 1, "d": 3}, "has 3 classes but head_config.json names 4"),
        ({"a": 0, "b": 2}, "does not number"),
        ({"a": "0", "b": "1"}, "does not number"),
        ({}, "does not number"),
    ],
)
def test_invalid_adapterhub_heads_are_refused(labels, message, tmp_path):
    adapter = any_adapter.init(KINDS["bottleneck"], BASE, random_model(3, BASE)[1], jax.random.key(0))
    path = save_adapter(
        tmp_path / "a", KINDS["bottleneck"], adapter, BASE, head=Head(np.zeros((3, 16), np.float32), LABELS)
    )
    (path / "head_config.json").write_text(json.dumps({"label2id": labels}))
    with pytest.raises(CheckpointError, match=message):
        load_head(path)


SCORE = "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("fields", "head", "message"),
    [
        ({}, None, f"missing tensors: {SCORE}"),
        ({}, np.zeros(3, np.float32), r"score.weight is \[3\]; it must be \[classes, hidden_size\]"),
        ({}, np.zeros((3, 8), np.float32), "8 inputs, the base model's hidden_size is 16"),
        ({"task_type": "CAUSAL_LM"}, np.zeros((3, 16), np.float32), f"unexpected tensors: '{SCORE}'"),
        (
            {"modules_to_save": ["lm_head"]},
            np.zeros((3, 16), np.float32),
            "those of 'lm_head', which modules",
        ),
        ({"modules_to_save": "score"}, np.zeros((3, 16), np.float32), "'score'; it must be a list"),
    ],
    ids=str,
)
def test_invalid_peft_heads_are_refused(fields, head, message, tmp_path):
    tiny.write_vocabulary(tmp_path / "tok.bin", tiny.PIECES)
    stored = adapters.tensors() | ({} if head is None else {SCORE: head})
    path = adapters.write(tmp_path / "adapter", stored, **({"task_type": "SEQ_CLS"} | fields))
    with pytest.raises(LlamaJaxError, match=message):
        lj.load(tiny.write_model(tmp_path), adapter=path)


def test_label_names_in_peft_files(tmp_path):
    """PEFT's format has no label names: default names are used, as for invalid metadata of ours."""
    head = np.ones((2, 16), np.float32)
    for number, metadata in enumerate([{}, {"labels": "[1, 2]"}, {"labels": '["a"]'}, {"labels": "x"}]):
        path = adapters.write(
            tmp_path / str(number), task_type="SEQ_CLS", modules_to_save=["classifier", "score"]
        )
        save_file(adapters.tensors() | {SCORE: head}, path / "adapter_model.safetensors", metadata=metadata)
        assert load_head(path).labels == ("LABEL_0", "LABEL_1")
