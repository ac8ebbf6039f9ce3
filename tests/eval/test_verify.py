"""`compare`: the same model in any format and dtype is recognized, and each difference is located."""

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
from llama_jax.eval.verify.stream import LayerwiseRun
from llama_jax.eval.verify.text import PASSAGE
from llama_jax.weights import open_source
from llama_jax.weights.compare import compare_configs, compare_tensor
from llama_jax.weights.hf_tensors import HFSource
from llama_jax.weights.names import LEAVES, leaves
from llama_jax.weights.orbax import OrbaxSource
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.orbax import plan_orbax
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests import tiny
from tests.random_models import SMALL, random_model
from tests.weights.writers import CONFIG, random_params, write_gguf, write_hf, write_llama2c

TIED = CONFIG.replace(tie_word_embeddings=True)
# Settings that llama2.c cannot represent, at its constants.
LLAMA2C = CONFIG.replace(
    head_dim=CONFIG.hidden_size // CONFIG.num_attention_heads, rms_norm_eps=1e-5, rope_theta=1e4
)


def small_params(config: lj.LlamaConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    """Random values that no lower precision represents exactly, of the scale of a trained model's."""
    rng = np.random.default_rng(seed)

    def sample(path: tuple, leaf: np.ndarray) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.05 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(sample, random_params(config))


def modified(params: dict[str, Any], path: str, change: Callable[[np.ndarray], None]) -> dict[str, Any]:
    """A copy of the parameters with one leaf modified in place."""
    params = jax.tree.map(np.copy, params)
    leaf: Any = params
    for key in path.split("."):
        leaf = leaf[key]
    change(leaf)
    return params


def different_tensors(report: Report) -> list[tuple[str, int | None]]:
    return [(tensor.leaf, tensor.layer) for tensor in report.tensors if not tensor.same]


def verdicts(report: Report) -> set[str]:
    return {tensor.verdict for tensor in report.tensors}


def assert_equal(report: Report) -> None:
    assert report.problems == ()
    assert verdicts(report) == {"equal"}
    assert report.outputs.max_difference == report.outputs.max_kl == 0
    assert {(stream.mean, stream.most) for stream in report.streams} == {(0.0, 0.0)}
    assert report.divergence is None


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("reference"), CONFIG, small_params())


# The same model

WINDOWS = SMALL.replace(
    num_hidden_layers=3,
    sliding_window=3,
    window_layers=(True, False, True),
    rope_layers=(True, True, False),
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("seed", "dtype"),
    [(0, jnp.float32), (1, jnp.float32), (2, jnp.float32), (2, jnp.bfloat16), (3, jnp.float32)],
)
def test_a_layerwise_run_equals_forward(seed, dtype):
    config, params = random_model(seed, WINDOWS if seed == 3 else None)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, 9).astype(np.int32)
    tensors, run = ParamsTensors(config, params), LayerwiseRun(config, tokens, np.dtype(dtype))
    states = [run.embed(tensors.read(LEAVES[0], None))]
    for layer in range(config.num_hidden_layers):
        layer_tensors = {leaf: tensors.read(leaf, layer) for leaf in LEAVES if leaf.per_layer}
        states.append(run.layer(layer_tensors))
    output = LEAVES[0] if config.tie_word_embeddings else LEAVES[-1]
    logits = run.logits(tensors.read(LEAVES[-2], None), tensors.read(output, None))
    expected = lj.forward(config, params, tokens[None], dtype=dtype)[0]
    assert {state.shape for state in states} == {(9, config.hidden_size)}
    tolerance = {jnp.float32: 1e-4, jnp.bfloat16: 0.1}[dtype]
    np.testing.assert_allclose(logits, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def write_with_plan(plan: Callable, folder: Path, config: lj.LlamaConfig, params: dict[str, Any]) -> Path:
    tensors = ParamsTensors(config, params)
    write(plan(tensors, None, Vocabulary()), tensors, folder / "ours")
    return folder / "ours"


WRITERS = {
    "hf-sharded": (CONFIG, lambda folder, c, p: write_hf(folder / "hf", c, p, shards=3)),
    "hf, ours": (CONFIG, lambda folder, c, p: write_with_plan(plan_hf, folder, c, p)),
    "orbax": (CONFIG, lambda folder, c, p: write_with_plan(plan_orbax, folder, c, p)),
    "gguf": (CONFIG, lambda folder, c, p: write_gguf(folder / "a.gguf", c, p)),
    "gguf, tied": (TIED, lambda folder, c, p: write_gguf(folder / "a.gguf", c, p)),
    "llama2c": (LLAMA2C, lambda folder, c, p: write_llama2c(folder / "a.bin", c, p)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_model_in_another_format(tmp_path, name):
    config, write_other = WRITERS[name]
    params = small_params(config)
    a, b = write_hf(tmp_path / "a", config, params), write_other(tmp_path, config, params)
    report = compare(a, b)
    assert_equal(report)
    assert report.fields == ()
    assert (report.a.format, report.b.format) == ("hf", name.partition("-")[0].partition(",")[0])
    layers = config.num_hidden_layers
    assert len(report.tensors) == sum(layers if leaf.per_layer else 1 for leaf in leaves(config))
    assert [stream.layer for stream in report.streams] == [None, *range(layers)]


@pytest.mark.parametrize("outputs", [True, False])
def test_a_tied_output_projection_equals_its_copy(tmp_path, outputs):
    tied = random_params(TIED)
    copy = {**tied, "lm_head": {"kernel": tied["embed"]["embedding"].T}}
    a = write_hf(tmp_path / "tied", TIED, tied)
    b = write_hf(tmp_path / "untied", CONFIG, copy)
    for report in (compare(a, b, outputs=outputs), compare(b, a, outputs=outputs)):
        assert report.same
        assert verdicts(report) == {"equal"}
        assert report.tensors[-1].leaf == "lm_head.kernel"
        assert [(field.name, field.matters) for field in report.fields] == [("tie_word_embeddings", False)]
    other = modified(copy, "lm_head.kernel", lambda leaf: leaf.__imul__(2))
    report = compare(a, write_hf(tmp_path / "other", CONFIG, other), outputs=outputs)
    assert different_tensors(report) == [("lm_head.kernel", None)]
    assert report.divergence is None  # the streams do not depend on the output projection


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "Q8_0"])
def test_a_rounded_model_is_the_same(tmp_path, reference, kind):
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
        assert report.divergence is None


def test_a_value_off_by_one_rounding_step_is_different(tmp_path, reference):
    def bump(leaf):  # one ulp of bfloat16
        leaf[1, 3, 2, 1] *= 1 + 2**-7

    params = modified(small_params(), "layers.attention.wv", bump)
    other = write_hf(tmp_path / "bf16", CONFIG, params, dtype=jnp.bfloat16)
    report = compare(reference, other, outputs=False)
    assert different_tensors(report) == [("layers.attention.wv", 1)]
    assert report.text is None
    assert report.outputs is None
    assert not report.same
    assert compare(reference, other, outputs=False, tolerance=1e-2).same


def test_q4_1_rounded_to_bfloat16(tmp_path):
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
        for start in range(0, 128, group):
            scale = np.float32(np.abs(row[start : start + group]).max() / np.float32(127)) or np.float32(1)
            row[start : start + group] = np.round(row[start : start + group] / scale) * scale
    types = ("F32", f"INT8/{group}")
    found = compare_tensor(leaf, None, (original, stored), types, 0.0)
    assert (found.verdict, found.rounded_to) == ("rounded", types[1])
    assert found.max_difference == np.abs(original - stored).max()
    assert compare_tensor(leaf, None, (original, stored), types[::-1], 0.0).verdict == "different"
    stored[3, 5] *= 1.01
    assert compare_tensor(leaf, None, (original, stored), types, 0.0).verdict == "different"


# Differences


def test_a_flipped_bit(tmp_path, reference):
    def flip(leaf):
        leaf.view(np.uint32)[1, 5, 7] ^= 1

    report = compare(
        reference, write_hf(tmp_path, CONFIG, modified(small_params(), "layers.feed_forward.w_down", flip))
    )
    assert different_tensors(report) == [("layers.feed_forward.w_down", 1)]
    assert report.problems == (f"1 of {len(report.tensors)} tensors differ",)
    (tensor,) = (tensor for tensor in report.tensors if not tensor.same)
    assert tensor.name == "model.layers.1.mlp.down_proj.weight"
    assert 0 < tensor.max_difference < 1e-7
    largest = np.abs(small_params()["layers"]["feed_forward"]["w_down"][1]).max()
    assert tensor.relative == pytest.approx(tensor.max_difference / largest)
    assert report.divergence.layer == 1


def test_two_layers_swapped(tmp_path, reference):
    params = jax.tree.map(np.copy, small_params())
    params["layers"] = jax.tree.map(lambda leaf: leaf[[2, 1, 0]], params["layers"])
    report = compare(reference, write_hf(tmp_path, CONFIG, params))
    per_layer = [".".join(leaf.path) for leaf in LEAVES if leaf.per_layer]
    assert different_tensors(report) == [(leaf, layer) for layer in (0, 2) for leaf in per_layer]
    assert report.divergence.layer == 0
    assert len(report.problems) == 2


def test_wrong_rotary_layout_in_one_layer(tmp_path, reference):
    def interleave(leaf):
        half = CONFIG.head_dim // 2
        leaf[0] = leaf[0].reshape(*leaf.shape[1:3], 2, half).swapaxes(-1, -2).reshape(leaf.shape[1:])

    report = compare(
        reference, write_hf(tmp_path, CONFIG, modified(small_params(), "layers.attention.wq", interleave))
    )
    assert different_tensors(report) == [("layers.attention.wq", 0)]
    assert report.divergence.layer == 0
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
    assert (report.divergence is not None) is matters
    if matters:
        assert report.problems[0] == f"the configurations differ in {field}"
        assert report.outputs.mean_kl > report.max_kl
        assert report.divergence.layer == 0


def test_equivalent_rope_settings():
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
    def insert_nan(leaf):
        leaf[(1,) * leaf.ndim] = np.nan

    with_nan = write_hf(tmp_path / "a", CONFIG, modified(small_params(), path, insert_nan))
    for report in (compare(reference, with_nan), compare(with_nan, reference)):
        assert not report.same
        (tensor,) = (tensor for tensor in report.tensors if not tensor.same)
        assert tensor.leaf == path
        assert tensor.max_difference == tensor.relative == float("inf")
        assert sorted(tensor.not_finite) == [0, 1]
        assert sum(map(sum, (tensor.not_finite for tensor in report.tensors))) == 1
    both = compare(with_nan, write_hf(tmp_path / "b", CONFIG, modified(small_params(), path, insert_nan)))
    assert_equal(both)
    assert max(tensor.not_finite for tensor in both.tensors) == (1, 1)
    gguf = write_gguf(tmp_path / "c.gguf", CONFIG, modified(small_params(), path, insert_nan), kind="BF16")
    assert verdicts(compare(with_nan, gguf, outputs=False)) <= {"equal", "rounded"}


def test_infinities_of_opposite_sign_are_different(tmp_path):
    def write_with(value):
        def change(leaf):
            leaf[0] = value

        return write_hf(tmp_path / str(value), CONFIG, modified(small_params(), "final_norm.scale", change))

    plus, minus = write_with(np.inf), write_with(-np.inf)
    (tensor,) = (tensor for tensor in compare(plus, minus, outputs=False).tensors if not tensor.same)
    assert tensor.max_difference == float("inf")
    assert tensor.not_finite == (1, 1)
    assert compare(plus, plus, outputs=False).same


def test_zeros_of_both_signs_are_close(tmp_path, reference):
    def zero(sign):
        def change(leaf):
            leaf[0, 0] = sign * 0.0

        return write_hf(tmp_path / str(sign), CONFIG, modified(small_params(), "embed.embedding", change))

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
    assert report.outputs is not None  # both can be run, with the same vocabulary


def test_fewer_key_value_heads(tmp_path, reference):
    config = CONFIG.replace(num_key_value_heads=2)
    params = small_params()
    attention = params["layers"]["attention"]
    for name in ("wk", "wv"):
        heads = attention[name].reshape(3, 64, 2, 2, 16)
        attention[name] = heads.mean(3)
    report = compare(reference, write_hf(tmp_path, config, params))
    assert {leaf for leaf, _ in different_tensors(report)} == {"layers.attention.wk", "layers.attention.wv"}
    assert 0 < report.outputs.mean_kl < 1
    assert report.divergence.layer == 0


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
        assert [stream.layer for stream in report.streams] == ([None, 0, 1] if outputs else [])


def test_another_vocabulary_size(tmp_path, reference):
    config, params = CONFIG.replace(vocab_size=100), small_params()
    params["embed"]["embedding"] = np.pad(params["embed"]["embedding"], ((0, 4), (0, 0)))
    params["lm_head"]["kernel"] = np.pad(params["lm_head"]["kernel"], ((0, 0), (0, 4)))
    report = compare(reference, write_hf(tmp_path, config, params))
    assert different_tensors(report) == [("embed.embedding", None), ("lm_head.kernel", None)]
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
    assert report.text.what == "the built-in text with A's tokenizer"
    assert len(report.text.ids) == tiny.CONFIG.max_position_embeddings == report.outputs.tokens
    assert report.text.differences == report.text.notes == ()
    assert report.outputs.top1 == report.outputs.tokens
    assert report.outputs.perplexity[0] == report.outputs.perplexity[1] > 1


def test_perplexity_matches_the_loss(tmp_path):
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
    first, probe, second = report.text.differences
    assert probe.startswith("'a <s> b' is [")
    assert first.startswith("2 tokens have different pieces, the first")
    assert second.startswith("the text has ")
    assert report.outputs.mean_kl == 0


def test_only_one_model_has_a_tokenizer(tmp_path):
    with_one, without = tiny_model(tmp_path / "a"), tiny_model(tmp_path / "b", None)
    for report, name in ((compare(with_one, without), "A"), (compare(without, with_one), "B")):
        assert report.same
        assert report.text.what == f"the built-in text with {name}'s tokenizer"
        assert report.text.differences is None
        assert report.text.notes[0].startswith(f"{'AB'.replace(name, '')} has no tokenizer")


def test_neither_model_has_a_tokenizer(tmp_path):
    a = tiny_model(tmp_path / "a", None)
    report = compare(a, a)
    assert report.same
    assert report.text.what == "random tokens"
    assert report.text.ids == compare(a, a).text.ids
    with pytest.raises(TokenizerError, match="A has no tokenizer"):
        compare(a, a, text="ab")


def test_a_tokenizer_larger_than_the_model_is_not_used(tmp_path):
    a = tiny_model(tmp_path / "a", [*tiny.PIECES, " ab"])
    report = compare(a, tiny_model(tmp_path / "b"), text="ab")
    assert report.text.differences[0].startswith("the tokenizer of A cannot be used: ")
    assert report.text.what == "the text with B's tokenizer"
    assert report.problems == ("the vocabularies differ",)


def test_an_unreadable_tokenizer_is_a_difference(tmp_path):
    a, b = tiny_model(tmp_path / "a"), tiny_model(tmp_path / "b")
    (tmp_path / "b" / "tok.bin").write_bytes(b"no vocabulary")
    report = compare(a, b, text="ab")
    assert report.text.differences[0].startswith("the tokenizer of B cannot be used: ")
    assert not report.same


def test_an_empty_text(tmp_path):
    a = tiny_model(tmp_path / "a")
    with pytest.raises(InputError, match="the text is empty"):
        compare(a, a, text="")  # although there would be a BOS token


# Limits and memory


def test_tolerance_and_max_kl(tmp_path, reference):
    def scale(leaf):
        leaf *= 1.01

    other = write_hf(tmp_path, CONFIG, modified(small_params(), "layers.attention.wo", scale))
    report = compare(reference, other, tolerance=0.02)
    assert verdicts(report) == {"equal", "close"}
    assert report.outputs.mean_kl > report.max_kl
    assert not report.same
    assert compare(reference, other, tolerance=0.02, max_kl=report.outputs.mean_kl).same
    assert different_tensors(compare(reference, other, tolerance=0.009, outputs=False)) == [
        ("layers.attention.wo", layer) for layer in range(3)
    ]


def test_computation_in_bfloat16(tmp_path, reference):
    assert_equal(compare(reference, reference, dtype="bfloat16"))


@pytest.mark.parametrize("outputs", [True, False])
def test_peak_memory_is_one_layer_of_each_model(tmp_path, outputs):
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
    # One layer of each model, and temporaries of the size of a tensor. JAX may free the previous layer a
    # little later, from another thread. Both whole models would be 24 layers.
    assert peak < (4 * layer if outputs else 0) + 8 * tensor < 12 * layer


@pytest.mark.parametrize("outputs", [True, False])
def test_stacked_tensors_are_read_leaf_by_leaf(tmp_path, reference, outputs, monkeypatch):
    orbax, read, calls = (
        write_with_plan(plan_orbax, tmp_path, CONFIG, small_params()),
        OrbaxSource.read_layer,
        [],
    )

    def recorded(self, name, layer, expert):
        calls.append((name, layer))
        return read(self, name, layer, expert)

    monkeypatch.setattr(OrbaxSource, "read_layer", recorded)
    assert compare(reference, orbax, outputs=outputs).same
    groups = [name for name, _ in itertools.groupby(name for name, _ in calls)]
    assert len(groups) == len(set(groups)) == len(LEAVES)
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_read_once(tmp_path, outputs, tied, monkeypatch):
    config = TIED if tied else CONFIG
    path, read, names = write_hf(tmp_path, config, small_params(config)), HFSource.read, []
    monkeypatch.setattr(HFSource, "read", lambda self, name: (names.append(name), read(self, name))[1])
    compare(path, path, outputs=outputs)
    twice = ["model.embed_tokens.weight"] if tied and outputs else []  # also as the output projection
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


def test_unreadable_checkpoints(tmp_path, reference):
    with pytest.raises(CheckpointError, match="neither a path nor a known model"):
        compare(reference, tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="unknown format"):
        compare(tmp_path / "notes.txt", reference)


def test_a_file_truncated_during_the_comparison(tmp_path, reference, monkeypatch):
    path = write_hf(tmp_path / "a", CONFIG, small_params())
    source = dataclasses.replace(open_source(path))
    monkeypatch.setattr("llama_jax.text.pretrained.open_source", lambda _: source)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        compare(reference, path)


@pytest.mark.parametrize("setting", [{"dtype": "int4"}, {"b_backend": "llama.cpp"}])
def test_unknown_settings(reference, setting):
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"{name} is '{value}'; it must be one of"):
        compare(reference, reference, **setting)


def test_transformers_is_not_installed(reference, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torch transformers"):
        compare(reference, reference, b_backend="transformers")


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
    report = compare(smollm2_path, tmp_path / "b", text=PASSAGE[:600])  # all of it takes twice as long
    assert report.problems == ()
    assert report.outputs.tokens > 100
    assert 0 < report.outputs.mean_kl < 1e-3
    assert report.outputs.perplexity[0] == pytest.approx(report.outputs.perplexity[1], rel=1e-3)
