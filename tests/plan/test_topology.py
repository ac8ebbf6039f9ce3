"""Slices by name, and how they are wired."""

from __future__ import annotations

import pytest

from llama_jax.errors import ConfigError
from llama_jax.plan.topology import Topology


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("v5p:4x4x4", "v5p:4x4x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-32", "v5p:2x2x4"),
        ("v5p-128", "v5p:4x4x4"),  # 128 cores, two per chip
        ("v5p-1024", "v5p:8x8x8"),
        ("v5litepod-8", "v5e:2x4"),
        ("v6e-256", "v6e:16x16"),
        ("tpu7x:2x2x1", "tpu7x:2x2x1"),
    ],
)
def test_a_slice_by_sides_or_by_name(text, name):
    assert Topology.parse(text).name == name


@pytest.mark.parametrize("text", ["v5p", "v5p:", "v5p:4x0x4", "v5p-3", "v5p-24", "v9-8", "v5p-0"])
def test_any_other_topology_is_an_error(text):
    with pytest.raises(ConfigError, match=f"topology '{text}' is not KIND:SIDES, as in v5p:4x4x4"):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("v4:4x4x4", (True, True, True)),
        ("tpu7x:4x4x4", (True, True, True)),
        ("v5p:2x2x4", (False, False, False)),  # optical switches close whole cubes alone
        ("v5p:2x2x1", (False, False, False)),
        ("v6e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v6e:8x8", (False, False)),
    ],
)
def test_which_sides_close_to_rings(name, rings):
    assert Topology.parse(name).rings == rings
