"""What a compiled step computes: FLOPs of each instruction, its time, and its part of the step."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from llama_jax.config import LlamaConfig
from llama_jax.plan import hlo
from llama_jax.plan.chips import Chip
from llama_jax.plan.flops import attended_keys
from llama_jax.plan.hlo import Instruction, Module
from llama_jax.plan.result import Bound, Part

# Number of [T, S] x [S, H] products in an attention kernel, by a part of its name: of `ops.splash_attention`,
# which state their FLOPs, and of JAX's splash attention, where one that computes all gradients has one less.
KERNEL_PRODUCTS = {"forward": 2, "gradient": 5, "fwd": 2, "dq": 3, "dkv": 4}
FUSED_BACKWARD_PRODUCTS = 5
# XLA's kernel for `jax.lax.ragged_dot`, and the share of peak that it is taken at: an assumption.
_GROUPED = re.compile(r"ragged-dot-none")
GROUPED_SHARE = 0.75
_CONTROL = re.compile(
    r"while|body|cond|branch_\d+_fun|eval_jaxpr|closed_call|checkpoint|shard_map|(jit|jvp|transpose|vmap)\(.*"
)
ATTENTION, FEED_FORWARD, PROJECTIONS = "attention kernels", "feed-forward products", "attention projections"
HEAD, OPTIMIZER, ELEMENTWISE = "output projection and loss", "optimizer", "elementwise"


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that computes, on one device.

    Attributes:
      instruction: as the program has it.
      times: how often a step runs it.
      seconds: of one execution.
      flops: of one execution.
      part: the part of the step that it belongs to.
    """

    instruction: Instruction
    times: int
    seconds: float
    flops: float
    part: str


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes by which a product is told from another, on one device.

    Attributes:
      hidden: D.
      feed_forward: F over `tensor`.
      vocab: V over `tensor`.
      attended: the keys that a token attends to, over those of causal attention without windows; the mean of
        the layers.
    """

    hidden: int
    feed_forward: int
    vocab: int
    attended: float = 1.0

    @classmethod
    def of(cls, model: LlamaConfig, tensor: int, seq_len: int | None = None) -> Shapes:
        """Those of a model; `seq_len` T is needed for one with sliding windows."""
        attended = 1.0
        if seq_len is not None:
            keys = attended_keys(model, seq_len, causal=True) / model.num_hidden_layers
            attended = 2 * keys / seq_len
        sizes = model.intermediate_size // tensor, model.vocab_size // tensor
        return cls(model.hidden_size, *sizes, attended=attended)


def operations(module: Module, shapes: Shapes, chip: Chip, *, balanced: bool) -> list[Operation]:
    """Every executed instruction that takes time, but for collectives.

    Attention kernels and the products of experts, for which the compiler has no estimate, take their FLOPs
    over the share of peak that they reach; all others the compiler's cycles.

    Args:
      module: the program.
      shapes: of the model on one device.
      chip: that it is compiled for.
      balanced: whether the shards of a sequence have equal work in causal attention; otherwise the last
        shard's is taken, which has the most.
    """
    peak = chip.peak_flops / chip.devices
    fused_backward = not any(_kernel(one) == "dq" for one, _ in hlo.executed(module))
    found = []
    for instructions, times in hlo.blocks(module):
        for one in instructions:
            if kernel := _kernel(one):
                if (stated := _stated_flops(one)) is not None:
                    flops = stated
                else:
                    fused = kernel == "dkv" and fused_backward
                    flops = kernel_flops(one, balanced) * shapes.attended
                    flops *= FUSED_BACKWARD_PRODUCTS if fused else KERNEL_PRODUCTS[kernel]
                seconds = flops / (chip.kernel_share * peak)
                found.append(Operation(one, times, seconds, flops, ATTENTION))
            elif _GROUPED.match(one.name):
                if (stated := _stated_flops(one)) is None:
                    raise ValueError(f"kernel {one.name} states no FLOPs")
                flops = stated
                found.append(Operation(one, times, flops / (GROUPED_SHARE * peak), flops, FEED_FORWARD))
            elif cycles := one.cycles:
                flops = product_flops(module, one)
                part = _part(module, one, shapes, flops, in_loop=times > 1)
                found.append(Operation(one, times, cycles / chip.clock_hz, flops, part))
    return found


def _stated_flops(one: Instruction) -> float | None:
    """The FLOPs that a kernel states (`jax.experimental.pallas.CostEstimate`), which know its mask."""
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', one.rest)
    return float(found[1]) if found and int(found[1]) else None


def _kernel(one: Instruction) -> str:
    """Which attention kernel an instruction is; empty for any other."""
    if one.opcode != "custom-call" or "splash" not in one.name:
        return ""
    return next((part for part in KERNEL_PRODUCTS if re.search(rf"_{part}(_|\.|$)", one.name)), "")


def kernel_flops(one: Instruction, balanced: bool) -> float:
    """FLOPs of one [T, S] x [S, H] product of a kernel, of what the causal mask leaves.

    The first two floating-point operands are q [..., N, T, H] and k [..., K, S, H].
    """
    operands = one.rest.partition("operand_layout_constraints=")[2].partition("_attributes=")[0]
    q, k = [dims for dtype, dims in hlo.arrays(operands) if dtype in ("bf16", "f32") and len(dims) > 2][:2]
    queries, keys = q[-2], k[-2]
    if balanced:  # in a ring only a device's own keys are masked: of others it reads those that it needs
        share = 0.5 if queries == keys else 1.0
    else:
        shards = keys / queries
        share = (2 * shards - 1) / (2 * shards)
    return 2 * math.prod(q) * keys * share


def product_flops(module: Module, one: Instruction) -> float:
    """FLOPs of the matrix products in an instruction, and in what it calls."""
    return sum(_dot_flops(dot, by_name) for dot, by_name in _dots(module, one, {}))


def _dots(
    module: Module, one: Instruction, by_name: dict[str, Instruction]
) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
    if one.opcode in ("convolution", "dot"):
        yield one, by_name
    if one.opcode == "fusion":
        for name in one.called("calls"):
            inside = {each.name: each for each in module.computations[name]}
            for each in inside.values():
                yield from _dots(module, each, inside)


def _dot_flops(dot: Instruction, by_name: dict[str, Instruction]) -> float:
    """2 x the elements of the result x those that are summed for each."""
    operands = [by_name[name] for name in re.findall(r"%([\w.-]+)", dot.rest)[:2] if name in by_name]
    if len(operands) < 2 or not all(each.arrays for each in (dot, *operands)):
        return 0.0
    out = math.prod(dot.arrays[0][1])
    left, right = (each.arrays[0][1] for each in operands)
    if labels := re.search(r"dim_labels=(\w+)_(\w+)->\w+", dot.rest):
        summed = right[labels[2].index("i")]
        window = re.search(r"window=\{size=([\dx]+)", dot.rest)
        if window and "lhs_dilate" not in dot.rest:
            # A dimension of products side by side is a window over padding, with one product in each place.
            for place, size in enumerate(window[1].split("x")):
                summed *= min(int(size), left[labels[1].index(str(place))])
        return 2.0 * out * summed
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
    return 2.0 * out * math.prod(left[int(n)] for n in found[1].split(",") if n) if found else 0.0


def _part(module: Module, one: Instruction, shapes: Shapes, flops: float, *, in_loop: bool) -> str:
    """The part of a step that an instruction belongs to, by the scope that it was traced in, and by sizes."""
    found = re.search(r'op_name="([^"]*)"', one.rest)
    scope = found[1] if found else ""
    if flops:
        if "feed_forward" in scope:
            return FEED_FORWARD
        if "attention" in scope:
            return PROJECTIONS
        sizes = {size for dot, _ in _dots(module, one, {}) for _, dims in dot.arrays for size in dims}
        return FEED_FORWARD if shapes.feed_forward in sizes and shapes.vocab not in sizes else HEAD
    if shapes.vocab != shapes.hidden and any(shapes.vocab in dims for _, dims in one.arrays) and in_loop:
        return HEAD
    return ELEMENTWISE if in_loop or re.search(r"while|jvp|transpose\(", scope) else OPTIMIZER


def source(one: Instruction) -> str:
    """Where an instruction was traced: its scopes, without those of loops, transformations and calls."""
    found = re.search(r'op_name="([^"]*)"', one.rest)
    names = found[1].partition(";")[0].split("/") if found else []
    kept = [name for name in names if not _CONTROL.fullmatch(name)]
    backward = "backward " if found and "transpose(" in found[1] else ""
    return backward + "/".join(kept)


def summed(found: list[Operation], chip: Chip) -> tuple[Part, ...]:
    """The parts of the computation of one chip, most expensive first."""
    peak = chip.peak_flops / chip.devices
    totals: dict[str, list[float]] = {}
    for one in found:
        total = totals.setdefault(one.part, [0.0, 0.0])
        total[0] += one.seconds * one.times
        total[1] += one.flops * one.times
    parts = []
    for name, (seconds, flops) in sorted(totals.items(), key=lambda item: -item[1][0]):
        bound: Bound = "mxu" if flops > 0.5 * seconds * peak or name == ATTENTION else "hbm"
        parts.append(Part(name, seconds, flops * chip.devices, bound=bound))
    return tuple(parts)
