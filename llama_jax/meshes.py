"""The device mesh: its axes, and how one is made from sizes by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.errors import ConfigError

AXES = ("data", "fsdp", "context", "tensor")
ALL_AXES = ("data", "fsdp", "expert", "context", "tensor")  # a mesh has `expert` where its size is above 1


def make_mesh(spec: str | Mapping[str, int] = "", *, devices: Any = None) -> Mesh:
    """Makes a mesh of the four `AXES`, and `expert` if given, from a string such as `"fsdp=4,tensor=2"`.

    Args:
      spec: sizes by axis name; axes that are not named have size 1. One size may be -1, for the remaining
        devices.
      devices: the devices to use; all of `jax.devices()` by default.

    Raises:
      ConfigError: for an unknown axis, a size that is not an integer, or sizes whose product is not the
        number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(spec, len(devices), platform=devices[0].platform)
    names, shape = tuple(sizes), tuple(sizes.values())
    axis_types = (AxisType.Explicit,) * len(names)
    try:
        return jax.make_mesh(shape, names, axis_types=axis_types, devices=devices)
    except NotImplementedError:  # no product of a torus's sides is one of the sizes: sides must be split
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, names, axis_types=axis_types)


def mesh_sizes(spec: str | Mapping[str, int], num_devices: int, *, platform: str = "") -> dict[str, int]:
    """The sizes of the axes, in order, of `make_mesh` on this number of devices.

    Args:
      spec: as for `make_mesh`.
      num_devices: how many devices there are.
      platform: of the devices; for `cpu` the error says how to simulate more.

    Raises:
      ConfigError: as `make_mesh`.
    """
    given = list(_parse_mesh(spec) if isinstance(spec, str) else spec.items())
    for name, size in given:
        if [n for n, _ in given].count(name) > 1:
            raise ConfigError(f"mesh axis {name} is given twice; give each axis one size")
        if isinstance(size, bool) or not isinstance(size, int):
            raise ConfigError(f"mesh axis {name} has size {size!r}; it must be a whole number")
    sizes = dict.fromkeys(ALL_AXES, 1) | dict(given)
    unknown = [name for name in sizes if name not in ALL_AXES]
    if unknown:
        raise ConfigError(f"mesh axis {unknown[0]!r} is unknown; the axes are {', '.join(ALL_AXES)}")
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh axis {name} has size {size}; it must be at least 1, or -1 for the rest")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh axes {' and '.join(free)} are both -1; only one can take what is left")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        there = f"{num_devices} device{'s' * (num_devices != 1)}"
        if free:
            problem = f"{there} cannot be divided by {fixed}"
        elif fixed > num_devices:
            problem = (
                f"it needs {fixed} devices and there {'is' if num_devices == 1 else 'are'} {num_devices}"
            )
        else:
            problem = f"it takes {fixed} of {there}, and must take all (one axis may be -1, for what is left)"
        raise ConfigError(
            f"mesh {shape or 'of size 1'}: {problem}{_how_to_simulate(fixed, num_devices, platform)}"
        )
    return {name: size for name, size in sizes.items() if name in AXES or size > 1}


def _how_to_simulate(needed: int, there: int, platform: str) -> str:
    """On CPUs, how to get more devices."""
    if needed <= there or platform != "cpu":
        return ""
    return (
        f"; CPU devices can be simulated: jax.config.update('jax_num_cpu_devices', {needed}) before JAX is "
        f"first used, or the environment variable XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
    )


def _parse_mesh(spec: str) -> Iterator[tuple[str, int]]:
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, size = part.partition("=")
        try:
            yield name.strip(), int(size)
        except ValueError:
            raise ConfigError(f"mesh part {part!r} is not AXIS=SIZE, as in fsdp=4,tensor=2") from None
