"""Run meshes with slices outermost, multi-process initialization, and `auto` settings by platform."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import LlamaConfig, presets
from llama_jax.errors import ConfigError, InputError
from llama_jax.meshes import AXES
from llama_jax.ops.compiler_flags import LIBTPU_FLAGS
from llama_jax.train import devices
from llama_jax.train.config.run import DistributedConfig, MeshConfig, RunConfig, TrainConfig
from tests import cuda
from tests.test_sharding import torus


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a device that a mesh reads."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "a chip"


def pod(slices: int, chips: int) -> list[Any]:
    """The devices of several slices, two chips per process, with the slices interleaved."""
    chips_in_order = [Chip(i, i // chips, i // 2) for i in range(slices * chips)]
    return chips_in_order[1::2] + chips_in_order[::2]


def test_mesh_uses_every_device_and_one_device_has_none():
    assert dict(devices.run_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    mesh = devices.run_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert devices.run_mesh(MeshConfig(), jax.devices()[:1]) is None


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 1, "tensor": 2}, {"data": -1, "fsdp": 2}]
)
def test_data_axis_spans_the_slices_first(sizes):
    mesh = devices.run_mesh(MeshConfig(**sizes, slices=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    half = len(ids) // 2
    assert set(ids[:half].ravel()) == {0, 1, 2, 3} and set(ids[half:].ravel()) == {4, 5, 6, 7}


def test_slices_follow_slice_index(monkeypatch):
    monkeypatch.setattr(devices, "Mesh", lambda grid, *_, **__: grid)  # a real Mesh rejects fake devices
    grid = devices.run_mesh(MeshConfig(data=4, fsdp=2, tensor=2, slices=2), pod(2, 8))
    assert grid.shape == (4, 2, 1, 2)
    slices = np.vectorize(lambda chip: chip.slice_index)(grid)
    assert (slices[:2] == 0).all() and (slices[2:] == 1).all()


@pytest.mark.parametrize("sizes", [{"fsdp": 32, "tensor": 2}, {"data": 4, "fsdp": 16, "context": 2}])
def test_slices_that_are_a_torus(sizes):
    chips = torus(4, 4, 4) + torus(4, 4, 4, slice_index=1)
    sizes = {"data": 2} | sizes
    mesh = devices.run_mesh(MeshConfig(**sizes, slices=2), chips)
    assert {name: mesh.shape[name] for name in sizes} == sizes
    halves = np.split(np.vectorize(lambda chip: chip.slice_index)(mesh.devices), 2)
    assert [{*half.flat} for half in halves] == [{0}, {1}]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fsdp": 3}, "mesh fsdp 3: it takes 3 of 8 devices, and must take all"),
        ({"fsdp": -1, "tensor": 3}, "8 devices cannot be divided by 3; set mesh.data, mesh.fsdp"),
        ({"data": 1, "slices": 2}, "mesh.data is 1, which is not a multiple of mesh.slices 2"),
        ({"data": 4, "fsdp": 2, "slices": 3}, "mesh.data is 4, which is not a multiple of mesh.slices 3"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_an_error(config, message):
    with pytest.raises(ConfigError) as error:
        devices.run_mesh(MeshConfig(**config))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "environment", "expected"),
    [
        ({"fsdp": 4, "tensor": 2}, {}, 8),
        ({"tensor": 3}, {}, 3),
        ({}, {}, None),  # all devices that there are
        ({"fsdp": 4}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, None),
        ({"fsdp": 4}, {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}, None),
        ({"fsdp": 4096}, {}, None),
    ],
)
def test_a_cpu_simulates_the_devices_of_the_mesh(mesh, environment, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {}
    config = SimpleNamespace(jax_num_cpu_devices=-1, jax_platforms="cpu", update=given.__setitem__)
    monkeypatch.setattr(devices, "jax", SimpleNamespace(config=config))
    devices.simulate_devices(MeshConfig(**mesh), DistributedConfig())
    assert given.get("jax_num_cpu_devices") == expected


def test_slice_index_of_gpus_is_ignored():
    """JAX sets a GPU's slice_index to its host, but any axis may span hosts."""
    gpus = sorted(pod(2, 8), key=lambda chip: chip.id)
    mesh = devices.run_mesh(MeshConfig(fsdp=8, tensor=2), gpus)
    assert mesh.axis_sizes == (1, 8, 1, 2)
    assert [chip.id for chip in mesh.devices.flat] == list(range(16))


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (1, "mesh.slices is 1 and the devices are in 2 slices; set mesh.slices to 2"),
        (4, "mesh.slices is 4: Number of slices 2 must equal"),
    ],
)
def test_wrong_number_of_slices_is_an_error(slices, message):
    chips = [dataclasses.replace(chip, platform="tpu") for chip in pod(2, 8)]
    with pytest.raises(ConfigError, match=message):
        devices.run_mesh(MeshConfig(data=4, fsdp=4, slices=slices), chips)


def test_distributed_is_initialized_only_with_an_address(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    devices.join_processes(DistributedConfig())
    assert calls == []
    devices.join_processes(
        DistributedConfig(coordinator="here:1", num_processes=2, process_id=1, heartbeat_seconds=7)
    )
    timeouts = {"initialization_timeout": 360, "heartbeat_timeout_seconds": 7}
    assert calls == [(("here:1", 2, 1), timeouts)]


def test_unreachable_processes_are_a_one_line_error(monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nand a page more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError) as error:
        devices.join_processes(DistributedConfig(coordinator="nowhere:1", num_processes=2, process_id=0))
    assert str(error.value).startswith(
        "cannot join the other processes at nowhere:1: DEADLINE_EXCEEDED: no answer;"
    )
    assert "\n" not in str(error.value)


def test_auto_depends_on_the_platform(monkeypatch):
    auto = TrainConfig()
    assert devices.attention_backend(auto, "tpu") == "splash"
    assert devices.attention_backend(auto, "cpu") == devices.attention_backend(auto, "gpu") == "blockwise"
    assert devices.attention_backend(TrainConfig(attention="xla"), "tpu") == "xla"
    assert devices.attention_backend(TrainConfig(attention="cudnn"), "gpu") == "cudnn"
    assert devices.compute_dtype(auto, "tpu") == jnp.bfloat16
    for has, dtype in ((True, jnp.bfloat16), (False, jnp.float32)):
        monkeypatch.setattr(devices, "_cpu_has_bf16", lambda has=has: has)
        assert devices.compute_dtype(auto, "cpu") == dtype
    assert devices.compute_dtype(TrainConfig(dtype="bfloat16"), "cpu") == jnp.bfloat16


H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
T4 = SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5")


def resolved(device: Any, mesh: Any = None, model: LlamaConfig = presets.LLAMA2_7B, **train: Any) -> Any:
    """The attention of a run on a device, and what is logged about it; cuDNN is installed."""
    lines: list[str] = []
    train = {"global_batch_size": 8, "seq_len": 4096} | train
    run = RunConfig(train=TrainConfig(**train))
    with cuda.cudnn():
        run = devices.resolve_attention(run, model, mesh, device, lines.append)
    return run.train.attention, lines


def test_auto_is_cudnn_where_it_supports_the_run_and_says_why_elsewhere():
    assert resolved(H100) == ("cudnn", [])
    assert resolved(TPU) == ("auto", [])
    assert resolved(H100, attention="xla") == ("xla", [])
    backend, (line,) = resolved(T4)
    assert backend == "blockwise"
    assert line.startswith(
        "cuDNN attention is not used: Tesla T4 has compute capability 7.5; flash attention"
    )
    backend, (line,) = resolved(H100, dtype="float32")
    assert backend == "blockwise" and line.endswith("attention is computed in float32")
    backend, (line,) = resolved(H100, seq_len=32768)
    assert backend == "blockwise" and "the mask of 8 packed rows of 32768 tokens has 17.2 GB" in line
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1), AXES)
    assert resolved(H100, mesh, seq_len=32768) == ("cudnn", [])


EARLIER_TPU = SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
IRONWOOD = SimpleNamespace(platform="tpu", device_kind="TPU7x")
L4 = SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", compute_capability="8.9")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0")
B200 = SimpleNamespace(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0")


def test_fp8_is_for_chips_that_have_units_for_it():
    fp8 = TrainConfig(quantization="fp8")
    for device in (TPU, EARLIER_TPU, T4, A100):
        assert not devices.has_fp8(device)
        with pytest.raises(ConfigError) as raised:
            devices.check_quantization(fp8, device.device_kind, has_fp8=False)
        assert str(raised.value) == (
            f'train.quantization is "fp8", which {device.device_kind} has no units for: TPU7x (Ironwood) '
            'has, and NVIDIA GPUs from Ada and Hopper on; use "int8", or allow slow products with '
            "train.quantization_emulated"
        )
        emulated = dataclasses.replace(fp8, quantization_emulated=True)
        for train in (emulated, TrainConfig(quantization="int8"), TrainConfig()):
            devices.check_quantization(train, device.device_kind, has_fp8=False)
    for device in (IRONWOOD, H100, L4, B200, jax.devices()[0]):
        assert devices.has_fp8(device)
        devices.check_quantization(fp8, device.device_kind, has_fp8=True)


def test_attention_by_name_that_the_devices_do_not_have_is_one_line():
    with pytest.raises(
        ConfigError, match=r'attention is "cudnn": Tesla T4 has .*; use "auto" or "blockwise"'
    ):
        resolved(T4, attention="cudnn")
    with pytest.raises(ConfigError, match=r'"cudnn", which needs NVIDIA GPUs, and the device is TPU v5; use'):
        resolved(TPU, attention="cudnn")
    with pytest.raises(ConfigError, match=r'"splash", which needs TPUs, and the device is NVIDIA H100'):
        resolved(H100, attention="splash")


def test_an_address_space_too_small_to_start_jax(monkeypatch: pytest.MonkeyPatch):
    devices.check_address_space()  # unlimited, or more than JAX needs
    limits = {"getrlimit": lambda _: (1_500_000_000, -1), "RLIM_INFINITY": -1, "RLIMIT_AS": 9}
    monkeypatch.setattr(devices, "resource", SimpleNamespace(**limits, getpagesize=lambda: 1 << 20))
    with pytest.raises(
        InputError, match=r"of the 1.5 GB of address space that `ulimit -v` allows, 0.0 GB are"
    ):
        devices.check_address_space()


@pytest.mark.parametrize(
    ("device", "generation"),
    [("0x0062", "v5p"), ("0x006f", "v6e"), ("0x0063", "v5e"), ("0x005e", "v4"), ("0x9999", "")],
)
def test_compiler_flags_are_those_of_the_chips_and_the_users(tmp_path, monkeypatch, device, generation):
    for place, vendor, name in (("0000:00:04.0", "0x8086", "0x0062"), ("0000:00:05.0", "0x1ae0", device)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "vendor").write_text(f"{vendor}\n")
        (tmp_path / place / "device").write_text(f"{name}\n")
    mine = "--xla_tpu_use_tc_device_shape_on_sc=false --xla_mine=1"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", mine)
    devices.set_compiler_flags(tmp_path)
    after = os.environ["LIBTPU_INIT_ARGS"].split()
    assert after[:2] == mine.split()
    table = LIBTPU_FLAGS.get(generation, {})
    assert after[2:] == [f"--{k}={v}" for k, v in table.items() if k != "xla_tpu_use_tc_device_shape_on_sc"]
    devices.set_compiler_flags(tmp_path)
    assert os.environ["LIBTPU_INIT_ARGS"].split() == after


def test_no_compiler_flags_without_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    devices.set_compiler_flags(tmp_path)
    assert "LIBTPU_INIT_ARGS" not in os.environ
