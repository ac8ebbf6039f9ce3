"""HBM of a training step, by arithmetic: what each remat policy saves, state, gradients, working memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from llama_jax.config import LlamaConfig
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.result import Memory
from llama_jax.plan.weights import (
    expert_rows,
    layer_matrices,
    layer_size,
    param_shards,
    parameters_per_chip,
    table_size,
)

# Tensors of a layer that a policy can save, by their checkpoint names (`model.py`): numbers a token, all of
# which `tensor` shards. The kernel's residuals are its output and, in f32, a log-sum-exp for each head.
ELEMENTS: Mapping[str, Callable[[LlamaConfig], float]] = {
    "q": lambda model: model.num_attention_heads * model.head_dim,
    "k": lambda model: model.num_key_value_heads * model.head_dim,
    "v": lambda model: model.num_key_value_heads * model.head_dim,
    "attention": lambda model: model.num_attention_heads * model.head_dim + 2 * model.num_attention_heads,
    "residual": lambda model: model.hidden_size,
    # Of these, times the rows of `weights.expert_rows`.
    "gate": lambda model: model.intermediate_size,
    "up": lambda model: model.intermediate_size,
    # Under `none`: the two norms' inputs and products in f32, and their results. Not measured.
    "norms": lambda model: 10 * model.hidden_size,
}
_PROJECTIONS = ("q", "k", "attention", "gate", "up")

# What each policy of `train.remat` saves, besides the input of the layer.
SAVED: Mapping[str, tuple[str, ...]] = {
    "none": ("q", "k", "v", "attention", "residual", "gate", "up", "norms"),
    "save_dots": ("q", "k", "v", "attention", "residual", "gate", "up"),
    "save_projections": _PROJECTIONS,
    "save_dots_except_mlp": ("q", "k", "v", "attention", "residual"),
    "attention": ("attention",),
    "full": (),
    "offload": _PROJECTIONS,
}
# Arrays [tokens, F] and [tokens, D] at once in a layer's backward pass, and those gathered over `tensor`.
_WIDE, _NARROW, _WHOLE = 5, 12, 4
# Arrays [tokens of all devices of `expert`, D]: tokens; outputs and their gradients in f32. Not measured.
_GATHERED_TOKENS = 5
OFFLOADED = frozenset({"offload"})  # policies that save to host memory


def saved_elements(model: LlamaConfig, remat: str, tensor: int = 1, expert: int = 1) -> float:
    """Numbers that a layer saves for the backward pass per token of a device, its input included."""
    rows = dict.fromkeys(("gate", "up"), expert_rows(model, expert))
    saved = sum(ELEMENTS[name](model) * rows.get(name, 1) for name in SAVED[remat])
    return (model.hidden_size + saved) / tensor


def saved_bytes(inputs: StepInputs) -> float:
    """Bytes of a device that all layers save in a microbatch."""
    model, tensor = inputs.model, inputs.mesh["tensor"]
    remat = "full" if inputs.remat in OFFLOADED else inputs.remat
    tokens = model.num_hidden_layers * inputs.micro_tokens
    return tokens * saved_elements(model, remat, tensor, inputs.expert) * inputs.compute_bytes


def trained_per_chip(inputs: StepInputs) -> float:
    """Trained parameters of which a device holds its shard."""
    if inputs.trained is None:
        return parameters_per_chip(inputs.model, inputs.mesh)
    return inputs.trained / (param_shards(inputs.mesh) * inputs.mesh["tensor"])


def plan_memory(inputs: StepInputs) -> Memory:
    """The HBM of one chip. The peak is in the backward pass, when all that it reads is still there."""
    chip, trained = CHIPS[inputs.topology.kind], trained_per_chip(inputs)
    whole = parameters_per_chip(inputs.model, inputs.mesh)
    parameters = 4 * trained * (2 if inputs.ema else 1)
    if inputs.frozen:
        parameters += inputs.base_bytes * whole
    parameters += inputs.reference_bytes * whole
    parameters += inputs.compute_bytes * sum(parameters_per_chip(one, inputs.mesh) for one in inputs.beside)
    optimizer = inputs.optimizer_bytes * trained
    # The sums over microbatches, and those of the one that is computed.
    gradients = 4 * trained * (2 if inputs.accumulation > 1 else 1)
    gradients += 4 * trained if inputs.has_residual else 0
    activations = saved_bytes(inputs)
    logits = _logits(inputs)
    temporaries = _temporaries(inputs)
    peak = parameters + optimizer + gradients + activations + temporaries
    devices = chip.devices
    return Memory(
        parameters=parameters * devices,
        optimizer=optimizer * devices,
        gradients=gradients * devices,
        activations=activations * devices,
        logits=logits * devices,
        temporaries=temporaries * devices,
        peak=peak * devices,
        capacity=chip.hbm_bytes,
    )


def teacher_memory(inputs: StepInputs, student: Memory) -> Memory:
    """The HBM of one chip with a teacher, whose weights stay, in the compute dtype.

    Args:
      inputs: `StepInputs.of_teacher`.
      student: what the student's step needs alone.
    """
    devices = CHIPS[inputs.topology.kind].devices
    parameters = inputs.compute_bytes * parameters_per_chip(inputs.model, inputs.mesh) * devices
    # A chunk's logits are there beside the student's; its forward pass is over when the student's begins.
    logits = _logits(inputs) * devices
    return dataclasses.replace(
        student,
        parameters=student.parameters + parameters,
        logits=student.logits + logits,
        temporaries=student.temporaries + logits,
        peak=student.peak + parameters + logits,
    )


def _logits(inputs: StepInputs) -> float:
    """One chunk's logits in f32, and their gradient."""
    tokens = inputs.micro_tokens / min(inputs.loss_chunks, inputs.seq_len)
    vocab = inputs.model.vocab_size / inputs.mesh["tensor"]
    return tokens * vocab * (4 + inputs.compute_bytes)


def _temporaries(inputs: StepInputs) -> float:
    """Working memory at the peak: a layer's gathered weights, gradients in f32, and its activations.

    A layer's backward pass has at once its activations, recomputed or read from their stacks, and their
    gradients; and the gradients of its feed-forward matrices, before they are scattered.
    """
    model, tensor = inputs.model, inputs.mesh["tensor"]
    gathered = 0.0
    if param_shards(inputs.mesh) > 1:
        narrow = inputs.quantization != "none"
        gathered = layer_size(model, inputs.expert) / tensor * (1 if narrow else inputs.compute_bytes)
    experts = inputs.expert if model.num_experts else 1
    widest = (
        max(matrix.size // (experts if matrix.experts > 1 else 1) for matrix in layer_matrices(model))
        / tensor
    )
    gradients = (4 if inputs.base_bytes < 1 else 0) * widest if inputs.frozen else 3 * 4 * widest
    wide = model.intermediate_size * expert_rows(model, inputs.expert)
    activations = (_WIDE * wide + _NARROW * model.hidden_size) / tensor
    activations += _GATHERED_TOKENS * (experts - 1) * model.hidden_size
    activations += _WHOLE * model.hidden_size if tensor > 1 else 0
    layer = gathered + gradients + inputs.micro_tokens * activations * inputs.compute_bytes
    table = table_size(model) / tensor
    loss = table * (inputs.compute_bytes + (0 if inputs.frozen else 4)) + _logits(inputs)
    return max(layer, loss)
