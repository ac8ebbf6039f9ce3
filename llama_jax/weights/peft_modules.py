"""What a PEFT adapter changes besides the projections of the layers: embedding, output projection, norms.

Stored are trained copies of whole modules (`modules_to_save`), tables saved with the adapter because the
vocabulary was resized (`save_embedding_layers`), low-rank updates of the embedding and of the output
projection, and trained rows of the embedding (`trainable_token_indices`). They can only be merged.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.weights.adapter_file import read_f32
from llama_jax.weights.merged import Change, LowRank
from llama_jax.weights.names import EMBEDDING, LEAVES, LM_HEAD
from llama_jax.weights.peft_fields import PeftFields
from llama_jax.weights.source import TensorInfo, format_list, quote

NAME_PREFIX = "base_model.model."  # PEFT's wrappers around the model

_EMBEDDING, _LM_HEAD = (leaf.hf.removesuffix(".weight") for leaf in (EMBEDDING, LM_HEAD))
_MODULES = "|".join(
    re.escape(leaf.hf.removesuffix(".weight")).replace(r"\{layer\}", r"\d{1,4}") for leaf in LEAVES
)
_NAME = re.compile(
    rf"{re.escape(NAME_PREFIX)}(?P<module>{_MODULES})\."
    r"(?P<kind>(?:token_adapter\.)?(?:(?:base_layer|modules_to_save|original_module)\.)?weight|lora_[AB]\.weight|lora_embedding_[AB]"
    r"|lora_magnitude_vector|lora_B\.bias|(?:token_adapter\.)?trainable_tokens_delta)(?:(?<=vector)\.weight)?"
)
_ROWS = "trainable_tokens_delta"
_PREFIXES = re.compile(r"(token_adapter\.)?((base_layer|modules_to_save)\.)?")
_ORIGINAL = "original_module.weight"  # the base's, beside a trained copy
_FACTORS = {  # the names of a and b, and whether they are those of the transposed matrix
    _EMBEDDING: ("lora_embedding_A", "lora_embedding_B"),
    _LM_HEAD: ("lora_A.weight", "lora_B.weight"),
}


@dataclasses.dataclass(frozen=True)
class OtherModules:
    """Changes of modules that are not low-rank updates of projections.

    Attributes:
      changes: by the module's name in Hugging Face's model.
      separate: the modules among embedding and output projection that no longer share the base's tied matrix.
      shared: a tensor that replaces this matrix, as it is loaded into the base.
    """

    changes: Mapping[str, Change]
    separate: frozenset[str]
    shared: tuple[str, TensorInfo] | None

    @property
    def description(self) -> str:
        """What it does, for an error message; empty if nothing."""
        return f"also changes {format_list(self.changes, 4)}" if self.changes else ""

    def resolve(self, base: LlamaConfig) -> tuple[dict[str, Change], bool]:
        """Applies the changes to a base model whose embedding and output projection may be tied.

        As in PEFT, a tied matrix stays tied unless one of both modules is trained as a copy or has an update.

        Returns:
          The changes by name of the tensor, and whether the output projection is no longer the embedding.
        """
        changes = dict(self.changes)
        untied = not base.labels and base.tie_word_embeddings and bool(self.separate)
        if base.tie_word_embeddings or base.labels:
            head, table = (changes.pop(name, Change()) for name in (_LM_HEAD, _EMBEDDING))
            changes[_EMBEDDING] = dataclasses.replace(table, whole=table.whole or self.shared)
            if untied:
                changes[_LM_HEAD] = dataclasses.replace(head, whole=head.whole or self.shared)
        named = {f"{module}.weight": change for module, change in changes.items() if change != Change()}
        return named, untied


def read_other_modules(file: Path, stored: Mapping[str, TensorInfo], fields: PeftFields) -> OtherModules:
    """Reads the tensors of an adapter that are not low-rank updates of projections.

    Args:
      file: the adapter's file.
      stored: these tensors.
      fields: its adapter_config.json.

    Raises:
      CheckpointError: for tensors that are unexpected, missing or of the wrong shape, and trained biases.
    """
    parts: defaultdict[str, dict[str, tuple[str, TensorInfo]]] = defaultdict(dict)
    indices, unexpected = _trained_rows(fields), []
    for name, info in stored.items():
        match = _NAME.fullmatch(name)
        kind = _PREFIXES.sub("", match["kind"], count=1) if match else ""
        if match is None or not _is_expected(match["module"], kind, fields):
            unexpected.append(quote(name))
        elif kind != _ROWS or match["module"] in indices:  # else a copy for the tied output projection
            parts[match["module"]][kind] = name, info
    _check_saved(file, parts.keys(), fields)
    if unexpected:
        raise CheckpointError(
            f"{file}: unexpected tensors: {format_list(unexpected, 4)}, which {fields.path.name} does not "
            "announce or a Llama does not have; use the files that were saved together"
        )
    changes, separate = {}, set()
    for module, tensors in parts.items():
        _check_bias(tensors.pop("lora_B.bias", None))
        rows = None
        if _ROWS in tensors:
            rows = indices[module], read_f32(*tensors[_ROWS])
            if len(rows[0]) != len(rows[1]):
                raise CheckpointError(
                    f"{file}: {tensors[_ROWS][0]} has {len(rows[1])} rows for {len(rows[0])} token indices; "
                    "use the files that were saved together"
                )
        low_rank = _low_rank(file, module, tensors, fields)
        change = Change(tensors.get("weight"), low_rank, rows)
        if change != Change():
            changes[module] = change
        if module in _FACTORS and (low_rank is not None or fields.is_saved(module)):
            separate.add(module)
    if _LM_HEAD in indices and not np.array_equal(indices[_LM_HEAD], indices.get(_EMBEDDING, [])):
        separate.add(_LM_HEAD)
    in_place = [
        parts[module].get(_ORIGINAL if fields.is_saved(module) else "weight")
        for module in _FACTORS
        if module in parts
    ]
    if fields.flag("ensure_weight_tying") and _EMBEDDING in separate and _LM_HEAD not in parts:
        separate.clear()  # the embedding's copy is the output projection's too
    shared = next((tensor for tensor in in_place if tensor), None)
    return OtherModules(changes, frozenset(separate), shared)


def _check_saved(file: Path, found: Collection[str], fields: PeftFields) -> None:
    """Checks that the file has what `modules_to_save` announces of a Llama's modules."""
    tied = fields.flag("ensure_weight_tying")  # then one of both stands for the other
    present = {*found, *(_FACTORS if tied and not _FACTORS.keys().isdisjoint(found) else ())}
    for name in map(str, fields.get("modules_to_save") or ()):
        known = any(f".{leaf.hf}".endswith(f".{name}.weight") for leaf in LEAVES)
        if known and not any(f".{module}".endswith(f".{name}") for module in present):
            raise CheckpointError(
                f"{file}: missing tensors: those of {quote(name)}, which modules_to_save names; use the "
                "files that were saved together"
            )


def _is_expected(module: str, kind: str, fields: PeftFields) -> bool:
    if kind in ("weight", _ORIGINAL):
        return True
    if kind == _ROWS:
        return module in _FACTORS and bool(_trained_rows(fields))
    if kind == "lora_B.bias":
        return fields.flag("lora_bias")
    if kind == "lora_magnitude_vector" and not fields.flag("use_dora"):
        return False
    return module in _FACTORS and kind in (*_FACTORS[module], "lora_magnitude_vector")


def _trained_rows(fields: PeftFields) -> dict[str, np.ndarray]:
    """The indices of trained rows, by module."""
    value = fields.get("trainable_token_indices")
    if fields.get("peft_type") == "TRAINABLE_TOKENS":
        targets = fields.get("target_modules") or ["embed_tokens"]
        names = [targets] if isinstance(targets, str) else targets
        value = dict.fromkeys(map(str, names), fields.get("token_indices")) if isinstance(names, list) else 0
    if value is None:
        return {}
    by_name = value if isinstance(value, dict) else {"embed_tokens": value}
    found = {}
    for name, indices in by_name.items():
        module = next((module for module in _FACTORS if f".{module}".endswith(f".{name}")), None)
        valid = isinstance(indices, list) and indices and all(type(i) is int for i in indices)
        if module is None or not valid or not 0 <= min(indices) <= max(indices) < 1 << 31:
            raise fields.error(
                f"the trained tokens of {quote(str(name))} are {quote(str(indices))}; they must be ids of "
                "rows of embed_tokens or lm_head"
            )
        found[module] = np.array(indices, np.int64)
    return found


def _check_bias(bias: tuple[str, TensorInfo] | None) -> None:
    if bias is not None and read_f32(*bias).any():
        raise CheckpointError(
            f"{bias[1].file}: {bias[0]} is a trained bias (lora_bias), and a Llama has none; train without it"
        )


def _low_rank(
    file: Path, module: str, tensors: Mapping[str, tuple[str, TensorInfo]], fields: PeftFields
) -> LowRank | None:
    kinds = [*_FACTORS.get(module, ()), *(["lora_magnitude_vector"] if fields.flag("use_dora") else [])]
    if not any(kind in tensors for kind in kinds):
        return None
    if missing := [f"{NAME_PREFIX}{module}.{kind}" for kind in kinds if kind not in tensors]:
        raise CheckpointError(
            f"{file}: missing tensors: {', '.join(missing)}; use the files that were saved together"
        )
    rank, scale = fields.rank_and_scale(module)
    a, b, *magnitudes = (read_f32(*tensors[kind]) for kind in kinds)
    wrong = [
        f"{tensors[kind][0]} {list(array.shape)}"
        for kind, array, axis in zip(kinds, (a, b), (0, 1), strict=False)
        if array.ndim != 2 or array.shape[axis] != rank or 0 in array.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{file}: wrong shapes according to {fields.path.name}: {', '.join(wrong)} should have rank "
            f"{rank}; use the files that were saved together"
        )
    magnitude = magnitudes[0].reshape(-1) if magnitudes else None
    if module == _EMBEDDING:  # an embedding looks up columns of a: its matrix is transposed
        return LowRank(b.T, np.float32(scale) * a.T, magnitude, columns=True)
    # A table that the adapter brings has already lost to it what it began with.
    initial = None if "weight" in tensors else fields.initial(rank, scale)
    return LowRank(a, np.float32(scale) * b, magnitude, initial=initial)
