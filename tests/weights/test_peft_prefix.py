"""Prefixes in PEFT's format, and adapters that cannot be merged (prefix, bottleneck) in every command."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import llama_jax as lj
from llama_jax import adapters
from llama_jax.adapters import bottleneck, prefix
from llama_jax.cli import main
from llama_jax.errors import CheckpointError, ConfigError, InputError
from llama_jax.text.convert import convert, save
from llama_jax.text.model import Model
from llama_jax.tokenizer import load_tokenizer
from llama_jax.weights.adapters import load_adapter
from llama_jax.weights.write.adapters import save_adapter
from tests import tiny
from tests.random_models import normal, random_model

CONFIG = tiny.CONFIG.replace(tie_word_embeddings=False)
KINDS = {"prefix": prefix.Prefix(3), "bottleneck": bottleneck.Bottleneck(4)}


@pytest.fixture(scope="module")
def params():
    return random_model(5, CONFIG)[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory, params):
    """The model in a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base")
    tiny.write_model(folder)
    return save(Model(CONFIG, params, load_tokenizer(folder / "tok.bin"), folder), folder / "hf")


def random_adapter(settings, config, params, seed=2):
    shapes = jax.eval_shape(lambda params: adapters.init(settings, config, params, jax.random.key(0)), params)
    return normal(seed, shapes, 0.3, {})


@pytest.fixture(params=KINDS)
def written(request, params, tmp_path):
    settings = KINDS[request.param]
    adapter = random_adapter(settings, CONFIG, params)
    return request.param, save_adapter(tmp_path / "a", settings, adapter, CONFIG, base_model="x"), adapter


def test_round_trip_is_bitwise(written):
    kind, folder, adapter = written
    settings, again = load_adapter(folder)
    assert type(settings) is type(KINDS[kind])
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_layout_of_the_peft_matrix(params, tmp_path):
    layers, heads, width = CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim
    shape = (3, layers, 2, heads, width)
    stored = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    folder = write(tmp_path / "a", stored.reshape(3, -1))
    _, found = load_adapter(folder)
    for layer in range(layers):
        for token in range(3):
            for which, name in enumerate("kv"):
                layer_values = found["layers"]["attention"][name][layer, :, token]
                np.testing.assert_array_equal(layer_values, stored[token, layer, which])


@pytest.mark.parametrize(("mesh", "bits"), [(None, None), (None, 8), ("fsdp=2,tensor=2", None)])
def test_load_attaches_an_adapter(mesh, bits, written, base, params):
    kind, folder, adapter = written
    mesh = None if mesh is None else lj.make_mesh(mesh, devices=jax.devices()[:4])
    model = lj.load(base, adapter=folder, bits=bits, mesh=mesh, scan_layers=False)
    base_params = params if bits is None else lj.quantize(params, bits)
    tokens = np.array([[5, 6, 7, 8], [4, 9, 3, 2]])
    expected = lj.forward(CONFIG, adapters.attach(KINDS[kind], base_params, adapter), tokens)
    if mesh is None and bits is None:
        assert np.abs(expected - lj.forward(CONFIG, base_params, tokens)).max() > 1e-3
    if mesh is None:
        found = lj.forward(CONFIG, model.params, tokens)
    else:
        with jax.set_mesh(mesh):
            found = lj.forward(CONFIG, model.params, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if mesh is not None and kind == "prefix":  # elsewhere test_commands_with_an_adapter generates
        first, again = (model.generate(["ab", "ba"], max_new_tokens=3) for _ in range(2))
        assert first == again and len(first) == 2


def test_commands_with_an_adapter(written, base, tmp_path, capsys):
    kind, folder, _ = written
    command = ["generate", str(base), "--prompt", "ab", "--max-new-tokens", "5", "--json"]
    assert main(command) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*command, "--adapter", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out) != plain
    assert main(["convert", str(base), str(tmp_path / "out.gguf"), "--adapter", str(folder)]) == 2
    message_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message_line.startswith("error:") and f"a {kind} cannot be merged into weights" in message_line
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(InputError, match=f"a {kind} cannot be merged into weights"):
        convert(base, tmp_path / "out", adapter=folder)
    with pytest.raises(InputError, match=f"a {kind} cannot be merged into weights"):
        save(lj.load(base, adapter=folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapter_for_another_model(params, base, tmp_path, capsys):
    other = CONFIG.replace(num_hidden_layers=CONFIG.num_hidden_layers + 1)
    adapter = random_adapter(KINDS["prefix"], other, random_model(5, other)[1])
    with pytest.raises(ConfigError, match="another model"):
        save_adapter(tmp_path / "a", KINDS["prefix"], adapter, CONFIG)
    assert not (tmp_path / "a").exists()
    save_adapter(tmp_path / "a", KINDS["prefix"], adapter, other)
    assert main(["generate", str(base), "--prompt", "a", "--adapter", str(tmp_path / "a")]) == 2
    assert "the prefix is for another model" in capsys.readouterr().err


def write(folder, stored=None, **fields):
    """Writes a prefix in PEFT's format, according to its documentation, without `llama_jax.weights`."""
    width = CONFIG.num_key_value_heads * CONFIG.head_dim
    sizes = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "num_layers": CONFIG.num_hidden_layers,
        "num_attention_heads": CONFIG.num_key_value_heads,
        "token_dim": width,
    }
    folder.mkdir()
    if stored is None:
        stored = np.zeros((3, CONFIG.num_hidden_layers * 2 * width), np.float32)
    tensors = stored if isinstance(stored, dict) else {"prompt_embeddings": stored}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(sizes | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'; only CAUSAL_LM and SEQ_CLS"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is '2'; a Llama has 1"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is \"['lm_head']\"; only a classifier's"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is '0'"),
        ({"token_dim": True}, "token_dim is 'True'"),
        ({"num_attention_heads": 3}, "not a multiple of num_attention_heads 3"),
        ({"num_virtual_tokens": 4}, "prompt_embeddings [3, "),
        ({"num_virtual_tokens": 1 << 30}, "should be [1073741824, "),
    ],
    ids=str,
)
def test_unsupported_configs_are_refused(fields, message, tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_adapter(write(tmp_path / "a", **fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unsupported_tensors_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has 'x'; a prefix is one tensor, prompt_embeddings"):
        load_adapter(write(tmp_path / "a", {"x": np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match="has no tensor"):
        load_adapter(write(tmp_path / "b", {}))
    folder = write(tmp_path / "c")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: not a torch\.save file"):
        load_adapter(folder)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_read_as_f32(dtype, tmp_path):
    width = CONFIG.num_hidden_layers * 2 * CONFIG.num_key_value_heads * CONFIG.head_dim
    stored = np.random.default_rng(0).standard_normal((3, width)).astype(dtype)
    _, found = load_adapter(write(tmp_path / "a", stored))
    keys = found["layers"]["attention"]["k"]
    assert keys.dtype == jnp.float32
    assert keys.ravel()[0] == np.float32(stored[0, 0])
