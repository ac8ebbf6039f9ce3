"""Two checkpoints side by side: the same model in any form is found to be, and each fault is named."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import CheckpointError, InputError, TokenizerError
from llama_jax.eval.verify import Report, compare
from llama_jax.eval.verify.stream import Stream
from llama_jax.weights import open_source
from llama_jax.weights.compare import compare_configs, compare_tensor
from llama_jax.weights.names import LEAVES, leaves
from llama_jax.weights.orbax import OrbaxSource
from llama_jax.weights.source import Source
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.orbax import plan_orbax
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests import tiny
from tests.random_models import random_model
from tests.weights.writers import CONFIG, random_params, write_gguf, write_hf, write_llama2c

TIED = CONFIG.replace(tie_word_embeddings=True)
# llama2.c has no place for these.
LLAMA2C = CONFIG.replace(
    head_dim=CONFIG.hidden_size // CONFIG.num_attention_heads, rms_norm_eps=1e-5, rope_theta=1e4
)


def small_params(config: lj.LlamaConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    """Random values that no shorter type holds, as small as a trained model's."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: np.ndarray) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.05 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, random_params(config))


def changed(params: dict[str, Any], path: str, change: Callable[[np.ndarray], None]) -> dict[str, Any]:
    """A copy of the parameters with one leaf changed in place."""
    params = jax.tree.map(np.copy, params)
    leaf: Any = params
    for key in path.split("."):
        leaf = leaf[key]
    change(leaf)
    return params


def differing(report: Report) -> list[tuple[str, int | None]]:
    return [(tensor.leaf, tensor.layer) for tensor in report.tensors if not tensor.same]


def verdicts(report: Report) -> set[str]:
    return {tensor.verdict for tensor in report.tensors}


def assert_equal(report: Report) -> None:
    assert report.problems == ()
    assert verdicts(report) == {"equal"}
    assert report.outputs.max_difference == report.outputs.max_kl == 0
    assert {(at.mean, at.most) for at in report.streams} == {(0.0, 0.0)}
    assert report.parted is None


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("reference"), CONFIG, small_params())


# The same model


@pytest.mark.parametrize(
    ("seed", "dtype"), [(0, jnp.float32), (1, jnp.float32), (2, jnp.float32), (2, jnp.bfloat16)]
)
def test_a_stream_is_the_forward_pass(seed, dtype):
    config, params = random_model(seed)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, 9).astype(np.int32)
    tensors, stream = ParamsTensors(config, params), Stream(config, tokens, np.dtype(dtype))
    states = [stream.embed(tensors.read(LEAVES[0], None))]
    for layer in range(config.num_hidden_layers):
        of_layer = {leaf: tensors.read(leaf, layer) for leaf in LEAVES if leaf.per_layer}
        states.append(stream.layer(of_layer))
    output = LEAVES[0] if config.tie_word_embeddings else LEAVES[-1]
    logits = stream.logits(tensors.read(LEAVES[-2], None), tensors.read(output, None))
    expected = lj.forward(config, params, tokens[None], dtype=dtype)[0]
    assert {state.shape for state in states} == {(9, config.hidden_size)}
    tolerance = {jnp.float32: 1e-4, jnp.bfloat16: 0.1}[dtype]
    np.testing.assert_allclose(logits, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def write_ours(plan: Callable, folder: Path, config: lj.LlamaConfig, params: dict[str, Any]) -> Path:
    tensors = ParamsTensors(config, params)
    write(plan(tensors, None, Vocabulary()), tensors, folder / "ours")
    return folder / "ours"


FORMS = {
    "hf-sharded": (CONFIG, lambda folder, c, p: write_hf(folder / "hf", c, p, shards=3)),
    "hf, ours": (CONFIG, lambda folder, c, p: write_ours(plan_hf, folder, c, p)),
    "orbax": (CONFIG, lambda folder, c, p: write_ours(plan_orbax, folder, c, p)),
    "gguf": (CONFIG, lambda folder, c, p: write_gguf(folder / "a.gguf", c, p)),
    "gguf, tied": (TIED, lambda folder, c, p: write_gguf(folder / "a.gguf", c, p)),
    "llama2c": (LLAMA2C, lambda folder, c, p: write_llama2c(folder / "a.bin", c, p)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_model_in_another_form(tmp_path, form):
    config, other = FORMS[form]
    params = small_params(config)
    a, b = write_hf(tmp_path / "a", config, params), other(tmp_path, config, params)
    report = compare(a, b)
    assert_equal(report)
    assert report.fields == ()
    assert (report.a.format, report.b.format) == ("hf", form.partition("-")[0].partition(",")[0])
    layers = config.num_hidden_layers
    assert len(report.tensors) == sum(layers if leaf.per_layer else 1 for leaf in leaves(config))
    assert [at.layer for at in report.streams] == [None, *range(layers)]


@pytest.mark.parametrize("outputs", [True, False])
def test_a_tied_output_and_its_copy_are_the_same(tmp_path, outputs):
    tied = random_params(TIED)
    copy = {**tied, "lm_head": {"kernel": tied["embed"]["embedding"].T}}
    a = write_hf(tmp_path / "tied", TIED, tied)
    b = write_hf(tmp_path / "untied", CONFIG, copy)
    for report in (compare(a, b, outputs=outputs), compare(b, a, outputs=outputs)):
        assert report.same
        assert verdicts(report) == {"equal"}
        assert report.tensors[-1].leaf == "lm_head.kernel"
        assert [(field.name, field.matters) for field in report.fields] == [("tie_word_embeddings", False)]
    other = changed(copy, "lm_head.kernel", lambda leaf: leaf.__imul__(2))
    report = compare(a, write_hf(tmp_path / "other", CONFIG, other), outputs=outputs)
    assert differing(report) == [("lm_head.kernel", None)]
    assert report.parted is None  # the streams never do


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "Q8_0"])
def test_a_rounding_is_the_same_model(tmp_path, reference, kind):
    params = small_params()
    if kind == "Q8_0":
        other, name = write_gguf(tmp_path / "a.gguf", CONFIG, params, kind=kind), kind
    else:
        dtype = np.dtype(kind)
        other = write_hf(tmp_path / kind, CONFIG, params, dtype=dtype)
        name = {"bfloat16": "BF16", "float16": "F16"}[kind]
    for report in (compare(reference, other), compare(other, reference)):
        assert report.problems == ()
        assert verdicts(report) <= {"equal", "rounded"}
        assert {tensor.rounded_to for tensor in report.tensors if tensor.verdict == "rounded"} == {name}
        assert 0 < report.outputs.mean_kl <= report.outputs.max_kl
        assert report.parted is None


def test_what_is_not_quite_a_rounding_is_none(tmp_path, reference):
    def bump(leaf):  # by the last of bfloat16's eight bits
        leaf[1, 3, 2, 1] *= 1 + 2**-7

    params = changed(small_params(), "layers.attention.wv", bump)
    other = write_hf(tmp_path / "bf16", CONFIG, params, dtype=jnp.bfloat16)
    report = compare(reference, other, outputs=False)
    assert differing(report) == [("layers.attention.wv", 1)]
    assert report.text is None
    assert report.outputs is None
    assert not report.same
    assert compare(reference, other, outputs=False, tolerance=1e-2).same


def test_q4_1_survives_bfloat16(tmp_path):
    params = small_params()
    a = write_gguf(tmp_path / "a.gguf", CONFIG, params, kind="Q4_1")
    tensors = StoredTensors(open_source(a))
    write(plan_hf(tensors, np.dtype(jnp.bfloat16), Vocabulary()), tensors, tmp_path / "b")
    report = compare(a, tmp_path / "b")
    assert {tensor.rounded_to for tensor in report.tensors if ".scale" not in tensor.leaf} == {"BF16"}
    assert report.max_kl == 1e-2


@pytest.mark.parametrize("group", [4, 64])
def test_int8_in_groups(group):
    rng = np.random.default_rng(0)
    leaf = LEAVES[0]
    original = rng.standard_normal((6, 128)).astype(np.float32)
    original[2] = 0
    stored = original.copy()
    for row in stored:
        for at in range(0, 128, group):
            scale = np.float32(np.abs(row[at : at + group]).max() / np.float32(127)) or np.float32(1)
            row[at : at + group] = np.round(row[at : at + group] / scale) * scale
    types = ("F32", f"INT8/{group}")
    found = compare_tensor(leaf, None, (original, stored), types, 0.0)
    assert (found.verdict, found.rounded_to) == ("rounded", types[1])
    assert found.max_difference == np.abs(original - stored).max()
    assert compare_tensor(leaf, None, (original, stored), types[::-1], 0.0).verdict == "different"
    stored[3, 5] *= 1.01
    assert compare_tensor(leaf, None, (original, stored), types, 0.0).verdict == "different"


# Faults, each named


def test_a_flipped_bit(tmp_path, reference):
    def flip(leaf):
        leaf.view(np.uint32)[1, 5, 7] ^= 1

    report = compare(
        reference, write_hf(tmp_path, CONFIG, changed(small_params(), "layers.feed_forward.w_down", flip))
    )
    assert differing(report) == [("layers.feed_forward.w_down", 1)]
    assert report.problems == (f"1 of {len(report.tensors)} tensors differ",)
    (tensor,) = (tensor for tensor in report.tensors if not tensor.same)
    assert tensor.name == "model.layers.1.mlp.down_proj.weight"
    assert 0 < tensor.max_difference < 1e-7
    largest = np.abs(small_params()["layers"]["feed_forward"]["w_down"][1]).max()
    assert tensor.relative == pytest.approx(tensor.max_difference / largest)
    assert report.parted.layer == 1


def test_two_layers_swapped(tmp_path, reference):
    params = jax.tree.map(np.copy, small_params())
    params["layers"] = jax.tree.map(lambda leaf: leaf[[2, 1, 0]], params["layers"])
    report = compare(reference, write_hf(tmp_path, CONFIG, params))
    per_layer = [".".join(leaf.path) for leaf in LEAVES if leaf.per_layer]
    assert differing(report) == [(leaf, layer) for layer in (0, 2) for leaf in per_layer]
    assert report.parted.layer == 0
    assert len(report.problems) == 2


def test_a_rotary_order_gone_wrong_in_one_layer(tmp_path, reference):
    def interleave(leaf):
        half = CONFIG.head_dim // 2
        leaf[0] = leaf[0].reshape(*leaf.shape[1:3], 2, half).swapaxes(-1, -2).reshape(leaf.shape[1:])

    report = compare(
        reference, write_hf(tmp_path, CONFIG, changed(small_params(), "layers.attention.wq", interleave))
    )
    assert differing(report) == [("layers.attention.wq", 0)]
    assert report.parted.layer == 0
    assert report.streams[0].most == 0
    assert report.outputs.mean_kl > report.max_kl


@pytest.mark.parametrize(
    ("changes", "field", "matters"),
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps", True),
        ({"rms_norm_eps": 3e-6 * (1 + 1e-8)}, "rms_norm_eps", False),
        ({"rope_theta": 60_000.0}, "rope_theta", True),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling", True),
        ({"max_position_embeddings": 256}, "max_position_embeddings", False),
    ],
)
def test_another_configuration(tmp_path, reference, changes, field, matters):
    report = compare(reference, write_hf(tmp_path, CONFIG, small_params(), **changes))
    assert [(found.name, found.matters) for found in report.fields] == [(field, matters)]
    assert verdicts(report) == {"equal"}
    assert report.same is not matters
    assert (report.parted is not None) is matters
    if matters:
        assert report.problems[0] == f"the configurations differ in {field}"
        assert report.outputs.mean_kl > report.max_kl
        assert report.parted.layer == 0


def test_two_ways_to_write_the_same_rotary_frequencies():
    stretched = CONFIG.replace(rope_scaling=lj.RopeScaling("ntk", 4.0))
    theta = CONFIG.rope_theta * 4.0 ** (CONFIG.head_dim / (CONFIG.head_dim - 2))
    found = compare_configs(stretched, CONFIG.replace(rope_theta=theta))
    assert [(field.name, field.matters) for field in found] == [
        ("rope_theta", False),
        ("rope_scaling", False),
    ]
    found = compare_configs(stretched, CONFIG.replace(rope_theta=theta * 1.001))
    assert all(field.matters for field in found)
    halved = CONFIG.replace(head_dim=8, rope_theta=1e6)
    assert {field.name for field in compare_configs(CONFIG, halved) if field.matters} == {
        "head_dim",
        "rope_theta",
    }


@pytest.mark.parametrize("path", ["embed.embedding", "layers.feed_forward.w_gate"])
def test_nan(tmp_path, reference, path):
    def spoil(leaf):
        leaf[(1,) * leaf.ndim] = np.nan

    spoilt = write_hf(tmp_path / "a", CONFIG, changed(small_params(), path, spoil))
    for report in (compare(reference, spoilt), compare(spoilt, reference)):
        assert not report.same
        (tensor,) = (tensor for tensor in report.tensors if not tensor.same)
        assert tensor.leaf == path
        assert tensor.max_difference == tensor.relative == float("inf")
        assert sorted(tensor.not_finite) == [0, 1]
        assert sum(map(sum, (tensor.not_finite for tensor in report.tensors))) == 1
    both = compare(spoilt, write_hf(tmp_path / "b", CONFIG, changed(small_params(), path, spoil)))
    assert_equal(both)
    assert max(tensor.not_finite for tensor in both.tensors) == (1, 1)
    gguf = write_gguf(tmp_path / "c.gguf", CONFIG, changed(small_params(), path, spoil), kind="BF16")
    assert verdicts(compare(spoilt, gguf, outputs=False)) <= {"equal", "rounded"}


def test_an_infinity_of_one_sign_is_not_the_other(tmp_path):
    def spoil(value):
        def change(leaf):
            leaf[0] = value

        return write_hf(tmp_path / str(value), CONFIG, changed(small_params(), "final_norm.scale", change))

    plus, minus = spoil(np.inf), spoil(-np.inf)
    (tensor,) = (tensor for tensor in compare(plus, minus, outputs=False).tensors if not tensor.same)
    assert tensor.max_difference == float("inf")
    assert tensor.not_finite == (1, 1)
    assert compare(plus, plus, outputs=False).same


def test_zeros_of_both_signs_are_close(tmp_path, reference):
    def zero(sign):
        def change(leaf):
            leaf[0, 0] = sign * 0.0

        return write_hf(tmp_path / str(sign), CONFIG, changed(small_params(), "embed.embedding", change))

    report = compare(zero(1), zero(-1))
    assert report.same
    assert verdicts(report) == {"equal", "close"}


# Other shapes


def test_another_width(tmp_path, reference):
    wide = CONFIG.replace(intermediate_size=192)
    report = compare(reference, write_hf(tmp_path, wide, small_params(wide)))
    assert not report.same
    assert [field.name for field in report.fields] == ["intermediate_size"]
    shapes = {tensor.leaf: tensor.shapes for tensor in report.tensors if tensor.verdict == "shape"}
    assert shapes["layers.feed_forward.w_down"] == ((64, 160), (64, 192))
    assert len(shapes) == 3
    assert report.outputs is not None  # both can be run, and predict the same words


def test_fewer_key_value_heads(tmp_path, reference):
    config = CONFIG.replace(num_key_value_heads=2)
    params = small_params()
    attention = params["layers"]["attention"]
    for name in ("wk", "wv"):
        heads = attention[name].reshape(3, 64, 2, 2, 16)
        attention[name] = heads.mean(3)
    report = compare(reference, write_hf(tmp_path, config, params))
    assert {leaf for leaf, _ in differing(report)} == {"layers.attention.wk", "layers.attention.wv"}
    assert 0 < report.outputs.mean_kl < 1
    assert report.parted.layer == 0


@pytest.mark.parametrize("outputs", [True, False])
def test_fewer_layers(tmp_path, reference, outputs):
    config, params = CONFIG.replace(num_hidden_layers=2), small_params()
    params["layers"] = jax.tree.map(lambda leaf: leaf[:2], params["layers"])
    other = write_hf(tmp_path, config, params)
    for report in (compare(reference, other, outputs=outputs), compare(other, reference, outputs=outputs)):
        assert not report.same
        assert verdicts(report) == {"equal"}
        assert {tensor.layer for tensor in report.tensors} == {None, 0, 1}
        assert "num_hidden_layers" in report.problems[0]
        assert [at.layer for at in report.streams] == ([None, 0, 1] if outputs else [])


def test_another_vocabulary_size(tmp_path, reference):
    config, params = CONFIG.replace(vocab_size=100), small_params()
    params["embed"]["embedding"] = np.pad(params["embed"]["embedding"], ((0, 4), (0, 0)))
    params["lm_head"]["kernel"] = np.pad(params["lm_head"]["kernel"], ((0, 0), (0, 4)))
    report = compare(reference, write_hf(tmp_path, config, params))
    assert differing(report) == [("embed.embedding", None), ("lm_head.kernel", None)]
    assert report.outputs is None
    assert report.streams == ()


# The text


def tiny_model(folder: Path, pieces: list[str] | None = tiny.PIECES) -> Path:
    folder.mkdir()
    path = tiny.write_model(folder)
    (folder / "tok.bin").unlink()
    if pieces is not None:
        tiny.write_vocabulary(folder / "tok.bin", pieces)
    return path


def test_the_built_in_text_fills_the_context(tmp_path):
    a = tiny_model(tmp_path / "a")
    report = compare(a, a)
    assert report.text.what == "the built-in text by A's vocabulary"
    assert len(report.text.ids) == tiny.CONFIG.max_position_embeddings == report.outputs.tokens
    assert report.text.differences == report.text.notes == ()
    assert report.outputs.top1 == report.outputs.tokens
    assert report.outputs.perplexity[0] == report.outputs.perplexity[1] > 1


def test_perplexity_is_the_losss(tmp_path):
    a = tiny_model(tmp_path / "a")
    model = lj.load(a)
    report = compare(a, a, text="a cab ab")
    assert list(report.text.ids) == model.tokenizer.encode("a cab ab")
    loss = lj.next_token_loss(model.config, model.params, np.array([report.text.ids])).mean
    assert report.outputs.perplexity[0] == pytest.approx(np.exp(loss), rel=1e-4)


def test_another_vocabulary(tmp_path):
    swapped = [*tiny.PIECES[:-2], tiny.PIECES[-1], tiny.PIECES[-2]]
    report = compare(tiny_model(tmp_path / "a"), tiny_model(tmp_path / "b", swapped), text=" ab")
    assert report.problems == ("the vocabularies differ",)
    first, second = report.text.differences
    assert first.startswith("2 tokens are not spelled alike, the first")
    assert second.startswith("the text is ")
    assert report.outputs.mean_kl == 0


def test_a_vocabulary_of_one_side(tmp_path):
    with_one, without = tiny_model(tmp_path / "a"), tiny_model(tmp_path / "b", None)
    for report, name in ((compare(with_one, without), "A"), (compare(without, with_one), "B")):
        assert report.same
        assert report.text.what == f"the built-in text by {name}'s vocabulary"
        assert report.text.differences is None
        assert report.text.notes[0].startswith(f"{'AB'.replace(name, '')} has no vocabulary")


def test_no_vocabulary_at_all(tmp_path):
    a = tiny_model(tmp_path / "a", None)
    report = compare(a, a)
    assert report.same
    assert report.text.what == "random tokens"
    assert report.text.ids == compare(a, a).text.ids
    with pytest.raises(TokenizerError, match="A has no vocabulary"):
        compare(a, a, text="ab")


def test_a_vocabulary_beyond_the_model_is_not_used(tmp_path):
    a = tiny_model(tmp_path / "a", [*tiny.PIECES, " ab"])
    report = compare(a, tiny_model(tmp_path / "b"), text="ab")
    assert report.text.differences[0].startswith("that of A has ")
    assert report.text.what == "the text by B's vocabulary"
    assert report.problems == ("the vocabularies differ",)


def test_a_vocabulary_that_cannot_be_read_is_a_difference(tmp_path):
    a, b = tiny_model(tmp_path / "a"), tiny_model(tmp_path / "b")
    (tmp_path / "b" / "tok.bin").write_bytes(b"no vocabulary")
    report = compare(a, b, text="ab")
    assert report.text.differences[0].startswith("that of B cannot be read: ")
    assert not report.same


def test_an_empty_text(tmp_path):
    a = tiny_model(tmp_path / "a")
    with pytest.raises(InputError, match="the text is empty"):
        compare(a, a, text="")  # though BOS would be a token


# Limits and memory


def test_tolerance_and_max_kl(tmp_path, reference):
    def nudge(leaf):
        leaf *= 1.01

    other = write_hf(tmp_path, CONFIG, changed(small_params(), "layers.attention.wo", nudge))
    report = compare(reference, other, tolerance=0.02)
    assert verdicts(report) == {"equal", "close"}
    assert report.outputs.mean_kl > report.max_kl
    assert not report.same
    assert compare(reference, other, tolerance=0.02, max_kl=report.outputs.mean_kl).same
    assert differing(compare(reference, other, tolerance=0.009, outputs=False)) == [
        ("layers.attention.wo", layer) for layer in range(3)
    ]


def test_computing_in_bfloat16(tmp_path, reference):
    assert_equal(compare(reference, reference, dtype="bfloat16"))


@pytest.mark.parametrize("outputs", [True, False])
def test_memory_holds_a_layer_of_each_at_most(tmp_path, outputs):
    config = lj.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    a = write_hf(tmp_path / "a", config, random_params(config))
    tensor, layer = 4 * 256 * 1024, 4 * (4 * 256 * 256 + 3 * 256 * 1024)
    compare(a, a, outputs=outputs)  # compiles
    tracemalloc.start()
    try:
        compare(a, a, outputs=outputs)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A layer of each; what is formed of a tensor to compare it is of its size here. JAX may let go of the
    # layer before a little late, from a thread of its own. All of both would be 24 layers.
    assert peak < (4 * layer if outputs else 0) + 8 * tensor < 12 * layer


@pytest.mark.parametrize("outputs", [True, False])
def test_stacked_tensors_are_read_leaf_by_leaf(tmp_path, reference, outputs, monkeypatch):
    orbax, read, calls = write_ours(plan_orbax, tmp_path, CONFIG, small_params()), OrbaxSource.read_layer, []

    def noted(self, name, layer):
        calls.append((name, layer))
        return read(self, name, layer)

    monkeypatch.setattr(OrbaxSource, "read_layer", noted)
    assert compare(reference, orbax, outputs=outputs).same
    runs = [name for name, _ in itertools.groupby(name for name, _ in calls)]
    assert len(runs) == len(set(runs)) == len(LEAVES)
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_read_once(tmp_path, outputs, tied, monkeypatch):
    config = TIED if tied else CONFIG
    path, read, names = write_hf(tmp_path, config, small_params(config)), Source.read, []
    monkeypatch.setattr(Source, "read", lambda self, name: (names.append(name), read(self, name))[1])
    compare(path, path, outputs=outputs)
    twice = ["model.embed_tokens.weight"] if tied and outputs else []  # as the output, too
    assert sorted(names) == sorted(2 * [*open_source(path).tensors, *twice])


@pytest.mark.parametrize("outputs", [True, False])
def test_progress_reaches_the_end(reference, outputs):
    calls: list[tuple[int, int, str]] = []
    compare(reference, reference, outputs=outputs, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1]
    assert len({call[1] for call in calls}) == 1


# Bad input


def test_what_cannot_be_read(tmp_path, reference):
    with pytest.raises(CheckpointError, match="neither a file nor a known model"):
        compare(reference, tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="no format that can be read"):
        compare(tmp_path / "notes.txt", reference)


def test_a_file_cut_short_meanwhile(tmp_path, reference, monkeypatch):
    path = write_hf(tmp_path / "a", CONFIG, small_params())
    report = dataclasses.replace(open_source(path))
    monkeypatch.setattr("llama_jax.eval.verify.run.open_source", lambda _: report)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        compare(reference, path)


@pytest.mark.parametrize("setting", [{"dtype": "int4"}, {"b_runs_in": "llama.cpp"}])
def test_settings_that_there_are_not(reference, setting):
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"{name} is '{value}'; it must be one of"):
        compare(reference, reference, **setting)


def test_transformers_is_not_installed(reference, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torch transformers"):
        compare(reference, reference, b_runs_in="transformers")


# Real models


def test_stories260k_in_bfloat16(tmp_path, shared_data):
    path = shared_data / "stories260K" / "stories260K.bin"
    tensors = StoredTensors(open_source(path))
    write(plan_hf(tensors, np.dtype(jnp.bfloat16), Vocabulary()), tensors, tmp_path / "b")
    report = compare(path, tmp_path / "b")
    assert report.problems == ()
    assert verdicts(report) == {"equal", "rounded"} or verdicts(report) == {"rounded"}
    assert report.outputs.tokens == 512
    assert report.outputs.mean_kl < 1e-3


@pytest.mark.slow
def test_smollm2_in_bfloat16(tmp_path, smollm2_path):
    tensors = StoredTensors(open_source(smollm2_path))
    write(plan_hf(tensors, np.dtype(jnp.bfloat16), Vocabulary()), tensors, tmp_path / "b")
    report = compare(smollm2_path, tmp_path / "b")
    assert report.problems == ()
    assert 0 < report.outputs.mean_kl < 1e-3
    assert report.outputs.perplexity[0] == pytest.approx(report.outputs.perplexity[1], rel=1e-3)
