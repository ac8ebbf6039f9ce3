"""Matrices of experts in every format: there and back, by mesh, unstacked, compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama_jax as lj
from llama_jax.adapters import lora
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.eval.verify import compare
from llama_jax.meshes import make_mesh
from llama_jax.sharding import named, param_specs
from llama_jax.text.convert import convert
from llama_jax.train.checkpoints.checkpoints import Checkpoints
from llama_jax.train.config.checkpoint import CheckpointConfig
from llama_jax.weights import open_source
from llama_jax.weights.adapters import load_adapter
from llama_jax.weights.run_adapters import step_fields
from llama_jax.weights.write.adapters import save_adapter
from tests.random_models import MIXTURE, normal, random_model
from tests.train.small_runs import State

CONFIG = MIXTURE.replace(hidden_size=32)
PARAMS = random_model(0, CONFIG)[1]


@pytest.fixture(scope="module", params=["hf", "gguf", "orbax"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("experts")
    name = "model.gguf" if request.param == "gguf" else "model"
    return request.param, lj.save(CONFIG, PARAMS, folder / name, format=request.param)


def test_a_file_gives_back_the_parameters(saved: tuple[Any, Path]) -> None:
    config, params = lj.load_params(saved[1])
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    _, layers = lj.load_params(saved[1], scan_layers=False)
    jax.tree.map(np.testing.assert_array_equal, layers, lj.unstack(PARAMS))


def test_a_mesh_gets_its_shards(saved: tuple[Any, Path]) -> None:
    mesh = make_mesh("fsdp=2,expert=2,tensor=2")
    _, params = lj.load_params(saved[1], mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    for name, spec in param_specs(CONFIG)["layers"]["feed_forward"].items():
        assert params["layers"]["feed_forward"][name].sharding == named(mesh, spec)


@pytest.mark.filterwarnings("ignore:.*tokenizer")
@pytest.mark.parametrize("target", ["hf", "gguf", "orbax"])
def test_every_format_converts_to_every_other(saved: tuple[Any, Path], target: Any, tmp_path: Path) -> None:
    path = convert(saved[1], tmp_path / ("out.gguf" if target == "gguf" else "out"), target)
    config, params = lj.load_params(path)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_gguf_has_one_tensor_per_matrix_and_routers_in_f32(tmp_path: Path) -> None:
    path = lj.save(CONFIG, PARAMS, tmp_path / "model.gguf", format="gguf", dtype="q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(tensors["blk.1.ffn_down_exps.weight"].shape) == [64, 32, 4]
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.ffn_gate_exps.weight"].tensor_type.name == "Q8_0"
    assert not any(".ffn_gate.0." in name for name in tensors)
    config, params = lj.load_params(path)
    assert config == CONFIG
    for name in ("w_gate", "w_down"):
        found, expected = (tree["layers"]["feed_forward"][name] for tree in (params, PARAMS))
        assert 0 < np.abs(found - expected).max() < 0.01


def test_old_gguf_files_have_a_tensor_per_expert(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(lj.save(CONFIG, PARAMS, tmp_path / "new.gguf", format="gguf"))
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for name, field in reader.fields.items():
        if name.startswith(("llama.", "tokenizer.")):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if "_exps" not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        for expert, matrix in enumerate(tensor.data):
            writer.add_tensor(tensor.name.replace("_exps", f".{expert}"), matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, params = lj.load_params(tmp_path / "old.gguf")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_verify_compares_experts_and_runs_them(saved: tuple[Any, Path], tmp_path: Path) -> None:
    if saved[0] != "hf":
        return
    feed_forward = dict(PARAMS["layers"]["feed_forward"])
    feed_forward["w_up"] = feed_forward["w_up"].at[1, 2, 3, 4].add(1.0)
    other = {**PARAMS, "layers": {**PARAMS["layers"], "feed_forward": feed_forward}}
    report = compare(saved[1], lj.save(CONFIG, other, tmp_path / "other"), outputs=False)
    (different,) = (tensor for tensor in report.tensors if not tensor.same)
    assert different.name == "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize("format", ["meta", "llama2c"])
def test_formats_without_experts_refuse_them(format: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no place for num_experts"):
        lj.save(CONFIG, PARAMS, tmp_path / "out", format=format)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    source = open_source(lj.save(CONFIG, PARAMS, tmp_path / "model"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors = {key: info for key, info in source.tensors.items() if key != name}
    with pytest.raises(
        CheckpointError, match=r"missing tensors: model\.layers\.1\.block_sparse_moe\.experts\.3"
    ):
        lj.weights.load_params(dataclasses.replace(source, tensors=tensors))


LORA = lora.Lora(rank=3, alpha=5.5, rslora=True, target_modules=("wq", "w_*"))


@pytest.fixture(scope="module")
def adapter() -> Any:
    shapes = jax.eval_shape(lambda: lora.init(LORA, PARAMS, jax.random.key(0)))
    return normal(2, shapes, 0.1, {})


@pytest.fixture(scope="module")
def adapted(adapter: Any) -> Any:
    return jax.jit(lora.merge)(lora.attach(LORA, PARAMS, adapter))


def test_lora_of_experts_in_pefts_format_is_what_it_was_and_merges(
    adapter: Any, adapted: Any, saved: tuple[Any, Path], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", LORA, adapter, CONFIG)
    stored = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight"
    np.testing.assert_array_equal(stored[name], adapter["layers"]["feed_forward"]["w_up"]["b"][1, 2].T)
    assert len(stored) == 2 * 2 * (1 + 3 * 4)  # a and b, layers, wq and three matrices of four experts
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["q_proj", "w1", "w3", "w2"]
    settings, found = load_adapter(folder)
    assert (settings.matrices, settings.scale) == (LORA.matrices, LORA.scale)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    _, merged = lj.load_params(saved[1], adapter=folder)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, adapted)


def test_lora_of_experts_in_a_runs_checkpoint_is_what_it_was(adapter: Any, tmp_path: Path) -> None:
    fields = step_fields(LORA, "base", tmp_path)
    with Checkpoints(tmp_path, CheckpointConfig(), model=CONFIG, run=fields) as checkpoints:
        params = jax.tree.map(jnp.asarray, adapter)
        state = State(params=params, opt_state=(), step=jnp.int32(1), key=jax.random.key(0))
        checkpoints.save(1, state, {}, {"eval_loss": 1.0})
    settings, found = load_adapter(tmp_path)
    assert settings == LORA
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


def test_a_peft_adapter_without_a_tensor_of_an_expert_is_one_line(adapter: Any, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", LORA, adapter, CONFIG)
    stored = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2.lora_A.weight"
    save_file({key: x for key, x in stored.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensors: .*layers\.0\.\*\.experts\.1\.w2\.lora_A"):
        load_adapter(folder)
    extra = {name.replace("block_sparse_moe.experts.1.w2", "mlp.down_proj"): stored[name]}
    save_file({**stored, **extra}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapts both mlp and block_sparse_moe\.experts"):
        load_adapter(folder)
