"""Time of a training step's computation, by arithmetic: each part by the roofline that binds it.

FLOPs are those of the products and attention kernels that the compiled step runs: forward, backward, and what
the remat policy recomputes. Bytes are those that elementwise passes read and write in HBM.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from llama_jax.plan.calibration import ADAPTED, calibration
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.flops import attended_keys
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import SAVED, saved_elements, trained_per_chip
from llama_jax.plan.result import Part
from llama_jax.plan.weights import expert_rows, layer_matrices, layer_size, table_size

# Parts of the computation, by the names that compiled plans give them too.
ATTENTION, FEED_FORWARD, PROJECTIONS = "attention kernels", "feed-forward products", "attention projections"

# Products of a tile of queries by one of keys: in the forward kernel, and in the backward one.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
# Passes over [tokens, D] arrays in a layer, in bytes of the compute dtype: norms, rotary embedding, residual
# sums; forward, and backward. The same over [tokens, F] of SwiGLU.
_NARROW = {"forward": 10, "backward": 16}
_WIDE = {"forward": 3, "backward": 6}
_SAVED_PASSES = 2  # a saved tensor is copied into its stack, and out of it
_TILE = 512  # side of an attention kernel's tile: `ops.splash_tiles`
_TILE_OVERHEAD = 1 / 24  # of such a tile, over its products
_LOGIT_BYTES = 24  # of passes over a chunk's logits, per logit
_STEP_PASSES = 9  # AdamW in f32: reads p, m, v, g and the norm's g; writes p, m, v; scales
_ACCUMULATION_PASSES = 3


def attention_block(inputs: StepInputs) -> int:
    """The side of an attention kernel's tile."""
    return math.gcd(_chunk(inputs), _TILE)


def _chunk(inputs: StepInputs) -> int:
    """Tokens of a kernel's row; in zig-zag order over `context`, those of one of a device's two parts."""
    chunks = inputs.mesh["context"] * (2 if inputs.mesh["context"] > 1 else 1)
    return max(-(-inputs.seq_len // chunks // 128), 1) * 128


def tile_work(inputs: StepInputs) -> float:
    """Time of the kernels' tiles over that of whole rows in tiles of 512.

    At those the kernels' share of peak is taken. Of tiles on the diagonal, half is masked; of those at both
    ends of a window too.
    """
    block = attention_block(inputs)

    def work(block: int, span: int = inputs.seq_len) -> float:
        return (1 + block / span) * (1 + _TILE_OVERHEAD * (_TILE / block) ** 2)

    windows = [w for w, _ in inputs.model.layer_kinds if w is not None and w < inputs.seq_len]
    plain, found = len(inputs.model.layer_kinds) - len(windows), 0.0
    if plain:
        found += plain * inputs.seq_len / 2 * work(block)
    for window in windows:
        found += window * (1 - window / (2 * inputs.seq_len)) * work(block, window)
    return found / attended_keys(inputs.model, inputs.seq_len, causal=True) / work(_TILE)


def layer_product_flops(inputs: StepInputs, names: Collection[str]) -> tuple[float, float]:
    """FLOPs of a layer's products with these matrices on a device in a microbatch: forward, backward.

    What the backward pass recomputes is counted with it.
    """
    recomputed = set() if inputs.remat == "none" else _recomputed(inputs.remat)
    forward = backward = 0.0
    for matrix in layer_matrices(inputs.model):
        if matrix.name in names:
            product = 2 * inputs.micro_tokens * matrix.products / inputs.mesh["tensor"]
            forward += product
            backward += product * (1 if inputs.frozen else 2) + product * (matrix.saved in recomputed)
    return forward, backward


def _recomputed(remat: str) -> set[str]:
    """The results of products that the backward pass computes again."""
    return {"q", "k", "v", "residual", "gate", "up"} - set(SAVED[remat])


def layer_attention_flops(inputs: StepInputs) -> tuple[float, float]:
    """FLOPs of a layer's attention kernels on a device in a microbatch: forward, backward; masked ones not.

    The mean of layers with and without a window. The ring over `context` has equal work on every device
    (`ops.ring_attention`).
    """
    model = inputs.model
    heads = model.num_attention_heads / inputs.mesh["tensor"]
    keys = attended_keys(model, inputs.seq_len, causal=True) / model.num_hidden_layers
    product = 2 * inputs.micro_tokens * keys * heads * model.head_dim
    backward = inputs.attention_backward or BACKWARD_PRODUCTS
    again = FORWARD_PRODUCTS if "attention" not in SAVED[inputs.remat] else 0
    return FORWARD_PRODUCTS * product, (backward + again) * product


def layer_bytes(inputs: StepInputs) -> tuple[float, float]:
    """HBM bytes of one layer's elementwise passes on a device in a microbatch: forward, backward."""
    model, size = inputs.model, inputs.compute_bytes
    tensor = inputs.mesh["tensor"]
    narrow = model.hidden_size / tensor
    wide = model.intermediate_size / tensor * expert_rows(model, inputs.expert)
    saved = saved_elements(model, inputs.remat, tensor, inputs.expert)
    passes = {
        name: _NARROW[name] * narrow + _WIDE[name] * wide + _SAVED_PASSES * saved
        for name in ("forward", "backward")
    }
    again = 0.0 if inputs.remat == "none" else 6 * narrow
    return (
        inputs.micro_tokens * size * passes["forward"],
        inputs.micro_tokens * size * (passes["backward"] + again),
    )


def products_share(inputs: StepInputs) -> float:
    """Share of peak that matrix products reach."""
    known = calibration(inputs.topology.kind)
    share = known.products[inputs.scoped_vmem_kib > 0]
    return share * ADAPTED if inputs.frozen else share


def eight_bit_speed(inputs: StepInputs) -> float:
    """By how much `quantization` speeds up a layer's products; 1 on a chip without units for it."""
    chip = CHIPS[inputs.topology.kind]
    speed = {"none": 1.0, "int8": chip.int8_speed, "fp8": chip.fp8_speed}[inputs.quantization]
    return max(1.0, calibration(inputs.topology.kind).eight_bits * speed)


def quantized_numbers(inputs: StepInputs) -> float:
    """What one layer's products quantize on a device in a microbatch, forward and backward.

    Of each product its input, once more in the backward pass, and its gradient, twice. Weights are few.
    """
    model, tensor = inputs.model, inputs.mesh["tensor"]
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    read = 2 * model.hidden_size + (heads * model.head_dim + model.intermediate_size) / tensor
    projected = (heads + 2 * kv_heads) * model.head_dim + 2 * model.intermediate_size
    return inputs.micro_tokens * (2 * read + 2 * (2 * model.hidden_size + projected / tensor))


def plan_compute(inputs: StepInputs) -> tuple[Part, ...]:
    """The parts of a step's computation on one chip."""
    known, chip = calibration(inputs.topology.kind), CHIPS[inputs.topology.kind]
    layers = inputs.model.num_hidden_layers * inputs.accumulation
    # Of one device.
    bandwidth = known.elementwise[inputs.scoped_vmem_kib > 0] * chip.hbm_bandwidth / chip.devices
    peak, count = chip.peak_flops / chip.devices, chip.devices
    share = products_share(inputs)
    forward = 2 if inputs.reference else 1  # passes forward

    def product(name: str, names: Collection[str]) -> Part:
        once, backward = layer_product_flops(inputs, names)
        flops = layers * (once * forward + backward)
        return Part(name, flops / (share * peak * eight_bit_speed(inputs)), flops * count)

    kernels = layer_attention_flops(inputs)
    kernel_flops = layers * (kernels[0] * forward + kernels[1])
    kernel_seconds = kernel_flops * tile_work(inputs) / (chip.kernel_share * peak)
    moved = layer_bytes(inputs)
    passes = layers * (moved[0] * forward + moved[1])
    tokens = inputs.micro_tokens * inputs.accumulation
    table = table_size(inputs.model) / inputs.mesh["tensor"]
    logit_flops = 2 * tokens * table * ((2 if inputs.frozen else 3) + forward - 1)
    logit_bytes = tokens * inputs.model.vocab_size / inputs.mesh["tensor"] * _LOGIT_BYTES
    logit_seconds = logit_flops / (share * peak) + logit_bytes / bandwidth
    state = _STEP_PASSES * 4 * trained_per_chip(inputs)
    if inputs.accumulation > 1:
        state += inputs.accumulation * _ACCUMULATION_PASSES * 4 * trained_per_chip(inputs)
    parts = [
        product(FEED_FORWARD, ("w_gate", "w_up", "w_down")),
        product(PROJECTIONS, ("wq", "wk", "wv", "wo")),
        Part(ATTENTION, kernel_seconds, kernel_flops * count),
        Part("elementwise", passes / bandwidth, hbm_bytes=passes * count, bound="hbm"),
        Part("output projection and loss", logit_seconds, logit_flops * count, logit_bytes * count),
        Part("optimizer", state / bandwidth, hbm_bytes=state * count, bound="hbm"),
    ]
    if inputs.quantization != "none":
        numbers = layers * quantized_numbers(inputs) * count
        parts.append(Part("quantization", numbers / known.quantized, hbm_bytes=3 * numbers, bound="hbm"))
    if inputs.frozen and inputs.base_bytes < 1:  # all layers' weights, in the forward and the backward pass
        weights = layers * layer_size(inputs.model, inputs.expert) / inputs.mesh["tensor"] * (forward + 1)
        seconds = weights * count / known.dequantized
        parts.append(Part("dequantization", seconds, hbm_bytes=3 * weights * count, bound="hbm"))
    return tuple(parts)
