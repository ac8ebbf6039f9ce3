"""Compiles generation for a TPU slice without one: memory and collectives of the prompt's pass and of a step.

`python -m benchmarks.tpu_decode llama2_7b --topology v5p:2x2x2 --mesh context=8 --length 131072` prints one
JSON object per program. It needs `libtpu` and no TPU: every array is abstract.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from llama_jax.plan.topology import Topology
from llama_jax.train.planning.compiling import ENVIRONMENT

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def compile_both(
    config: Any, topology: Topology, mesh_spec: str, *, length: int, batch: int = 1
) -> dict[str, Any]:
    """The compiled programs of `generate` for `length` slots: `prefill` and `decode`.

    Args:
      config: the model; parameters and cache are bf16.
      topology: the slice.
      mesh_spec: as for `meshes.make_mesh`; it takes the whole slice.
      length: prompt and new tokens together.
      batch: rows.
    """
    import jax
    import jax.numpy as jnp

    from llama_jax import meshes, sharding
    from llama_jax.decoding import generation
    from llama_jax.decoding.sampling import Sampling
    from llama_jax.model import init, unstack

    mesh = meshes.make_mesh(mesh_spec, devices=topology.devices())
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, spec))  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: unstack(init(config, key, jnp.bfloat16)), key)
    specs = sharding.param_specs(config, scan_layers=False)
    params = jax.tree.map(place, params, specs)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    sampling = jax.eval_shape(lambda: Sampling().broadcast(batch))
    static = {"num_return_sequences": 1, "top_logprobs": 0, "cache_dtype": None}
    with jax.set_mesh(mesh):
        replicated = lambda x: place(x, jax.sharding.PartitionSpec())  # noqa: E731
        request = array(batch, length), array(batch), array(), key, sampling, array(8), array()
        prefill = generation._prefill_bucketed.lower(
            config, params, *jax.tree.map(replicated, request), **static
        )
        state = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to.sharding),
            jax.eval_shape(lambda *a: generation._prefill_bucketed(config, *a, **static), params, *request),
            prefill.out_info,
        )
        decode = generation.decode_program("tpu").lower(config, params, state, replicated(array()))
        return {"prefill": prefill.compile(), "decode": decode.compile()}


def report(compiled: Any) -> dict[str, Any]:
    """Bytes of a chip, and how often the program's text has each collective with results of each shape."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = re.findall(rf"= \(?(\w+\[[\d,]*\])[^=]*? ({COLLECTIVES})(?:-start)?\(", text)
    return {
        "peak_hbm_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "collectives": {f"{kind} {shape}": found.count((shape, kind)) for shape, kind in sorted(set(found))},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    os.environ.update(ENVIRONMENT)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_decode", description=__doc__)
    parser.add_argument("preset", help="such as llama2_7b")
    parser.add_argument("--topology", required=True)
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens of prompt and continuation")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer than the model's, for a quick compile")
    args = parser.parse_args(argv)
    from llama_jax import presets

    config = getattr(presets, args.preset.upper()).replace(max_position_embeddings=args.length)
    if args.layers:
        config = config.replace(num_hidden_layers=args.layers)
    programs = compile_both(
        config, Topology.parse(args.topology), args.mesh, length=args.length, batch=args.batch
    )
    for name, compiled in programs.items():
        print(json.dumps({"program": name, **report(compiled)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
