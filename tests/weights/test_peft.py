"""LoRA adapters in PEFT's format: round trips, and merging on load and on conversion."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_jax as lj
from llama_jax.adapters import lora
from llama_jax.cli import main
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.ops.adapted import PROJECTIONS
from llama_jax.text.convert import FORMATS, convert, save
from llama_jax.text.model import Model
from llama_jax.tokenizer import load_tokenizer
from llama_jax.weights import load_params, open_source
from llama_jax.weights.adapters import load_adapter
from llama_jax.weights.write.adapters import save_adapter
from tests import tiny
from tests.random_models import normal, random_model
from tests.weights.adapters import SIZES, tensors, write

CONFIG = tiny.CONFIG.replace(tie_word_embeddings=False)
KINDS = {
    "lora": lora.Lora(rank=4, alpha=6),
    "rslora": lora.Lora(rank=3, alpha=5.5, rslora=True, target_modules=("wq", "w_down")),
    "dora": lora.Lora(rank=4, alpha=6, dora=True, target_modules=("k_proj", "o_proj", "w_gate")),
}


@pytest.fixture(scope="module")
def params():
    return random_model(5, CONFIG)[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory, params):
    """The model in a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base")
    tiny.write_model(folder)
    tokenizer = load_tokenizer(folder / "tok.bin")
    return save(Model(CONFIG, params, tokenizer, folder), folder / "hf")


def trained(settings, params, seed=2):
    """An adapter of random values; magnitudes are near the base's norms."""
    shapes = jax.eval_shape(lambda params: lora.init(settings, params, jax.random.key(0)), params)
    return normal(seed, shapes, 0.1, {"magnitude": 0.8})


def trees_equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def cast(params, dtype):
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)


merge = jax.jit(lora.merge)


@pytest.mark.parametrize(
    ("kind", "mesh"), [("lora", None), ("rslora", None), ("dora", None), ("dora", "fsdp=4,tensor=2")]
)
def test_round_trip_is_bitwise(kind, mesh, params, tmp_path):
    settings, adapter = KINDS[kind], trained(KINDS[kind], params)
    if mesh is not None:
        with jax.set_mesh(lj.make_mesh(mesh)):
            laid = lora.init(
                settings, lj.shard_params(params, jax.sharding.get_mesh(), CONFIG), jax.random.key(0)
            )
            placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), adapter, laid)
            save_adapter(tmp_path / "out", settings, placed, CONFIG)
    else:
        save_adapter(tmp_path / "out", settings, adapter, CONFIG)
    found, tree = load_adapter(tmp_path / "out")
    assert trees_equal(tree, adapter)
    assert found.matrices == settings.matrices
    assert (found.rank, found.scale, found.dora) == (settings.rank, settings.scale, settings.dora)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_merged_weights_match_the_lora_formula(dtype, params, tmp_path):
    """Compares with W + alpha / r B A in PEFT's layout."""
    stored = {name: array.astype(dtype) for name, array in tensors().items()}
    if dtype is jnp.bfloat16:  # safetensors' NumPy interface needs ml_dtypes' type
        stored = {name: array.astype("bfloat16") for name, array in tensors().items()}
    settings, adapter = load_adapter(write(tmp_path / "a", stored))
    merged = merge(lora.attach(settings, params, adapter))["layers"]
    for part, name, module in (
        ("attention", "wk", "self_attn.k_proj"),
        ("feed_forward", "w_down", "mlp.down_proj"),
    ):
        inputs, outputs = SIZES[module]
        for layer in range(2):
            a, b = (
                stored[f"base_model.model.model.layers.{layer}.{module}.lora_{which}.weight"].astype(
                    np.float32
                )
                for which in "AB"
            )
            weight = np.asarray(params["layers"][part][name])[layer].reshape(inputs, outputs)
            found = np.asarray(merged[part][name])[layer].reshape(inputs, outputs)
            np.testing.assert_allclose(found, weight + 6 / 4 * (b @ a).T, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_load_merges_an_adapter(kind, params, base, tmp_path):
    settings, adapter = KINDS[kind], trained(KINDS[kind], params)
    save_adapter(tmp_path / "run" / "adapter", settings, adapter, CONFIG)  # like a training run
    expected = merge(lora.attach(settings, params, adapter))
    for found in (
        lj.load(base, adapter=tmp_path / "run" / "adapter").params,
        lj.load(base, adapter=tmp_path / "run", mesh=lj.make_mesh("fsdp=4,tensor=2")).params,
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)
    unstacked = lj.load(base, adapter=tmp_path / "run", scan_layers=False)
    tokens = np.arange(12)[None]
    logits = lj.forward(CONFIG, lora.attach(settings, params, adapter), tokens)
    np.testing.assert_allclose(lj.forward(CONFIG, unstacked.params, tokens), logits, atol=1e-4)


def test_quantization_is_after_merging(params, base, tmp_path):
    settings = KINDS["lora"]
    save_adapter(tmp_path / "a", settings, trained(settings, params), CONFIG)
    found = lj.load(base, adapter=tmp_path / "a", bits=8).params
    assert trees_equal(found, lj.quantize(lj.load(base, adapter=tmp_path / "a").params, 8))


@pytest.mark.parametrize(
    ("kind", "format"),
    [*(("dora", format) for format in FORMATS), ("lora", "gguf"), ("rslora", "gguf")],
)
def test_convert_and_load_merge_bitwise_equally(kind, format, params, base, tmp_path):
    settings = KINDS[kind]
    save_adapter(tmp_path / "a", settings, trained(settings, params), CONFIG)
    source = convert(base, tmp_path / "source", format)
    expected = lj.load(base, adapter=tmp_path / "a").params
    assert trees_equal(lj.load(source, adapter=tmp_path / "a").params, expected)
    target = convert(base, tmp_path / "out", format, adapter=tmp_path / "a")
    assert trees_equal(load_params(open_source(target)), expected)


def test_attached_adapters_are_saved_merged(params, base, tmp_path):
    settings, adapter = KINDS["dora"], trained(KINDS["dora"], params)
    model = lj.load(base)
    attached = dataclasses.replace(model, params=lora.attach(settings, model.params, adapter))
    save(attached, tmp_path / "out")
    expected = lora.merge(attached.params)
    assert trees_equal(load_params(open_source(tmp_path / "out"), dtype=jnp.float32), expected)


def test_bf16_base_is_merged_in_f32_and_rounded_once(params, base, tmp_path):
    settings, adapter = KINDS["lora"], trained(KINDS["lora"], params)
    save_adapter(tmp_path / "a", settings, adapter, CONFIG)
    source = convert(base, tmp_path / "bf16", dtype="bfloat16")
    exact = lj.load(source, adapter=tmp_path / "a").params
    rounded = cast(exact, "bfloat16")
    assert not trees_equal(exact, cast(rounded, "float32"))
    assert trees_equal(lj.load(source, "bfloat16", adapter=tmp_path / "a").params, rounded)
    for dtype, expected in (("float32", exact), (None, rounded), ("bfloat16", rounded)):
        target = convert(source, tmp_path / f"to {dtype}", dtype=dtype, adapter=tmp_path / "a")
        assert trees_equal(load_params(open_source(target), dtype=dtype or "bfloat16"), expected)


def test_interrupted_conversion_does_not_resume_with_another_adapter(params, base, tmp_path):
    settings = KINDS["lora"]
    for number in (1, 2):
        save_adapter(tmp_path / str(number), settings, trained(settings, params, number), CONFIG)

    def stop(done, total, name):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(base, tmp_path / "out", adapter=tmp_path / "1", progress=stop)
    assert not (tmp_path / "out").exists()
    convert(base, tmp_path / "out", adapter=tmp_path / "2")
    expected = lj.load(base, adapter=tmp_path / "2").params
    assert trees_equal(load_params(open_source(tmp_path / "out")), expected)


def test_rank_and_alpha_patterns(params, tmp_path):
    """Padding to the largest rank and folding alpha into b are equivalent to the stored adapter."""
    stored = tensors(["self_attn.q_proj", "mlp.up_proj"])
    stored |= tensors(["mlp.up_proj"], rank=2)
    patterns = {
        "rank_pattern": {"mlp.up_proj": 2},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 9, "up_proj": 3},
    }
    settings, adapter = load_adapter(write(tmp_path / "a", stored, **patterns))
    assert settings.rank == 4
    merged = merge(lora.attach(settings, params, adapter))["layers"]["feed_forward"]["w_up"]
    for layer, scale in ((0, 3 / 2), (1, 9 / 2)):
        a, b = (stored[f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{x}.weight"] for x in "AB")
        expected = np.asarray(params["layers"]["feed_forward"]["w_up"])[layer] + scale * (b @ a).T
        np.testing.assert_allclose(np.asarray(merged)[layer], expected, atol=1e-5)


def test_replacing_an_adapter(params, tmp_path):
    settings, target = KINDS["lora"], tmp_path / "deep" / "a"
    for seed in (1, 2):
        save_adapter(
            target, settings, trained(settings, params, seed), CONFIG, base_model="tiny", replace=True
        )
    assert trees_equal(load_adapter(target)[1], trained(settings, params, 2))
    assert [path.name for path in target.parent.iterdir()] == ["a"]
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    with pytest.raises(CheckpointError, match="already exists; remove it"):
        save_adapter(target, settings, trained(settings, params), CONFIG)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="already exists"):
        save_adapter(tmp_path / "mine", settings, trained(settings, params), CONFIG, replace=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_failed_write_keeps_the_old_adapter(params, tmp_path, monkeypatch):
    settings, target = KINDS["lora"], tmp_path / "a"
    save_adapter(target, settings, trained(settings, params, 1), CONFIG)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"a: cannot be written: No space left on device; write elsewhere"
    ):
        save_adapter(target, settings, trained(settings, params, 2), CONFIG, replace=True)
    assert trees_equal(load_adapter(target)[1], trained(settings, params, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_both_names_of_the_magnitude(params, tmp_path):
    settings, adapter = KINDS["dora"], trained(KINDS["dora"], params)
    save_adapter(tmp_path / "a", settings, adapter, CONFIG)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    renamed = {name.replace("_vector", "_vector.weight"): array for name, array in stored.items()}
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert trees_equal(load_adapter(write(tmp_path / "b", renamed, **fields))[1], adapter)


def test_commands_with_an_adapter(params, base, tmp_path, capsys):
    settings = KINDS["lora"]
    save_adapter(tmp_path / "a", settings, trained(settings, params), CONFIG)
    generate = ["generate", str(base), "--prompt", "a", "--max-new-tokens", "6"]
    assert main([*generate, "--adapter", str(tmp_path / "a"), "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert (
        main(["convert", str(base), str(tmp_path / "out"), "--adapter", str(tmp_path / "a"), "--json"]) == 0
    )
    capsys.readouterr()
    generate[1] = str(tmp_path / "out")
    assert main([*generate, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == tokens


@pytest.mark.parametrize("verb", ["generate", "chat", "convert", "load"])
def test_adapter_for_another_model(verb, base, tmp_path, capsys):
    folder = write(tmp_path / "a", tensors(layers=3))
    message = (
        f"{folder}: the adapter is for another model: attention.wk has 3 layers of 16 x 8, the base model's "
        "2 of 16 x 8; use the base model it was trained on"
    )
    words = {"generate": ["--prompt", "a"], "chat": [], "convert": [str(tmp_path / "out")]}
    if verb == "load":
        with pytest.raises(ConfigError) as error:
            lj.load(base, adapter=folder)
        assert str(error.value) == message
        return
    assert main([verb, str(base), *words[verb], "--adapter", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


LEFT_OUT = {
    "bias": ({"bias": "all", "target_modules": ["q_proj"]}, ("self_attn.q_proj",), 2),
    "bias of adapted layers": ({"bias": "lora_only"}, tuple(SIZES), 2),
    "excluded": (
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["down_proj"]},
        ("self_attn.q_proj",),
        2,
    ),
    "first layer": ({"target_modules": ["v_proj"], "layers_to_transform": [0]}, ("self_attn.v_proj",), 1),
    "full names": ({"target_modules": ["model.layers.0.mlp.up_proj"]}, ("mlp.up_proj",), 1),
    "by an expression": ({"target_modules": r".*layers\.0\..*up_proj"}, ("mlp.up_proj",), 1),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_configuration_leaves_out_is_not_adapted(case, base, params, tmp_path):
    fields, modules, layers = LEFT_OUT[case]
    stored = tensors(modules, layers=layers)
    folder = write(tmp_path / "a", stored, **fields)
    merged = lj.load(base, adapter=folder).params["layers"]
    for sublayer, matrices in params["layers"].items():
        for name, original in matrices.items():
            module = next(
                (m for m in modules if PROJECTIONS.get(name, ("", ""))[1] == m.partition(".")[2]), None
            )
            expected = np.array(original, np.float32)
            for layer in range(layers if module else 0):
                at = f"base_model.model.model.layers.{layer}.{module}"
                update = 6 / 4 * stored[f"{at}.lora_B.weight"] @ stored[f"{at}.lora_A.weight"]
                expected[layer] += update.T.reshape(expected[layer].shape)
            np.testing.assert_allclose(merged[sublayer][name], expected, rtol=1e-5, atol=1e-5)


def test_a_dora_adapter_of_some_layers_is_merged_alone(base, params, tmp_path):
    stored = tensors(("self_attn.v_proj",), layers=1)
    at = "base_model.model.model.layers.0.self_attn.v_proj"
    magnitude = np.linspace(1, 2, 8, dtype=np.float32)
    folder = write(
        tmp_path / "a",
        stored | {f"{at}.lora_magnitude_vector": magnitude},
        target_modules=["v_proj"],
        layers_to_transform=[0],
        use_dora=True,
    )
    with pytest.raises(
        CheckpointError, match="is a DoRA adapter of some layers only, so that it can only be"
    ):
        load_adapter(folder, 2)
    merged = np.asarray(lj.load_params(base, adapter=folder)[1]["layers"]["attention"]["wv"])
    original = np.asarray(params["layers"]["attention"]["wv"])
    update = (stored[f"{at}.lora_B.weight"] @ stored[f"{at}.lora_A.weight"]).T
    expected = original[0].reshape(16, 8) + 6 / 4 * update
    expected *= magnitude / np.linalg.norm(expected, axis=0)
    np.testing.assert_allclose(merged[0].reshape(16, 8), expected, rtol=1e-5)
    np.testing.assert_array_equal(merged[1], original[1])
