"""Time and memory of decoding on a slice, by arithmetic: prefill, a step of one token a row, what fits.

A step reads every weight and the filled part of the cache once, so HBM bandwidth bounds it until the batch is
large; of a mixture, the experts that some token of the batch chooses, in expectation of a random choice. The
formulas are those of the scaling book's chapter on inference (https://jax-ml.github.io/scaling-book/inference);
measurements beside them: docs/planning_arithmetic.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.plan.calibration import calibration
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.flops import attended_keys
from llama_jax.plan.inputs import check_experts
from llama_jax.plan.links import axis_bandwidth
from llama_jax.plan.result import Bound
from llama_jax.plan.topology import Topology
from llama_jax.plan.weights import (
    WEIGHT_DTYPES,
    chosen_share,
    expert_rows,
    layer_bytes,
    layer_matrices,
    norm_size,
    param_shards,
    table_bytes,
    table_size,
)

# Bytes of a number in the cache; 8 bits have an f32 scale for each vector of a head besides.
CACHE_BYTES: Mapping[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "float8_e4m3fn": 1.0,
}
_SCALE_BYTES = 4
_RUN_LENGTH = 256  # `kv_cache.RUN_LENGTH`, which takes JAX

HBM_SHARE = 0.95  # of bandwidth, in long reads
SUM_SECONDS = 2e-6  # latency of a sum over `tensor`, besides its bytes: a microsecond a hop and way
LAUNCH_SECONDS = 5e-5  # of a step's program


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The cost of decoding one batch.

    Attributes:
      topology: its name, such as `v5e:4x4`.
      chips: of all slices.
      mesh: axis sizes by name.
      batch: rows, over all devices.
      prompt: tokens of a prompt.
      context: slots of a row's cache, all of them filled: the last and slowest step.
      weight_bytes: of a chip.
      cache_bytes: of a chip.
      temporary_bytes: working memory of the prefill, of a chip.
      capacity: HBM of a chip that a program may use.
      largest_batch: that fits at this context; 0 if not even the weights fit.
      prefill_seconds: of the batch's prompts.
      step_seconds: of one token for each row.
      weight_seconds: of a step, reading weights.
      cache_seconds: of a step, reading the cache.
      product_seconds: of a step, if products alone bound it.
      exposed_seconds: of a step, waiting for collectives.
      bound: what most of a step's time goes to.
      bandwidth_share: of HBM bandwidth that a step reaches: weights and cache over its time.
    """

    topology: str
    chips: int
    mesh: Mapping[str, int]
    batch: int
    prompt: int
    context: int
    weight_bytes: float
    cache_bytes: float
    temporary_bytes: float
    capacity: float
    largest_batch: int
    prefill_seconds: float
    step_seconds: float
    weight_seconds: float
    cache_seconds: float
    product_seconds: float
    exposed_seconds: float
    bound: Bound
    bandwidth_share: float

    @property
    def fits(self) -> bool:
        return self.weight_bytes + self.cache_bytes + self.temporary_bytes <= self.capacity

    @property
    def tokens_per_second(self) -> float:
        """Of all rows, in steps."""
        return self.batch / self.step_seconds


def plan_decode(
    model: LlamaConfig,
    topology: Topology,
    mesh: Mapping[str, int],
    *,
    batch: int,
    context: int,
    prompt: int | None = None,
    weights: str = "bfloat16",
    cache: str = "bfloat16",
) -> DecodePlan:
    """Plans the decoding of a batch whose rows have `context` tokens.

    `fsdp` shards weights, which are gathered in every step, and rows; `data` shards rows; `tensor` shards
    heads; `context` shards weights and the cache; `expert` shards experts, which stay where they are, and
    rows and other weights as `fsdp` does. A cache of fewer key heads than `tensor` is replicated, as other
    systems do; here that is an error of the mesh.

    Args:
      model: the model.
      topology: the slices.
      mesh: sizes of the four axes, and of `expert` if it is above 1.
      batch: rows, over all devices.
      context: tokens of a row's cache.
      prompt: tokens of a prompt; half of the context by default.
      weights: one of `weights.WEIGHT_DTYPES`.
      cache: a key of `CACHE_BYTES`.

    Raises:
      ConfigError: for a mesh of another number of chips, or whose `expert` does not divide the experts; an
        unknown dtype, or no tokens.
    """
    prompt = max(context // 2, 1) if prompt is None else prompt
    check_experts(model, mesh)
    _check(topology, mesh, batch, prompt, context, weights, cache)
    chip, known = CHIPS[topology.kind], calibration(topology.kind)
    expert = mesh.get("expert", 1)
    row_shards = mesh["data"] * mesh["fsdp"] * expert
    tensor, rows = mesh["tensor"], -(-batch // row_shards)
    dense, experts = (model.num_hidden_layers * size for size in layer_bytes(model, weights))
    table = table_bytes(model, weights)
    chosen = chosen_share(model, min(rows * expert, batch)) * experts / expert
    read = (dense + chosen + table) / tensor  # of the embedding table, a row a token
    held = (dense + experts + table * (2 if model.has_output else 1)) / (param_shards(mesh) * tensor)
    held += 2 * norm_size(model)
    products = sum(matrix.products for matrix in layer_matrices(model))
    used = (model.num_hidden_layers * products + table_size(model)) / tensor
    row_cache = (
        _mean_slots(model, context, mesh) * cache_bytes_per_token(model, cache, tensor) / mesh["context"]
    )
    row_work = _prefill_bytes(model, prompt, tensor, expert)
    bandwidth = HBM_SHARE * chip.hbm_bandwidth

    weight_seconds, cache_seconds = read / bandwidth, rows * row_cache / bandwidth
    product_seconds = 2 * rows * used / (known.products[0] * chip.peak_flops)
    gathered = _gather_seconds(topology, mesh, (dense + table) / tensor, experts / expert / tensor)
    sums = _sum_seconds(model, topology, mesh, rows)
    computed = max(weight_seconds, product_seconds) + cache_seconds
    exposed = max(0.0, gathered - computed) + sums
    step = computed + exposed + LAUNCH_SECONDS
    terms: dict[Bound, float] = {
        "hbm": cache_seconds + (weight_seconds if weight_seconds >= product_seconds else 0.0),
        "mxu": product_seconds if product_seconds > weight_seconds else 0.0,
        "ici": exposed,
        "latency": LAUNCH_SECONDS,
    }
    left = chip.hbm_bytes - held
    return DecodePlan(
        topology=topology.name,
        chips=topology.chips,
        mesh=dict(mesh),
        batch=batch,
        prompt=prompt,
        context=context,
        weight_bytes=held,
        cache_bytes=rows * row_cache,
        temporary_bytes=rows * row_work,
        capacity=chip.hbm_bytes,
        largest_batch=max(int(left / (row_cache + row_work)), 0) * row_shards,
        prefill_seconds=_prefill_seconds(model, topology, mesh, rows, prompt, gathered),
        step_seconds=step,
        weight_seconds=weight_seconds,
        cache_seconds=cache_seconds,
        product_seconds=product_seconds,
        exposed_seconds=exposed,
        bound=max(terms, key=lambda name: terms[name]),
        bandwidth_share=(read + rows * row_cache) / (step * chip.hbm_bandwidth),
    )


def cache_bytes_per_token(model: LlamaConfig, cache: str, tensor: int = 1) -> float:
    """Bytes of a token's keys and values in all layers, on one device."""
    heads = max(model.num_key_value_heads / tensor, 1)
    vector = model.head_dim * CACHE_BYTES[cache] + (_SCALE_BYTES if CACHE_BYTES[cache] == 1 else 0)
    return 2 * model.num_hidden_layers * heads * vector


def _mean_slots(model: LlamaConfig, context: int, mesh: Mapping[str, int]) -> float:
    """Slots of a layer: a sliding window's are a ring, but over `context`."""
    if mesh["context"] > 1:
        return context
    slots = [
        context if (w := kind.window) is None else min(context, w + _RUN_LENGTH) for kind in model.layer_kinds
    ]
    return sum(slots) / len(slots)


def _check(
    topology: Topology,
    mesh: Mapping[str, int],
    batch: int,
    prompt: int,
    context: int,
    weights: str,
    cache: str,
) -> None:
    if math.prod(mesh.values()) != topology.chips:
        raise ConfigError(
            f"mesh of {math.prod(mesh.values())} is not {topology.chips} chips of {topology.name}"
        )
    if weights not in WEIGHT_DTYPES:
        raise ConfigError(f"weights are {weights!r}; use one of {', '.join(WEIGHT_DTYPES)}")
    if cache not in CACHE_BYTES:
        raise ConfigError(f"the cache is {cache!r}; use one of {', '.join(CACHE_BYTES)}")
    if batch < 1 or not 1 <= prompt <= context:
        raise ConfigError(f"batch {batch}, prompt {prompt}, context {context}: give 1 <= prompt <= context")


def _prefill_bytes(model: LlamaConfig, prompt: int, tensor: int, expert: int) -> float:
    """Working memory of a row's prefill in bf16, and its logits."""
    wide = 2 * model.intermediate_size * expert_rows(model, expert) / tensor + 4 * model.hidden_size
    return 2 * prompt * wide + 4 * model.vocab_size / tensor


def _gather_seconds(topology: Topology, mesh: Mapping[str, int], dense: float, experts: float) -> float:
    """Of all weights over `fsdp`, `expert` and `context`; they are read after it as before it.

    Args:
      topology: the slices.
      mesh: sizes of the axes.
      dense: bytes of weights outside of experts, as they are gathered.
      experts: of the experts of a device, which are not gathered over `expert`.
    """
    bandwidth, seconds = axis_bandwidth(topology, mesh), 0.0
    for size, names in ((dense, ("fsdp", "expert", "context")), (experts, ("fsdp", "context"))):
        axes = [axis for axis in names if mesh.get(axis, 1) > 1]
        share = 1 - 1 / math.prod(mesh[axis] for axis in axes)
        seconds += size * share / sum(bandwidth[axis] for axis in axes) if axes else 0.0
    return seconds


def _sum_seconds(model: LlamaConfig, topology: Topology, mesh: Mapping[str, int], tokens: float) -> float:
    """Of what waits for other devices in every layer, for this many tokens of a device.

    The sums over `tensor` after `wo` and `w_down`; over `expert`, tokens to all devices, and outputs back.
    """
    tensor, others = mesh["tensor"], mesh.get("expert", 1) - 1
    bandwidth, seconds = axis_bandwidth(topology, mesh), 0.0
    if tensor > 1:
        moved = 2 * tokens * model.hidden_size * 2 * (tensor - 1) / tensor
        seconds += 2 * (SUM_SECONDS + moved / bandwidth["tensor"])
    if others and model.num_experts:
        moved = others * tokens * (2 * 2 * model.hidden_size + 4 * model.num_experts)
        seconds += SUM_SECONDS + moved / bandwidth["expert"]
    return model.num_hidden_layers * seconds


def _prefill_seconds(
    model: LlamaConfig, topology: Topology, mesh: Mapping[str, int], rows: int, prompt: int, gathered: float
) -> float:
    """Products and causal attention of the prompts; logits of their last tokens alone."""
    known, chip = calibration(topology.kind), CHIPS[topology.kind]
    tokens, tensor = rows * prompt, mesh["tensor"]
    active = sum(matrix.products for matrix in layer_matrices(model))
    products = 2 * tokens * model.num_hidden_layers * active / tensor
    keys = attended_keys(model, prompt, causal=True)  # of all layers
    square = 4 * tokens * keys * model.num_attention_heads * model.head_dim / tensor
    computed = products / (known.products[0] * chip.peak_flops)
    computed += square / (chip.kernel_share * chip.peak_flops)
    return max(computed, gathered) + _sum_seconds(model, topology, mesh, tokens)
