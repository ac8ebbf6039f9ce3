"""Seconds of collectives on the links of their own axes: the scaling book's closed forms."""

from __future__ import annotations

import itertools

import pytest

from llama_jax.plan.chips import CHIPS
from llama_jax.plan.collectives import Collective, Groups
from llama_jax.plan.topology import Topology
from llama_jax.plan.wiring import DCN, DIE, Use, Wiring

SIZE = 1 << 30
ONE_WAY = CHIPS["v5p"].link_bytes / 2


def wiring(name: str, slices: int = 1) -> Wiring:
    """Devices in the order of their coordinates, the last side fastest."""
    topology = Topology(Topology.parse(name).kind, Topology.parse(name).sides, slices)
    cores = CHIPS[topology.kind].devices
    places = itertools.product(range(slices), *map(range, topology.sides), range(cores))
    return Wiring(topology, list(places))


def use(name: str, kind: str, group: tuple[int, ...], size: int = SIZE) -> Use:
    one = Collective(kind, "bf16", size, len(group), 1, False, groups=(group,))
    return wiring(name).use(one)


def permute(name: str, pairs: Groups) -> Use:
    return wiring(name).use(Collective("collective-permute", "bf16", SIZE, None, 1, True, pairs=pairs))


def test_a_ring_gathers_in_both_directions_and_a_chain_in_one():
    ring, chain = use("v5p:4x4x4", "all-gather", (0, 1, 2, 3)), use("v5p:4x2x4", "all-gather", (0, 1, 2, 3))
    assert ring == Use(frozenset([2]), pytest.approx(SIZE * 3 / 4 / (2 * ONE_WAY)))
    assert chain.seconds == pytest.approx(2 * ring.seconds)
    half = use("v5p:4x4x4", "all-gather", (0, 1))  # of a ring, a chain
    assert half.seconds == pytest.approx(SIZE / 2 / ONE_WAY)


def test_each_axis_has_its_own_sides_and_all_of_them_add_up():
    first = use("v5p:4x4x4", "all-gather", (0, 16, 32, 48))
    assert first.sides == {0}
    everything = use("v5p:4x4x4", "all-gather", tuple(range(64)))
    assert everything == Use(frozenset([0, 1, 2]), pytest.approx(SIZE * 63 / 64 / (6 * ONE_WAY)))


def test_an_all_reduce_is_a_scatter_and_a_gather():
    group = (0, 1, 2, 3)
    seconds = [use("v5p:4x4x4", k, group).seconds for k in ("all-reduce", "reduce-scatter", "all-gather")]
    assert seconds[0] == pytest.approx(seconds[1] + seconds[2])


def test_an_all_to_all_over_a_ring_takes_a_quarter_of_a_gather_of_as_much():
    """The array of the gather is what all devices hold together."""
    gather = use("v6e:16x16", "all-gather", tuple(range(16)), 16 * SIZE).seconds * 16 / 15
    assert use("v6e:16x16", "all-to-all", tuple(range(16))).seconds == pytest.approx(gather / 4)


def test_devices_that_are_not_neighbours_share_the_links_between_them():
    near, far = use("v5p:4x4x4", "all-gather", (0, 1)), use("v5p:4x4x4", "all-gather", (0, 2))
    assert far.seconds == pytest.approx(2 * near.seconds * 0.5)  # both ways around the ring, half of it each


def test_small_collectives_take_a_microsecond_a_hop():
    assert use("v5p:4x4x4", "all-gather", (0, 1, 2, 3), 8).seconds == pytest.approx(2e-6)
    assert use("v5p:2x2x4", "all-gather", (0, 1, 2, 3), 8).seconds == pytest.approx(3e-6)


def test_a_permute_takes_the_time_of_its_busiest_link():
    ring = tuple((n, (n + 1) % 4) for n in range(4))
    assert permute("v5p:4x4x4", ring) == Use(frozenset([2]), pytest.approx(SIZE / ONE_WAY))
    assert permute("v5p:2x2x4", ring).seconds == pytest.approx(SIZE / ONE_WAY)  # back on the free direction
    assert permute("v5p:2x2x4", ((0, 2), (1, 3))).seconds == pytest.approx(2 * SIZE / ONE_WAY)


def test_the_devices_of_a_chip_share_its_links():
    across = use("tpu7x:4x4x4", "all-gather", (0, 2, 4, 6))  # the other devices do the same
    both = use("tpu7x:4x4x4", "all-gather", tuple(range(8)))
    assert across.seconds == pytest.approx(2 * both.seconds)
    assert use("tpu7x:4x4x4", "all-gather", (0, 1)).sides == {DIE}


def test_other_slices_are_on_the_data_center_network():
    two = wiring("v5p:2x2x1", slices=2)
    one = Collective("all-reduce", "f32", SIZE, 2, 1, False, groups=((0, 4),))
    assert two.use(one) == two.between_slices(SIZE)
    assert two.use(one) == Use(frozenset([DCN]), pytest.approx(SIZE / CHIPS["v5p"].dcn_bytes))
