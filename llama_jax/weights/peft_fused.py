"""Low-rank updates of all experts at once, as PEFT stores them for transformers 5's parameters of a mixture.

`target_parameters` names `mlp.experts.gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]. With rank r the
update of expert e is B_e A_e, where A [E r, I] has the rows of one expert after another, and B [O, r E] the
experts of each rank (peft/tuners/lora/layer.py, `ParamWrapper`). Here each expert's factors become tensors of
their own, views of those in the file, under the names that PEFT has for transformers 4.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from llama_jax.errors import CheckpointError
from llama_jax.weights.peft_fields import MERGE_HINT, PeftFields
from llama_jax.weights.source import FLOAT_DTYPES, TensorInfo, quote
from llama_jax.weights.torch_zip import StridedInfo

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# Of each parameter its matrices in transformers 4's Mixtral, and which part of the outputs each is.
_MATRICES = {GATE_UP: (("w1", 0), ("w3", 1)), DOWN: (("w2", 0),)}
# Where both parameters are adapted, the wrapper of one is within that of the other.
_NAME = re.compile(
    r"(?P<layer>base_model\.model\.model\.layers\.(?P<index>\d{1,4})\.)mlp\.experts\."
    r"(?P<level>base_layer\.)?lora_(?P<factor>[AB])\.weight"
)

_Factors = dict[str, tuple[str, TensorInfo]]


def fused_parameter(hf: str, layer: int) -> str:
    """The parameter with all experts' w1, w2 or w3, as the patterns of ranks and alphas name it."""
    name = next(name for name, matrices in _MATRICES.items() if any(hf == matrix for matrix, _ in matrices))
    return f"model.layers.{layer}.mlp.experts.{name}"


def split_experts(
    file: Path, stored: Mapping[str, TensorInfo], fields: PeftFields
) -> Mapping[str, TensorInfo]:
    """The tensors of an adapter, with those of all experts as tensors of each.

    Args:
      file: the adapter's file.
      stored: its tensors.
      fields: its adapter_config.json.

    Raises:
      CheckpointError: for target_parameters that are not experts', or tensors that do not fit them.
    """
    targets = fields.target_parameters()
    if not targets:
        return stored
    unknown = [name for name in targets if name.rpartition(".")[2] not in _MATRICES]
    if unknown:
        raise fields.error(
            f"target_parameters has {quote(unknown[0])}; only experts' {GATE_UP} and {DOWN} are supported; "
            f"{MERGE_HINT}"
        )
    others, layers = {}, defaultdict[tuple[str, int], dict[str, _Factors]](lambda: defaultdict(dict))
    for name, info in stored.items():
        if match := _NAME.fullmatch(name):
            levels = layers[match["layer"], int(match["index"])]
            levels[match["level"] or ""][match["factor"]] = name, info
        else:
            others[name] = info
    wanted = {name.rpartition(".")[2] for name in targets}
    found: dict[str, TensorInfo] = {}
    for (prefix, layer), levels in layers.items():
        complete = all(factors.keys() == {"A", "B"} for factors in levels.values())
        if not complete or len(levels) != len(wanted) or len(layers) != 1 + max(i for _, i in layers):
            raise CheckpointError(
                f"{file}: missing tensors of the layers' experts, according to target_parameters in "
                f"{fields.path.name}; use the files that were saved together"
            )
        for parameter, factors in _assign(file, list(levels.values()), wanted).items():
            rank, _ = fields.rank_and_scale(f"model.layers.{layer}.mlp.experts.{parameter}")
            found |= _views(file, prefix, parameter, factors, rank)
    return others | found


def _assign(file: Path, levels: list[_Factors], wanted: set[str]) -> dict[str, _Factors]:
    """Which parameter each wrapper is of: file names do not say, but shapes do, [2F, D] and [D, F]."""
    for factors in levels:
        for name, info in factors.values():
            if len(info.shape) != 2 or 0 in info.shape:
                raise CheckpointError(f"{file}: {name} {list(info.shape)} must have two dimensions")
    if len(wanted) == 1:
        return {next(iter(wanted)): levels[0]}
    for first, second in (levels, levels[::-1]):
        (gate_inputs, gate_outputs), (down_inputs, down_outputs) = _sizes(first), _sizes(second)
        if gate_outputs == 2 * down_inputs and gate_inputs == down_outputs:
            return {GATE_UP: first, DOWN: second}
    shapes = ", ".join(f"{name} {list(info.shape)}" for level in levels for name, info in level.values())
    raise CheckpointError(
        f"{file}: wrong shapes: {shapes} are not of [2F, D] and [D, F]; use the files that were saved "
        "together"
    )


def _sizes(factors: _Factors) -> tuple[int, int]:
    """Inputs and outputs."""
    return factors["A"][1].shape[1], factors["B"][1].shape[0]


def _views(file: Path, prefix: str, parameter: str, factors: _Factors, rank: int) -> dict[str, TensorInfo]:
    (name_a, a), (name_b, b) = factors["A"], factors["B"]
    matrices = _MATRICES[parameter]
    inputs, outputs = _sizes(factors)
    experts = a.shape[0] // rank
    if a.shape[0] != b.shape[1] or a.shape[0] % rank or outputs % len(matrices):
        raise CheckpointError(
            f"{file}: wrong shapes: {name_a} {list(a.shape)} and {name_b} {list(b.shape)} are not of a whole "
            f"number of experts of rank {rank}; use the files that were saved together"
        )
    part = outputs // len(matrices)
    (row, column), (b_row, b_column) = _strides(a), _strides(b)
    found: dict[str, TensorInfo] = {}
    for expert in range(experts):
        for matrix, index in matrices:
            name = f"{prefix}block_sparse_moe.experts.{expert}.{matrix}.lora_"
            found[f"{name}A.weight"] = _view(a, (rank, inputs), expert * rank * row, (row, column))
            start = index * part * b_row + expert * b_column
            found[f"{name}B.weight"] = _view(b, (part, rank), start, (b_row, experts * b_column))
    return found


def _strides(info: TensorInfo) -> tuple[int, ...]:
    return info.strides if isinstance(info, StridedInfo) else (info.shape[1], 1)


def _view(info: TensorInfo, shape: tuple[int, int], start: int, strides: tuple[int, int]) -> StridedInfo:
    size = FLOAT_DTYPES[info.dtype].itemsize
    return StridedInfo(
        shape, info.dtype, math.prod(shape) * size, info.file, info.offset + start * size, strides
    )
