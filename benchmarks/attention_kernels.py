"""The compiler's final schedule of attention kernels on TPU: ours beside JAX's splash attention.

    python -m benchmarks.attention_kernels v5p:2x2x1 [v6e:2x2 ...]

No TPU is needed. libtpu writes the bundles that a core issues, one a cycle; stalls for memory come on top.
Each kernel is compiled in a process of its own, since libtpu reads its flags once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import page_table

LENGTH, HEADS, HEAD_DIM = 4096, 8, 128
TILE = 1024  # bundles are per tile of so many queries and keys
SIDES = {"ours": 512, "JAX": 1024}  # of the tile that a trip of the loop computes
KERNELS = ("forward", "gradient")


def largest_block(folder: Path) -> tuple[int, float]:
    """Bundles of the block between branches with the most products; the share of MXU slots in use."""
    (bundles,) = folder.glob("*splash*-final_bundles.txt")
    if "schedule-analysis" in bundles.name:
        raise ValueError(f"{bundles} is no program")
    (use,) = folder.glob("*splash*final_hlo-static-per-bundle-utilization.txt")
    table = use.read_text().split("== UTILIZATION:\n")
    capacity = int(re.findall(r"\d+", table[0])[0])
    products = [int(line.split()[0]) for line in table[1].splitlines() if line[:1].isdigit()]
    marks = [0]
    for line in bundles.read_text().splitlines():
        found = re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w*)\s*:[> ]*\{", line)
        if found and (found[2] or "sbr.rel" in line):
            marks.append(int(found[1], 16))
    blocks = [(start, end) for start, end in itertools.pairwise(marks) if end > start]
    most = max(sum(products[start:end]) for start, end in blocks)
    # Of the loops with and without a mask the latter.
    start, end = min(
        (block for block in blocks if sum(products[slice(*block)]) > 0.9 * most), key=lambda b: b[1] - b[0]
    )
    return end - start, sum(products[start:end]) / (capacity * (end - start))


def compile_kernel(whose: str, kernel: str, topology_name: str) -> None:
    """Compiles one kernel in this process, whose environment tells libtpu where to write."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import SingleDeviceSharding

    from llama_jax.ops.splash_forward import attention_forward
    from llama_jax.ops.splash_gradient import attention_gradients

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices[0]
    layout = SingleDeviceSharding(device)
    tokens = jax.ShapeDtypeStruct((2, LENGTH, HEADS, HEAD_DIM), jnp.bfloat16, sharding=layout)
    rows = jax.ShapeDtypeStruct((2, HEADS, LENGTH, HEAD_DIM), jnp.bfloat16, sharding=layout)
    if whose == "ours" and kernel == "forward":
        jax.jit(lambda q, k, v: attention_forward(q, k, v, None, None, causal=True)).lower(
            tokens, rows, rows
        ).compile()
    elif whose == "ours":
        sums = jax.ShapeDtypeStruct(rows.shape[:3], jnp.float32, sharding=layout)
        jax.jit(
            lambda q, k, v, out, lse, d: attention_gradients(q, k, v, None, None, out, lse, d, causal=True)
        ).lower(tokens, rows, rows, tokens, sums, tokens).compile()
    else:
        sides = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), SIDES["JAX"])
        blocks = kernels.BlockSizes(
            **sides, block_kv_compute=512, block_kv_dkv_compute=512, use_fused_bwd_kernel=True
        )
        attend = kernels.make_splash_mqa(
            masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))]),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
        )

        def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jax.vmap(jax.vmap(lambda q, k, v: attend(q[None], k, v)[0]))(q, k, v)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return whole(q, k, v).astype(jnp.float32).sum()

        function = whole if kernel == "forward" else jax.grad(loss, (0, 1, 2))
        jax.jit(function).lower(rows, rows, rows).compile()


def measure(whose: str, kernel: str, topology_name: str) -> tuple[int, float]:
    """Bundles per `TILE` by `TILE` scores, and the share of the MXUs' slots in use."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
        environment = {
            "LIBTPU_INIT_ARGS": flags,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        command = [
            sys.executable,
            "-m",
            "benchmarks.attention_kernels",
            "--one",
            whose,
            kernel,
            topology_name,
        ]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        for path in Path(folder).iterdir():  # of a gradient, JAX's forward kernel too
            is_wanted = kernel == "forward" or whose == "ours" or "dkv" in path.name
            if "splash" not in path.name or not is_wanted or "schedule-analysis" in path.name:
                path.unlink()
        bundles, share = largest_block(Path(folder))
    return bundles * (TILE // SIDES[whose]) ** 2, share


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_kernels", description=__doc__)
    parser.add_argument("topologies", nargs="*", help="such as v5p:2x2x1")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.one:
        compile_kernel(*args.one)
        return 0
    found = {
        name: {kernel: {whose: measure(whose, kernel, name) for whose in SIDES} for kernel in KERNELS}
        for name in args.topologies
    }
    if args.json:
        print(json.dumps(found))
        return 0
    rows = [
        [name, kernel, *(f"{bundles:,} ({share:.0%})" for bundles, share in each.values())]
        for name, kernels in found.items()
        for kernel, each in kernels.items()
    ]
    print(page_table.markdown(["slice", "kernel", *SIDES], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
