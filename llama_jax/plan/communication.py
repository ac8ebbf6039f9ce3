"""Collectives of a training step, by arithmetic: bytes on each mesh axis, time on its links, what is exposed.

Weights are gathered over `fsdp` and `context` layer by layer in every microbatch, in the forward and again in
the backward pass, and their gradients reduce-scattered. Over `expert` weights other than experts' go too, and
tokens (`ops.experts`). Sums over `data` cross once a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from llama_jax.plan.calibration import calibration
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.compute import ATTENTION, FEED_FORWARD, PROJECTIONS
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.links import axis_bandwidth
from llama_jax.plan.memory import SAVED, trained_per_chip
from llama_jax.plan.result import Part, Traffic
from llama_jax.plan.weights import dense_and_experts, layer_matrices, layer_size, param_shards, table_size

# Of a layer's residual stream, which `tensor` shards by tokens: the inputs of attention and of the
# feed-forward layer are gathered in both passes, and so are the gradients of their results; their results are
# scattered, and the gradients of their inputs.
_TENSOR_GATHERS, _TENSOR_SCATTERS = 6, 4
_TENSOR_HIDDEN = 0.5  # beside the products of weights that need no gathered array
_FIRST = ("wq", "wk", "wv")  # gathered before a layer's first product: nothing of the layer can hide it


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Collectives of one kind over some axes.

    Attributes:
      kind: as in `collectives.COLLECTIVES`.
      axes: of the mesh, joined by commas.
      bytes: received by each chip in a step.
      hidden: the share that may run beside computation.
      network: `ici` or `dcn`.
    """

    kind: str
    axes: str
    bytes: float
    hidden: float
    network: Literal["ici", "dcn"] = "ici"


def _share(size: int) -> float:
    return (size - 1) / size


def weight_transfers(inputs: StepInputs) -> list[Transfer]:
    """Gathers of weights over `fsdp`, `expert` and `context`, and scatters of their gradients."""
    model, mesh = inputs.model, inputs.mesh
    if param_shards(mesh) == 1:
        return []
    axes, share = _axes(mesh, "fsdp", "expert", "context"), _share(param_shards(mesh)) / mesh["tensor"]
    dense, experts = dense_and_experts(model)
    sent = {axes: dense * share}  # numbers of a layer
    if param_shards(mesh) > inputs.expert:
        own = _axes(mesh, "fsdp", "context")
        part = _share(param_shards(mesh) // inputs.expert) / mesh["tensor"]
        sent[own] = sent.get(own, 0) + experts / inputs.expert * part
    layers = model.num_hidden_layers * inputs.accumulation
    layer, table = layer_size(model), table_size(model)
    tables = 2 if model.has_output else 1
    first = sum(matrix.size for matrix in layer_matrices(model) if matrix.name in _FIRST) / layer
    last = max(matrix.size for matrix in layer_matrices(model)) / layer
    passes = 3 if inputs.reference else 2
    gathers = passes * layers * inputs.gathered_bytes
    table_gathers = tables * inputs.accumulation * table * inputs.compute_bytes * share
    found = [
        *(Transfer("all-gather", over, gathers * n, 1 - (first + last) / 2) for over, n in sent.items()),
        Transfer("all-gather", axes, table_gathers, 0.0),
    ]
    if not inputs.frozen:
        table_scatters = tables * inputs.accumulation * table * 4 * share
        found += [
            *(Transfer("reduce-scatter", over, 4 * layers * n, 1 - first) for over, n in sent.items()),
            Transfer("reduce-scatter", axes, table_scatters, 0.0),
        ]
    return found


def _axes(mesh: Mapping[str, int], *names: str) -> str:
    return ",".join(axis for axis in names if mesh.get(axis, 1) > 1)


def expert_transfers(inputs: StepInputs) -> list[Transfer]:
    """Tokens and their routers' logits on their way to all devices of `expert`, and outputs back."""
    model, others = inputs.model, inputs.expert - 1
    if not (others and model.num_experts):
        return []
    layers = model.num_hidden_layers * inputs.accumulation
    outputs = inputs.micro_tokens * model.hidden_size * inputs.compute_bytes
    tokens = outputs + 4 * inputs.micro_tokens * model.num_experts
    outputs /= inputs.mesh["tensor"]  # scattered over it first
    again = inputs.remat != "none"
    forward = 1 + inputs.reference
    return [
        Transfer("all-gather", "expert", layers * others * ((forward + again) * tokens + outputs), 0.0),
        Transfer("reduce-scatter", "expert", layers * others * (tokens + forward * outputs), 0.0),
    ]


def activation_transfers(inputs: StepInputs) -> list[Transfer]:
    """Activations over `tensor`; keys, values and their gradients over `context`."""
    model, mesh = inputs.model, inputs.mesh
    layers = model.num_hidden_layers * inputs.accumulation
    found = []
    if mesh["tensor"] > 1:
        array = (
            layers * inputs.micro_tokens * model.hidden_size * inputs.compute_bytes * _share(mesh["tensor"])
        )
        gathers, scatters = _TENSOR_GATHERS, _TENSOR_SCATTERS
        if inputs.reference:
            gathers, scatters = gathers + 2, scatters + 2
        if model.num_experts:  # the outputs for all tokens of `expert`, and the gradients of those
            gathers, scatters = gathers + inputs.expert - 1, scatters + inputs.expert - 1
        found += [
            Transfer("all-gather", "tensor", gathers * array, _TENSOR_HIDDEN),
            Transfer("reduce-scatter", "tensor", scatters * array, _TENSOR_HIDDEN),
        ]
    if mesh["context"] > 1:
        windows = [w for w, _ in model.layer_kinds if w is not None and w < inputs.seq_len]
        if not windows:
            found.append(Transfer("collective-permute", "context", layers * _ring_bytes(inputs), 1.0))
            return found
        # Without a ring: what each window reaches from neighbors; of full layers all keys, whose gradients
        # XLA sums whole.
        others = inputs.seq_len * _share(mesh["context"])
        reached = _key_bytes(inputs, sum(min(w - 1, others) for w in windows))
        gathered = _key_bytes(inputs, (len(model.layer_kinds) - len(windows)) * others)
        reads = 1 + (inputs.remat != "none") + inputs.reference
        found.append(Transfer("collective-permute", "context", (reads + 1) * reached, 0.0))
        if gathered:
            found.append(Transfer("all-gather", "context", reads * gathered, 0.0))
            found.append(Transfer("all-reduce", "context", 2 * gathered, 0.0))
    return found


def _key_bytes(inputs: StepInputs, tokens: float) -> float:
    """Bytes of the keys and values of so many tokens of each row, of all microbatches."""
    model, rows = inputs.model, inputs.accumulation * inputs.micro_rows
    numbers = 2 * model.num_key_value_heads * model.head_dim / inputs.mesh["tensor"]
    return rows * tokens * numbers * inputs.compute_bytes


def _ring_bytes(inputs: StepInputs) -> float:
    """Keys and values of a layer on their way around the ring, and their f32 gradients."""
    model, steps = inputs.model, inputs.mesh["context"] - 1
    numbers = 2 * model.num_key_value_heads * model.head_dim / inputs.mesh["tensor"] * inputs.micro_tokens
    forward = steps * numbers * inputs.compute_bytes
    passes = 2 + ("attention" not in SAVED[inputs.remat]) + inputs.reference
    return passes * forward + (steps + 1) * numbers * 4


def gradient_transfers(inputs: StepInputs) -> list[Transfer]:
    """The sum of gradients over `data`, once a step: within a slice, and between slices."""
    slices, shard = inputs.topology.slices, trained_per_chip(inputs) * inputs.gradient_bytes
    inside, found = inputs.mesh["data"] // slices, []
    # `ops.int8_sum` is an all-to-all and an all-gather, of which each moves half the bytes of an all-reduce.
    kinds = ("all-to-all", "all-gather") if inputs.has_residual else ("all-reduce",)
    for kind in kinds:
        moved = 2 * shard / len(kinds)
        if inside > 1:
            found.append(Transfer(kind, "data", moved * _share(inside), 0.0))
        if slices > 1:
            found.append(Transfer(kind, "data", moved * _share(slices), 0.0, "dcn"))
    return found


def plan_traffic(inputs: StepInputs, parts: Sequence[Part]) -> tuple[Traffic, ...]:
    """The collectives of a step on one chip.

    What may be hidden is, up to the time of the computation that it runs beside: the ring's permutes beside
    the attention kernels, collectives of weights beside products.

    Args:
      inputs: the step.
      parts: of its computation.
    """
    known, chip = calibration(inputs.topology.kind), CHIPS[inputs.topology.kind]
    bandwidth = axis_bandwidth(inputs.topology, inputs.mesh)
    seconds = {part.name: part.seconds for part in parts}
    room = {"collective-permute": seconds[ATTENTION], "": seconds[FEED_FORWARD] + seconds[PROJECTIONS]}
    if not known.overlaps:
        room = dict.fromkeys(room, 0.0)
    timed = []
    activations = activation_transfers(inputs) + expert_transfers(inputs)
    for one in weight_transfers(inputs) + activations + gradient_transfers(inputs):
        links = sum(bandwidth[axis] for axis in one.axes.split(","))
        if one.network == "dcn":
            links = chip.dcn_bytes / chip.devices
        if one.kind == "collective-permute":
            links /= 2  # to one neighbor alone
        timed.append((one, one.bytes / links, one.kind if one.kind in room else ""))
    wanted = {key: sum(busy * one.hidden for one, busy, its in timed if its == key) for key in room}
    share = {key: min(1.0, room[key] / wanted[key]) if wanted[key] else 0.0 for key in room}
    return tuple(
        Traffic(
            one.kind,
            one.axes,
            one.network,
            one.bytes * chip.devices,
            busy,
            busy * (1 - one.hidden * share[key]),
        )
        for one, busy, key in timed
    )
