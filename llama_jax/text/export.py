"""Programs for other programs: serialized StableHLO with its calling convention, for JAX alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from llama_jax import kv_cache as kv
from llama_jax.decoding.arguments import check_int
from llama_jax.decoding.generation import generate
from llama_jax.decoding.sampling import Sampling
from llama_jax.errors import InputError
from llama_jax.model import compute_dtype, forward, forward_cached, unstack
from llama_jax.text.model import Model

Function = Literal["generate", "forward", "step"]
Platform = Literal["cpu", "cuda", "rocm", "tpu"]
PROGRAM, MANIFEST, WEIGHTS = "program.bin", "manifest.json", "weights.safetensors"
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A compiled function's portable form.

    Attributes:
      serialized: what `jax.export.deserialize` reads.
      manifest: the calling convention, JSON-serializable: `inputs` in the order of `call`, each a `name` with
        `dtype` and `shape`, or with `tensors`, a list of such; `outputs` likewise.
      weights: the arrays of the first input, by the names there.
    """

    serialized: bytes = dataclasses.field(repr=False)
    manifest: dict[str, Any]
    weights: dict[str, jax.Array] = dataclasses.field(repr=False)

    def save(self, folder: str | Path, *, weights: bool = True) -> Path:
        """Writes program and manifest into a new folder, with the weights as safetensors unless told not to.

        Raises:
          InputError: if the folder exists, or safetensors has no such dtype.
        """
        folder = Path(folder)
        if folder.exists():
            raise InputError(f"{folder} exists; give a folder that does not, or remove it")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / PROGRAM).write_bytes(self.serialized)
        (partial / MANIFEST).write_text(json.dumps(self.manifest, indent=1) + "\n", encoding="utf-8")
        if weights:
            if odd := next((n for n, x in self.weights.items() if x.dtype in ("int4", "uint4")), None):
                shutil.rmtree(partial)
                raise InputError(
                    f"{odd} is {self.weights[odd].dtype}, which safetensors has not; use "
                    "save(..., weights=False), and give the weights in the call"
                )
            save_file({name: np.asarray(x) for name, x in self.weights.items()}, partial / WEIGHTS)
        return partial.rename(folder)


def export(
    model: Model,
    function: Function,
    *,
    batch: int = 1,
    max_length: int = 256,
    max_new_tokens: int = 64,
    platforms: Sequence[Platform] = ("cpu", "cuda", "tpu"),
) -> Exported:
    """Exports a function of a model by `jax.export`, for a process that has JAX alone.

    `generate(weights, tokens, lengths, seed, temperature, top_k, top_p, min_p)` continues prompts, which are
    padded on the right. `forward(weights, tokens)` returns logits. `step(weights, tokens, positions, cache)`
    runs one token of each row against a cache, at first zeros, and returns logits and the cache.

    Args:
      model: on one device; its weights are arguments of the program, not a part of it.
      function: which.
      batch: B.
      max_length: of `generate` prompt plus new tokens, of `forward` T, of `step` the slots of the cache.
      max_new_tokens: of `generate`.
      platforms: where the program can run; it is the same for all.

    Raises:
      InputError: for an unknown function or platform, or lengths that do not fit the model.
    """
    for name, value, choices in [
        ("function", function, get_args(Function)),
        *(("platforms", platform, get_args(Platform)) for platform in platforms),
    ]:
        if value not in choices:
            raise InputError(f"{name} {value!r} is unknown; use one of {', '.join(choices)}")
    if isinstance(platforms, str) or not platforms:
        raise InputError(f"platforms is {platforms!r}; give a list, such as ['cpu', 'tpu']")
    check_int("batch", batch)
    context = model.config.max_position_embeddings
    if check_int("max_length", max_length) > context:
        raise InputError(f"max_length is {max_length}; the model's context has {context} positions")
    if function == "generate" and not 0 < check_int("max_new_tokens", max_new_tokens) < max_length:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be below max_length, {max_length}")
    if model.mesh is not None:
        raise InputError("the model is on a mesh; load it without one to export it")
    params = unstack(model.params)
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    weights = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    inputs, run = _function(model, function, batch, max_length, max_new_tokens)

    def call(weights: list[jax.Array], *arguments: Any) -> Any:
        return run(jax.tree_util.tree_unflatten(structure, weights), *arguments)

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in weights.values()]
    exported = jax.export.export(jax.jit(call), platforms=list(platforms))(shapes, *inputs.values())
    outputs = dict(zip(_OUTPUTS[function], jax.eval_shape(call, shapes, *inputs.values()), strict=True))
    manifest = {
        "function": function,
        "platforms": list(platforms),
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "inputs": [
            {"name": "weights", "tensors": [{"name": n, **_described(x)} for n, x in weights.items()]},
            *({"name": name, **_described(value)} for name, value in inputs.items()),
        ],
        "outputs": [{"name": name, **_described(value)} for name, value in outputs.items()],
        "eos_ids": list(model.tokenizer.eos_ids),
        "bos_id": model.tokenizer.bos_id,
    }
    return Exported(bytes(exported.serialize()), manifest, weights)


_OUTPUTS = {
    "generate": ("tokens", "lengths", "logprobs"),
    "forward": ("logits",),
    "step": ("logits", "cache"),
}


def _function(
    model: Model, function: Function, batch: int, max_length: int, max_new_tokens: int
) -> tuple[dict[str, Any], Callable[..., tuple[Any, ...]]]:
    """The inputs after the weights, as shapes, and the function of (params, *inputs)."""
    config = model.config

    def shape(dtype: np.dtype, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    if function == "forward":
        return {"tokens": shape(_INT32, batch, max_length)}, lambda params, tokens: (
            forward(config, params, tokens),
        )
    if function == "step":
        empty = jax.eval_shape(lambda: kv.init_cache(config, batch, max_length, compute_dtype(model.params)))
        slots, structure = jax.tree.flatten(empty)

        def step(params: Any, tokens: Any, positions: Any, cache: list[Any]) -> tuple[Any, Any]:
            before = jax.tree.unflatten(structure, cache)
            logits, after = forward_cached(config, params, tokens[:, None], positions, before)
            return logits[:, 0], jax.tree.leaves(after)

        rows = shape(_INT32, batch)
        return {"tokens": rows, "positions": rows, "cache": slots}, step
    unused = tuple(getattr(model.tokenizer, "unused_ids", ()))  # rows of a padded vocabulary

    def continued(
        params: Any,
        tokens: Any,
        lengths: Any,
        seed: Any,
        temperature: Any,
        top_k: Any,
        top_p: Any,
        min_p: Any,
    ) -> tuple[Any, Any, Any]:
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        out = generate(
            config,
            params,
            tokens,
            lengths,
            jax.random.key(seed),
            Sampling(**settings, suppress_tokens=unused),
            max_new_tokens=max_new_tokens,
            eos_id=model.tokenizer.eos_ids,
        )
        return out.tokens, out.lengths, out.logprobs

    rows, numbers = shape(_INT32, batch), shape(_FLOAT32, batch)
    return {
        "tokens": shape(_INT32, batch, max_length - max_new_tokens),
        "lengths": rows,
        "seed": shape(_INT32),
        "temperature": numbers,
        "top_k": rows,
        "top_p": numbers,
        "min_p": numbers,
    }, continued


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, (list, tuple)):
        return {"tensors": [_described(one) for one in value]}
    return {"dtype": jnp.dtype(value.dtype).name, "shape": list(value.shape)}
