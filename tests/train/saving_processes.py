"""What the processes of `test_checkpoint.py` run; each returns its exit status."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from llama_jax.errors import CheckpointError
from llama_jax.meshes import make_mesh
from tests.train.small_runs import abstract_state, checkpoints_of, make_state, one_device, same

_NEW_NAMESPACES = 0x10000000 | 0x00020000  # CLONE_NEWUSER | CLONE_NEWNS


def save_until_killed(arguments: Sequence[str]) -> int:
    """Resumes a run, and saves a step after the other, each after printing the number of the last."""
    with checkpoints_of(Path(arguments[0]), keep=2) as checkpoints:
        restored = checkpoints.restore(abstract_state(one_device()))
        for step in range(restored.step + 1 if restored else 1, 10_000):
            checkpoints.save(step, make_state(one_device(), step), {"batch": step})
            print(step, flush=True)
    return 0


def mount_small_disk(folder: Path) -> None:
    """Mounts a file system of 1 MB, which this process alone sees; before it has threads."""
    libc = ctypes.CDLL(None, use_errno=True)
    users = {"uid": os.getuid(), "gid": os.getgid()}
    arguments = (b"none", bytes(folder), b"tmpfs", 0, b"size=1m")
    if libc.unshare(_NEW_NAMESPACES):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    for kind, number in users.items():
        Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
    if libc.mount(*arguments):
        raise OSError(ctypes.get_errno(), "mount")


def fill_a_small_disk(arguments: Sequence[str]) -> int:
    """Saves until the disk is full; prints the error, and which step is restored and whether it is whole."""
    folder = Path(arguments[0])
    mount_small_disk(folder)
    with checkpoints_of(folder) as checkpoints:
        try:
            for step in range(1, 100):
                checkpoints.save(step, make_state(one_device(), step), {})
        except CheckpointError as error:
            print(error)
    with checkpoints_of(folder) as checkpoints:
        restored = checkpoints.restore(abstract_state(one_device()))
    assert restored is not None
    print(restored.step, same(restored.state, make_state(one_device(), restored.step)))
    return 0


def save_as_one_of_two(arguments: Sequence[str]) -> int:
    """One of two processes saves, restores after damage to the other's files, and saves again."""
    folder, address, index = Path(arguments[0]), arguments[1], int(arguments[2])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, index)
    assert jax.process_index() == index
    mesh = make_mesh("fsdp=2,tensor=2")
    warnings: list[str] = []
    with checkpoints_of(folder, warnings.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(mesh, step), {"process": index})
        checkpoints.wait()
        if index == 0:
            path, *_ = sorted((folder / "checkpoints/2/params/ocdbt.process_1/d").iterdir())
            data = bytearray(path.read_bytes())
            data[0] ^= 1
            path.write_bytes(data)
        restored = checkpoints.restore(abstract_state(mesh))
        assert restored is not None
        assert restored.step == 1 and "ocdbt.process_1" in warnings[0], warnings
        assert restored.data_states == [{"process": 0}, {"process": 1}]
        leaves = zip(jax.tree.leaves(make_state(mesh, 1)), jax.tree.leaves(restored.state), strict=True)
        for saved, found in leaves:
            for a, b in zip(saved.addressable_shards, found.addressable_shards, strict=True):
                assert a.index == b.index and bool((a.data == b.data).all())
        checkpoints.save(3, make_state(mesh, 3), {"process": index})
    return 0
