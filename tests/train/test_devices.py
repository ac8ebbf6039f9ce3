"""Run meshes with slices outermost, multi-process initialization, and `auto` settings by platform."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import ConfigError, InputError
from llama_jax.train import devices
from llama_jax.train.config.run import DistributedConfig, MeshConfig, TrainConfig


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fsdp": 3}, "needs 3 devices and there are 8; set mesh.data, mesh.fsdp"),
        ({"fsdp": -1, "tensor": 3}, "needs 3 devices and there are 8; set mesh.data"),
        ({"data": 1, "slices": 2}, "mesh.data is 1, which is not a multiple of mesh.slices 2"),
        ({"data": 4, "fsdp": 2, "slices": 3}, "mesh.data is 4, which is not a multiple of mesh.slices 3"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_an_error(config, message):
    with pytest.raises(ConfigError) as error:
        devices.run_mesh(MeshConfig(**config))
    assert message in str(error.value) and "\n" not in str(error.value)


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
    assert calls == [(("here:1", 2, 1), {"heartbeat_timeout_seconds": 7})]


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
    assert devices.compute_dtype(auto, "tpu") == jnp.bfloat16
    for has, dtype in ((True, jnp.bfloat16), (False, jnp.float32)):
        monkeypatch.setattr(devices, "_cpu_has_bf16", lambda has=has: has)
        assert devices.compute_dtype(auto, "cpu") == dtype
    assert devices.compute_dtype(TrainConfig(dtype="bfloat16"), "cpu") == jnp.bfloat16
