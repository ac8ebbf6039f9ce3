"""Reads LoRA adapters in the format of Hugging Face's PEFT: adapter_config.json, adapter_model.safetensors.

A LoRA, rsLoRA or DoRA adapter for a Llama, as PEFT's `save_pretrained` writes it, becomes the settings and
the tree of `adapters.lora`, and changes of other tensors (`peft_modules`). Unsupported fields that change
what an adapter computes are refused by name; missing, unexpected and misshapen tensors are errors.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.adapters.lora import Lora
from llama_jax.errors import CheckpointError
from llama_jax.ops.adapted import PROJECTIONS
from llama_jax.weights import adapter_head
from llama_jax.weights.adapter_file import read_f32, read_header, weights_path
from llama_jax.weights.merged import Initial
from llama_jax.weights.names import EXPERT_LEAVES, LEAVES, Leaf
from llama_jax.weights.peft_fields import PeftFields
from llama_jax.weights.peft_fused import fused_parameter, split_experts
from llama_jax.weights.peft_modules import NAME_PREFIX, OtherModules, read_other_modules
from llama_jax.weights.source import TensorInfo, format_list

# PEFT's tensor names; some versions add ".weight" to the magnitude's name.
LORA_A, LORA_B, LORA_MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

_LEAF_OF = {leaf.hf.split(".")[-2]: leaf for leaf in LEAVES if leaf.path[-1] in PROJECTIONS}
_EXPERT_LEAF_OF = {leaf.hf.split(".")[-2]: leaf for leaf in EXPERT_LEAVES}  # w1, w2 and w3 of Mixtral
_NAME = re.compile(
    rf"{re.escape(NAME_PREFIX)}(?P<module>model\.layers\.(?P<layer>\d{{1,4}})\."
    r"(?:self_attn|mlp|block_sparse_moe\.experts\.(?P<expert>\d{1,4}))\.(?P<hf>\w+))"
    rf"\.(?P<kind>{re.escape(LORA_A)}|{re.escape(LORA_B)}|{LORA_MAGNITUDE})(?:(?<=vector)\.weight)?"
)
_MAX_PADDING = 64  # how much larger an adapter may become when all modules are padded to one rank


@dataclasses.dataclass(frozen=True)
class PeftLora:
    """A LoRA adapter as PEFT stores it.

    Attributes:
      file: the file with its tensors. Those of experts have transformers 4's names, w1, w2 and w3 of each
        expert, which PEFT converts where transformers 5 has the experts in one tensor.
      settings: of the low-rank updates of the projections; None if it has none.
      tree: the updates, for `lora.attach`: f32, layers stacked. Modules of smaller rank (rank_pattern) are
        zero-padded to the largest rank, and per-module alphas (alpha_pattern) are folded into `b`. Modules
        that the adapter leaves out (exclude_modules, layers_to_transform, an expression or full names in
        target_modules) are zero.
      initial: what each matrix lost to the adapter at its start, by the last part of its path, its layer and
        its expert.
      partial_dora: whether a DoRA adapter leaves out layers; their magnitudes are zero.
      others: what it changes besides the projections.
    """

    file: Path
    settings: Lora | None
    tree: dict[str, Any]
    initial: Mapping[tuple[str, int, int | None], Initial]
    partial_dora: bool
    others: OtherModules

    def require_attachable(self) -> tuple[Lora, dict[str, Any]]:
        """Returns the settings and the tree of an adapter that they fully describe.

        Raises:
          CheckpointError: for another one, which can only be merged into its base model.
        """
        problem = self.others.description
        if self.initial:
            problem = "takes a part of the base weights (init_lora_weights)"
        if self.partial_dora:
            problem = "is a DoRA adapter of some layers only"
        if problem or self.settings is None:
            raise CheckpointError(
                f"{self.file}: {problem}, so that it can only be merged: llama_jax.load(BASE, adapter=...), "
                "or convert BASE DST --adapter"
            )
        return self.settings, self.tree


def read_lora(config_path: Path, config: Mapping[str, Any], num_layers: int | None = None) -> PeftLora:
    """Reads a LoRA, rsLoRA or DoRA adapter, or trained tokens (TRAINABLE_TOKENS).

    Args:
      config_path: its adapter_config.json; the weights are in the same directory.
      config: the contents of that file.
      num_layers: of the base model, for an adapter that leaves out its last layers; None if unknown.

    Raises:
      CheckpointError: if a file is missing or malformed, the adapter uses an unsupported feature, or tensors
        are missing, unexpected or of the wrong shape.
    """
    fields = PeftFields(config_path, config)
    fields.check_supported()
    file = weights_path(config_path)
    stored = split_experts(file, adapter_head.exclude_head(config, read_header(file)), fields)
    found, others = _split(file, stored, fields)
    if not found and (others.changes or config.get("peft_type") != "LORA"):
        return PeftLora(file, None, {}, {}, partial_dora=False, others=others)
    modules, layers, experts = _find_modules(file, stored, found, fields, num_layers)
    rank = max(module.rank for module in modules)
    names = [name for name in PROJECTIONS if any(module.leaf.path[-1] == name for module in modules)]
    settings = fields.settings(rank, names)
    stored_bytes = sum(info.nbytes for info in stored.values())
    padded_bytes = sum(4 * rank * (module.inputs + module.outputs) for module in modules)
    if padded_bytes > _MAX_PADDING * stored_bytes:
        raise CheckpointError(
            f"{file}: {stored_bytes:,} bytes become {padded_bytes:,} when every module is padded to the "
            f"largest rank, {rank}; keep the ranks of rank_pattern closer together"
        )
    tree: dict[str, Any] = {}
    for name in names:
        of_name = [module for module in modules if module.leaf.path[-1] == name]
        first = of_name[0]
        lead: tuple[int, ...] = (layers,) if first.leaf.expert is None else (layers, experts)
        leaf: dict[str, np.ndarray] = {
            "a": np.zeros((*lead, first.inputs, rank), np.float32),
            "b": np.zeros((*lead, rank, first.outputs), np.float32),
        }
        if settings.dora:
            leaf["magnitude"] = np.zeros((*lead, first.outputs), np.float32)
        for module in of_name:
            place = (module.layer,) if module.leaf.expert is None else (module.layer, module.leaf.expert)
            arrays = {kind: read_f32(name, stored[name]) for kind, name in module.names.items()}
            leaf["a"][(*place, slice(None), slice(module.rank))] = arrays[LORA_A].T
            leaf["b"][(*place, slice(module.rank))] = arrays[LORA_B].T * np.float32(
                module.scale / settings.scale
            )
            if settings.dora:
                leaf["magnitude"][place] = arrays[LORA_MAGNITUDE]
        tree.setdefault(first.leaf.path[1], {})[name] = leaf
    initial = {(m.leaf.path[-1], m.layer, m.leaf.expert): fields.initial(m.rank, m.scale) for m in modules}
    return PeftLora(
        file,
        settings,
        jax.tree.map(jnp.asarray, {"layers": tree}),
        {key: value for key, value in initial.items() if value is not None},
        partial_dora=settings.dora and len(modules) < len(settings.matrices) * layers,
        others=others,
    )


@dataclasses.dataclass(frozen=True)
class _Module:
    """The stored adapter of one matrix.

    Attributes:
      leaf: the matrix, of an expert of a mixture its own.
      layer: its layer.
      names: the stored names of `lora_A`, `lora_B` and the magnitude.
      rank, inputs, outputs: the dimensions of the low-rank factors.
      scale: the scaling factor of the low-rank product.
    """

    leaf: Leaf
    layer: int
    names: Mapping[str, str]
    rank: int
    inputs: int
    outputs: int
    scale: float


# Stored names by kind; by projection, layer and expert, None outside a mixture.
_Found = Mapping[tuple[str, int, int | None], Mapping[str, str]]


def _split(file: Path, stored: Mapping[str, TensorInfo], fields: PeftFields) -> tuple[_Found, OtherModules]:
    """Separates the low-rank updates of the projections from everything else."""
    found: defaultdict[tuple[str, int, int | None], dict[str, str]] = defaultdict(dict)
    others = {}
    for name, info in stored.items():
        match = _NAME.fullmatch(name)
        expert = int(match["expert"]) if match and match["expert"] else None
        leaf = _leaf(match["hf"], expert) if match else None
        if (
            match is None
            or leaf is None
            or match["kind"] not in _kinds(fields)
            or leaf.name("hf", int(match["layer"])) != f"{match['module']}.weight"
            or match["kind"] in found[match["hf"], int(match["layer"]), expert]
        ):
            others[name] = info
        else:
            found[match["hf"], int(match["layer"]), expert][match["kind"]] = name
    return {key: names for key, names in found.items() if names}, read_other_modules(file, others, fields)


def _leaf(hf: str, expert: int | None) -> Leaf | None:
    """The leaf of a module's name; None for another one."""
    if expert is None:
        return _LEAF_OF.get(hf)
    leaf = _EXPERT_LEAF_OF.get(hf)
    return None if leaf is None else dataclasses.replace(leaf, expert=expert)


def _short_name(leaf: Leaf) -> str:
    """The end of the module's name in Hugging Face's model: q_proj, or experts.3.w1."""
    parts = leaf.template("hf").split(".")[:-1]
    return ".".join(parts[-1:] if leaf.expert is None else parts[-3:])


def _kinds(fields: PeftFields) -> tuple[str, ...]:
    return (LORA_A, LORA_B, LORA_MAGNITUDE) if fields.flag("use_dora") else (LORA_A, LORA_B)


def _find_modules(
    file: Path, stored: Mapping[str, TensorInfo], found: _Found, fields: PeftFields, num_layers: int | None
) -> tuple[list[_Module], int, int]:
    """Returns the adapted modules, the number of layers, and that of experts.

    Raises:
      CheckpointError: for tensors that are missing or of the wrong shape.
    """
    layers = 1 + max((layer for _, layer, _ in found), default=0)
    experts = 1 + max((expert for _, _, expert in found if expert is not None), default=-1)
    targets = {name.rpartition(".")[2] for name in fields.targets()}
    dense = {hf for hf, _, expert in found if expert is None}
    # PEFT ignores a name in target_modules that no module has, such as w1 in a Llama.
    dense |= {hf for hf in targets & _LEAF_OF.keys() if not experts or _LEAF_OF[hf].path[1] != "feed_forward"}
    of_experts = {hf for hf, _, expert in found if expert is not None}
    of_experts |= targets & _EXPERT_LEAF_OF.keys() if experts else set()
    leaves = [_LEAF_OF[hf] for hf in sorted(dense)]
    if experts and any(leaf.path[1] == "feed_forward" for leaf in leaves):
        raise CheckpointError(
            f"{file}: adapts both mlp and block_sparse_moe.experts, and no model has both; use the files "
            "that were saved together"
        )
    leaves += [
        dataclasses.replace(_EXPERT_LEAF_OF[hf], expert=expert)
        for hf in sorted(of_experts)
        for expert in range(experts)
    ]

    fused = bool(fields.target_parameters())  # which are adapted in every layer

    def leaves_out(leaf: Leaf, layer: int) -> bool:
        is_fused = fused and leaf.expert is not None
        return not is_fused and fields.leaves_out(leaf.name("hf", layer).removesuffix(".weight"), layer)

    if num_layers is not None and all(
        leaves_out(leaf, layer) for leaf in leaves for layer in range(layers, num_layers)
    ):
        layers = max(layers, num_layers)
    places = [
        ((_short_name(leaf).rpartition(".")[2], layer, leaf.expert), layer, leaf)
        for leaf in leaves
        for layer in range(layers)
    ]
    missing = [
        f"{NAME_PREFIX}model.layers.{layer}.*.{_short_name(leaf)}.{kind}"
        for key, layer, leaf in places
        for kind in _kinds(fields)
        if kind not in found.get(key, {}) and (key in found or not leaves_out(leaf, layer))
    ]
    if missing or not found:
        listed = format_list(missing, 4) if missing else "the file has none"
        raise CheckpointError(
            f"{file}: missing tensors: {listed}, which {fields.path.name} does not leave out; use the files "
            "that were saved together"
        )
    wrong_shapes, modules = [], []
    for (hf, layer, expert), names in found.items():
        first = next(key for key in found if key[0] == hf)
        shape_a, shape_b = (stored[found[first][kind]].shape for kind in (LORA_A, LORA_B))
        inputs, outputs = (*shape_a, 0, 0)[1], (*shape_b, 0)[0]
        leaf = _leaf(hf, expert)
        assert leaf is not None  # by `_split`
        name = leaf.name("hf", layer).removesuffix(".weight")
        name = fused_parameter(hf, layer) if fused and expert is not None else name
        rank, scale = fields.rank_and_scale(name)
        expected = {LORA_A: (rank, inputs), LORA_B: (outputs, rank), LORA_MAGNITUDE: (outputs,)}
        wrong_shapes += [
            f"{name} {list(stored[name].shape)} should be {list(expected[kind])}"
            for kind, name in names.items()
            if stored[name].shape != expected[kind] or 0 in expected[kind]
        ]
        modules.append(_Module(leaf, layer, names, rank, inputs, outputs, scale))
    if wrong_shapes:
        raise CheckpointError(
            f"{file}: wrong shapes according to {fields.path.name}: {format_list(wrong_shapes, 3)}; use the "
            "files that were saved together"
        )
    return modules, layers, experts
