"""Meshes of a run, slices outermost; processes found or not; what `auto` means on a platform."""

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
    """What a mesh needs to know of a device of a pod slice."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "a chip"


def pod(slices: int, chips: int) -> list[Any]:
    """The devices of several slices, two chips a process, in an order that mixes the slices."""
    chips_in_order = [Chip(i, i // chips, i // 2) for i in range(slices * chips)]
    return chips_in_order[1::2] + chips_in_order[::2]


def test_a_run_takes_every_device_and_one_needs_no_mesh():
    assert dict(devices.run_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    mesh = devices.run_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert devices.run_mesh(MeshConfig(), jax.devices()[:1]) is None


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 1, "tensor": 2}, {"data": -1, "fsdp": 2}]
)
def test_data_goes_over_the_slices_first(sizes):
    mesh = devices.run_mesh(MeshConfig(**sizes, slices=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    half = len(ids) // 2
    assert set(ids[:half].ravel()) == {0, 1, 2, 3} and set(ids[half:].ravel()) == {4, 5, 6, 7}


def test_slices_are_told_by_the_devices_that_know_theirs(monkeypatch):
    monkeypatch.setattr(devices, "Mesh", lambda grid, *_, **__: grid)  # a real one takes no made-up device
    grid = devices.run_mesh(MeshConfig(data=4, fsdp=2, tensor=2, slices=2), pod(2, 8))
    assert grid.shape == (4, 2, 1, 2)
    slices = np.vectorize(lambda chip: chip.slice_index)(grid)
    assert (slices[:2] == 0).all() and (slices[2:] == 1).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fsdp": 3}, "needs 3 devices and there are 8; set mesh.data, mesh.fsdp"),
        ({"fsdp": -1, "tensor": 3}, "needs 3 devices and there are 8; set mesh.data"),
        ({"data": 1, "slices": 2}, "mesh.data is 1, not a multiple of mesh.slices 2"),
        ({"data": 4, "fsdp": 2, "slices": 3}, "mesh.data is 4, not a multiple of mesh.slices 3"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(config, message):
    with pytest.raises(ConfigError) as error:
        devices.run_mesh(MeshConfig(**config))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_gpus_host_is_no_slice():
    """JAX gives GPUs of each host a slice index of their own; any axis may cross hosts all the same."""
    gpus = sorted(pod(2, 8), key=lambda chip: chip.id)
    mesh = devices.run_mesh(MeshConfig(fsdp=8, tensor=2), gpus)
    assert mesh.axis_sizes == (1, 8, 1, 2)
    assert [chip.id for chip in mesh.devices.flat] == list(range(16))


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (1, "mesh.slices is 1 and the devices are of 2 slices; set mesh.slices to 2"),
        (4, "mesh.slices is 4: Number of slices 2 must equal"),
    ],
)
def test_slices_that_are_not_there(slices, message):
    chips = [dataclasses.replace(chip, platform="tpu") for chip in pod(2, 8)]
    with pytest.raises(ConfigError, match=message):
        devices.run_mesh(MeshConfig(data=4, fsdp=4, slices=slices), chips)


def test_processes_are_joined_by_address_or_not_at_all(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **rest: calls.append((args, rest)))
    devices.join_processes(DistributedConfig())
    assert calls == []
    devices.join_processes(
        DistributedConfig(coordinator="here:1", num_processes=2, process_id=1, heartbeat_seconds=7)
    )
    assert calls == [(("here:1", 2, 1), {"heartbeat_timeout_seconds": 7})]


def test_processes_that_cannot_be_reached_are_one_line(monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nand a page more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError) as error:
        devices.join_processes(DistributedConfig(coordinator="nowhere:1", num_processes=2, process_id=0))
    assert str(error.value).startswith(
        "cannot join the other processes at nowhere:1: DEADLINE_EXCEEDED: no answer;"
    )
    assert "\n" not in str(error.value)


def test_auto_suits_the_platform(monkeypatch):
    auto = TrainConfig()
    assert devices.attention_backend(auto, "tpu") == "splash"
    assert devices.attention_backend(auto, "cpu") == devices.attention_backend(auto, "gpu") == "blockwise"
    assert devices.attention_backend(TrainConfig(attention="xla"), "tpu") == "xla"
    assert devices.compute_dtype(auto, "tpu") == jnp.bfloat16
    for has, dtype in ((True, jnp.bfloat16), (False, jnp.float32)):
        monkeypatch.setattr(devices, "_cpu_has_bf16", lambda has=has: has)
        assert devices.compute_dtype(auto, "cpu") == dtype
    assert devices.compute_dtype(TrainConfig(dtype="bfloat16"), "cpu") == jnp.bfloat16
