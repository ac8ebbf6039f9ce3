"""Whether each compiler work-around of `ops` is still needed: what XLA makes of the plain form.

The table is in the docstring of `llama_jax.ops`. A test fails with "this work-around can go" where XLA
compiles the plain form well: delete the work-around, its row and its test. It also fails where the
work-around no longer does what it is for. TPU programs are compiled without a TPU (`make pods`).
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import llama_jax as lj
from llama_jax import layers, meshes, ops, rope, sharding
from llama_jax.ops import blockwise_attention as blockwise
from llama_jax.ops import (
    compiler_options,
    eight_bit_operands,
    eight_bits,
    gradient_sums,
    layouts,
    linear,
    products,
    quantization,
    swiglu,
)
from llama_jax.ops.products import dot
from tests.optimized import optimized

F32, BF16, INT8 = jnp.float32, jnp.bfloat16, jnp.int8
JAX = f"JAX {jax.__version__}"


def array(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled(function: Any, *arguments: Any, **options: Any) -> str:
    """The optimized HLO for the CPU."""
    return optimized(jax.jit(function, **options).lower(*arguments)).as_text()


def results(hlo: str, *operations: str) -> list[str]:
    """The types of the results of some operations, such as `f32[2,3]`, in the whole program."""
    return re.findall(rf"= (\w+\[[\d,]*\])\S* (?:{'|'.join(operations)})\(", hlo)


def library_products(hlo: str) -> int:
    """How many products go to the matrix library of XLA:CPU: each is a custom fusion."""
    return len(re.findall(r" fusion\(.*kind=kCustom", hlo))


def check(name: str, *, plain_is_bad: bool, ours_is_good: bool = True) -> None:
    assert ours_is_good, f"{name}: the work-around has no effect on {JAX}; look at the HLO of both forms"
    assert plain_is_bad, f"{name}: {JAX} compiles the plain form well: this work-around can go"


def measures(name: str) -> bool:
    return name.startswith("test_") and "check" in globals()[name].__code__.co_names


def test_the_table_of_workarounds_names_each_test():
    rows = re.findall(r"^\| `.* (test_\w+) \|$", ops.__doc__ or "", re.MULTILINE)
    assert set(rows) == set(filter(measures, globals()))


def test_matvec_bf16_converts_the_weight():
    arguments = array(1, 1, 64, dtype=BF16), array(64, 160, dtype=BF16)
    equation = "btd,df->btf"
    plain = compiled(lambda x, w: dot(equation, x, w), *arguments)
    ours = compiled(lambda x, w: products.matvec(equation, x, w), *arguments)
    check(
        "matvec, bf16",
        plain_is_bad="f32[64,160]" in results(plain, "convert") and not library_products(plain),
        ours_is_good="f32[64,160]" not in results(ours, "convert"),
    )


def test_matvec_f32_is_one_loop():
    """The single stream itself cannot be seen in HLO; that the product is XLA's own loop can."""
    arguments = array(1, 1, 64), array(64, 160)
    equation = "btd,df->btf"
    plain = compiled(lambda x, w: dot(equation, x, w), *arguments)
    ours = compiled(lambda x, w: products.matvec(equation, x, w), *arguments)
    check(
        "matvec, f32",
        plain_is_bad=not library_products(plain) and results(plain, "dot") == ["f32[1,160]"],
        ours_is_good=results(ours, "dot") == [f"f32[{products._PARTS},1,160]"],
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_query_key_product_transposes_the_cache(dtype):
    arguments = array(1, 4, 2, 1, 16, dtype=dtype), array(1, 4, 128, 16, dtype=dtype)
    transposed = "bf16[1,4,16,128]" if dtype == BF16 else "f32[1,4,16,128]"
    plain = compiled(lambda q, k: dot("bkgth,bksh->bkgts", q, k), *arguments)
    ours = compiled(products.query_key_product, *arguments)
    check(
        "query_key_product",
        plain_is_bad=transposed in results(plain, "copy", "transpose"),
        ours_is_good=transposed not in results(ours, "copy", "transpose"),
    )


def test_weight_gradient_bf16_runs_in_f32():
    arguments = array(64, 32, dtype=BF16), array(64, 48, dtype=BF16)

    def of(x_transposed):
        return compiled(lambda x, y: dot("dt,tf->df", x_transposed(x), y), *arguments)

    plain, behind_barrier = of(lambda x: x.T), of(lambda x: jax.lax.optimization_barrier(x.T))
    ours = compiled(lambda x, y: products.weight_gradient("td", x, "tf", y, "df"), *arguments)
    check(
        "weight_gradient",
        plain_is_bad=all("f32[64,48]" in results(hlo, "convert") for hlo in (plain, behind_barrier)),
        ours_is_good=library_products(ours) > 0 and "lhs_contracting_dims={0}" not in ours,
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch", [1, 2])
def test_project_heads_transposes_wo(batch, dtype):
    arguments = array(batch, 1, 4, 16, dtype=dtype), array(4, 16, 64, dtype=dtype)
    plain = compiled(lambda x, wo: dot("btnh,nhd->btd", x, wo), *arguments)
    ours = compiled(linear.project_heads, *arguments)

    def transposes(hlo):
        return any(shape.endswith("[16,4,64]") for shape in results(hlo, "copy", "transpose"))

    check("project_heads", plain_is_bad=transposes(plain), ours_is_good=not transposes(ours))


def test_write_slices_copies_the_cache():
    def step(write: Any) -> str:
        def run(cache: jax.Array, new: jax.Array, start: jax.Array, q: jax.Array) -> Any:
            cache = write(cache, new, start)
            return cache, jax.nn.softmax(products.query_key_product(q, cache))

        arguments = array(1, 4, 128, 16), array(1, 4, 1, 16), array(1, dtype=jnp.int32), array(1, 4, 2, 1, 16)
        return compiled(run, *arguments, donate_argnums=0)

    def update(row: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=1)

    plain, ours = step(jax.vmap(update)), step(layouts.write_slices)
    check(
        "write_slices",
        plain_is_bad="f32[1,4,128,16]" in results(plain, "copy"),
        ours_is_good="f32[1,4,128,16]" not in results(ours, "copy"),
    )


def test_a_write_to_fp8_converts_the_cache():
    def write(dtype: Any) -> str:
        arguments = array(2, 4, 128, 16, dtype=dtype), array(2, 4, 1, 16, dtype=dtype)
        return compiled(layouts.write_slices, *arguments, array(2, dtype=jnp.int32), donate_argnums=0)

    plain, ours = write(jnp.float8_e4m3fn), write(layouts.fp8_bits(jnp.zeros(1)).dtype)
    whole = "f16[2,4,128,16]"
    check("fp8_bits", plain_is_bad=whole in results(plain, "convert"), ours_is_good=whole not in ours)


def quantized() -> quantization.Quantized:
    values, scale = array(64, 32, dtype=INT8), array(64, 1)
    return quantization.Quantized(values, scale, None, (32, 64), (0,), jnp.dtype("float32"), 8)


def test_loops_hoist_dequantization():
    def loop(product: Any) -> str:
        def run(x: jax.Array, weight: quantization.Quantized) -> jax.Array:
            return jax.lax.fori_loop(0, 10, lambda _, x: product(x, weight)[..., :32], x)

        hlo = compiled(run, array(1, 40, 32), quantized())
        return next(line for line in hlo.splitlines() if " while(" in line)

    plain = loop(functools.partial(quantization._dequantized_product, out_spec=None))
    ours = loop(quantization._late_product)
    check(
        "quantization, loops",
        plain_is_bad="f32[64,32]" in plain and "s8[64,32]" not in plain,
        ours_is_good="s8[64,32]" in ours and "f32[64,32]" not in ours,
    )


def test_int8_matvec_converts_the_weight():
    plain = compiled(
        lambda x, w: jnp.einsum("ri,oi->ro", x, w, preferred_element_type=jnp.int32),
        array(1, 32, dtype=INT8),
        array(64, 32, dtype=INT8),
    )
    ours = compiled(quantization._int8_product, array(1, 1, 32), quantized())
    check(
        "quantization, int8",
        plain_is_bad="s32[64,32]" in results(plain, "convert"),
        ours_is_good="s32[64,32]" not in results(ours, "convert") and library_products(ours) == 1,
    )


def test_xla_prefers_256_bits(tmp_path):
    def widths(name: str, options: dict[str, int] | None) -> set[str]:
        folder = tmp_path / name
        folder.mkdir()
        dump = {"xla_dump_to": str(folder), "xla_dump_emitter_re": ".*"}
        compiled(jnp.dot, array(1, 64), array(64, 64), compiler_options=dump | (options or {}))
        texts = [path.read_text() for path in folder.glob("*.ll")]
        return {width for text in texts for width in re.findall(r'"prefer-vector-width"="(\d+)"', text)}

    plain, ours = widths("plain", None), widths("ours", compiler_options.decode_options("cpu"))
    check("decode_options", plain_is_bad=plain == {"256"}, ours_is_good=ours == {"512"})
    assert compiler_options.decode_options("tpu") is None


def tiles(dtype: Any = F32) -> tuple[Any, ...]:
    """Arguments of `blockwise._tiled_attention`: 4 blocks of 8 queries and of 8 keys, 6 heads."""
    at = array(4, 6, 8, dtype=jnp.int32)
    keys = array(4, 6, 8, 16, dtype=dtype)
    return array(4, 6, 2, 8, 16, dtype=dtype), keys, keys, (at, at), (at, at)


def test_tiles_hold_all_heads():
    plain = compiled(blockwise._forward, *tiles())
    ours = compiled(lambda *arguments: blockwise._map_heads(blockwise._forward, arguments), *tiles())
    check(
        "blockwise_attention, heads",
        plain_is_bad=any(shape in results(plain, "dot") for shape in ("f32[6,2,8,8]", "f32[6,16,8]")),
        ours_is_good=not any(shape in results(ours, "dot") for shape in ("f32[6,2,8,8]", "f32[6,16,8]")),
    )


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="JAX 0.12 writes it in bf16; goes with JAX 0.10")
def test_loops_convert_bf16_stacks():
    def stack(dtype: Any) -> str:
        return compiled(
            lambda xs: jax.lax.map(lambda x: jnp.tanh(x @ x).astype(dtype), xs), array(8, 16, 16, dtype=BF16)
        )

    check(
        "blockwise_attention, f32 results",
        plain_is_bad="bf16[8,16,16]" in results(stack(BF16), "convert"),
        ours_is_good="bf16[8,16,16]" not in results(stack(F32), "convert"),
    )


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.12 keeps them; goes with JAX 0.10")
def test_partial_shard_map_gathers(monkeypatch):
    """The sharding of an argument at the border of a `shard_map` over another axis."""
    mesh = meshes.make_mesh("data=2,fsdp=4")
    w, rows = (
        jax.ShapeDtypeStruct((8, 8), F32, sharding=sharding.named(mesh, spec))
        for spec in (P(None, "fsdp"), P("data", None))
    )

    def border() -> str:
        with jax.set_mesh(mesh):
            function = gradient_sums.sum_over_data(lambda w, rows: (rows.sum(), w), F32)
            text = jax.jit(function).lower(w, rows).as_text()
        return text[text.index("in_shardings=[") : text.index('manual_axes={"data"}')]

    ours = border()
    corrected = gradient_sums.shard_map_lib._shardy_shard_map_sharding
    monkeypatch.setattr(gradient_sums, "_keep_explicit_shardings", lambda: None)
    monkeypatch.setattr(gradient_sums.shard_map_lib, "_shardy_shard_map_sharding", corrected.__wrapped__)
    check("sum_over_data", plain_is_bad="fsdp" not in border(), ours_is_good="fsdp" in ours)


def test_scans_hoist_masks(monkeypatch):
    """JAX moves what does not depend on the carry out of a differentiated scan: here T x S masks."""
    length, block = 32, 8

    def gradient(width: int) -> str:
        def loss(weights: jax.Array, at: jax.Array) -> jax.Array:
            def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
                q = (x @ weight)[:, None]
                where = at, jnp.zeros_like(at)
                return blockwise.blockwise_attention(q, x, x, where, where, block_size=block)[:, 0], None

            x = jnp.ones((2, length, width))
            return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

        arguments = jnp.ones((3, width, width)), jnp.zeros((2, length), jnp.int32)
        return str(jax.make_jaxpr(jax.grad(loss))(*arguments))

    def has_whole_masks(jaxpr: str) -> bool:
        blocks = length // block
        return f"bool[{blocks},{blocks}" in jaxpr

    ours = gradient(16)
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda operands: operands)
    plain = gradient(24)  # another width: nothing that was traced before is taken for it
    check(
        "blockwise_attention, masks",
        plain_is_bad=has_whole_masks(plain),
        ours_is_good=not has_whole_masks(ours),
    )


# What is chosen by platform goes by the one that is lowered for.


def lowered_for(platform: str, function: Any, *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def forward_and_gradient(dtype: Any, length: int) -> tuple[Any, ...]:
    config = lj.presets.TINY
    params = jax.eval_shape(lambda key: lj.init(config, key, dtype), jax.random.key(0))
    tokens = array(1, length, dtype=jnp.int32)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return lj.next_token_loss(config, params, tokens, attention_backend="blockwise", custom_vjp=True).mean

    return lambda p, t: lj.forward(config, p, t), jax.grad(loss), params, tokens


@pytest.mark.parametrize(("length", "dtype"), [(1, F32), (24, BF16)])
def test_model_and_gradient_lower_for_tpu_without_one(length, dtype):
    """On this machine, whose default backend is the CPU."""
    forward, gradient, params, tokens = forward_and_gradient(dtype, length)
    cpu, tpu = (lowered_for(platform, forward, params, tokens) for platform in ("cpu", "tpu"))
    assert ("concatenate" in cpu) and (cpu != tpu) == (length == 1)
    cpu, tpu = (lowered_for(platform, gradient, params, tokens) for platform in ("cpu", "tpu"))
    assert "LayoutConstraint" in tpu and "LayoutConstraint" not in cpu
    if dtype == BF16:
        assert "stablehlo.reverse" in cpu and "stablehlo.reverse" not in tpu


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_matvec_is_a_plain_product_for_other_platforms(dtype):
    arguments = array(1, 1, 64, dtype=dtype), array(64, 160, dtype=dtype)
    run = functools.partial(products.matvec, "btd,df->btf")
    for platform, plain in (("cpu", False), ("tpu", True), ("cuda", True)):
        text = lowered_for(platform, run, *arguments)
        assert (len(re.findall("concatenate|stablehlo.reduce", text)) == 0) == plain, platform


# Compiled for TPUs by libtpu.


def tpu_devices(topology: str) -> Any:
    pytest.importorskip("libtpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from llama_jax.plan.topology import Topology

    return Topology.parse(topology).devices()


def compiled_for_tpu(function: Any, *arguments: jax.ShapeDtypeStruct) -> str:
    place = jax.sharding.SingleDeviceSharding(tpu_devices("v5p:2x2x1")[0])
    placed = (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arguments)
    return jax.jit(function).lower(*placed).compile().as_text()


@pytest.mark.pods
def test_silu_is_fused_into_products():
    def gradient(plain: bool) -> str:
        replicated = {"out_spec": P(None, None, None), "custom_vjp": True}

        def loss(x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array) -> jax.Array:
            gate, up = (
                linear.project("btd,df->btf", x, w, weight_spec=P(None, None), **replicated)
                for w in (w_gate, w_up)
            )
            if plain:
                y = swiglu.swiglu(gate, up)
                out = linear.project("btf,fd->btd", y, w_down, weight_spec=P(None, None), **replicated)
            else:
                out = swiglu.swiglu_down(gate, up, w_down, custom_vjp=True)
            return (out.astype(F32) ** 2).sum()

        shapes = (1, 1024, 512), (512, 1408), (512, 1408), (1408, 512)
        arguments = (array(*shape, dtype=BF16) for shape in shapes)
        return compiled_for_tpu(jax.grad(loss, (0, 1, 2, 3)), *arguments)

    def fused(hlo: str) -> int:
        computations = re.split(r"\n(?=%|ENTRY)", hlo)
        return sum(" convolution(" in text and " exponential(" in text for text in computations)

    check("swiglu_down", plain_is_bad=fused(gradient(True)) > 0, ours_is_good=fused(gradient(False)) == 0)


@pytest.mark.pods
def test_int8_products_run_at_half_their_rate():
    from llama_jax.plan import hlo

    def cycles(function: Any) -> int:
        arguments = array(2, 2048, 2048, dtype=INT8), array(2, 2048, 8192, dtype=INT8)
        return hlo.estimated_cycles(hlo.parse(compiled_for_tpu(function, *arguments)))

    plain = cycles(lambda x, g: eight_bit_operands.product("btd,btf->df", x, g))
    ours = cycles(
        lambda x, g: eight_bit_operands.product("dt,tf->df", eight_bits._tokens_last(x), g.reshape(4096, -1))
    )
    check("eight_bits._tokens_last", plain_is_bad=plain > ours)


PLAIN_FOR_TPU = {
    "rotary.rotate_custom_vjp": (
        rope,
        "rotate_custom_vjp",
        lambda x, *table: rope.rotate(x, rope.Rotary(*table)),
    ),
    "layouts.row_major": (layers, "row_major", lambda x: x),
    "layouts.materialize_cotangent": (layers, "materialize_cotangent", lambda x: x),
    "linear.project_heads": (
        layers,
        "project_heads",
        lambda heads, wo, custom_vjp: project_flat_heads(heads, wo),
    ),
}


def project_flat_heads(heads: jax.Array, wo: jax.Array) -> jax.Array:
    heads, wo = heads.reshape(*heads.shape[:2], -1), wo.reshape(-1, wo.shape[-1])
    specs = {"weight_spec": sharding.DOWN_FD, "out_spec": sharding.ACT_BTD}
    return linear.project("btf,fd->btd", heads, wo, **specs, custom_vjp=True)


@functools.cache
def cycles_of_the_7b_step(plain: str | None) -> int:
    """The compiler's estimate for configs/llama2_7b.toml on v5p:2x2x1, with one work-around taken out."""
    tpu_devices("v5p:2x2x1")
    from benchmarks.programs import PROGRAMS
    from llama_jax.plan import hlo

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        if plain is not None:
            patch.setattr(*PLAIN_FOR_TPU[plain])
        lowered = PROGRAMS["train_llama2_7b_v5p_2x2x1"].lower()
    jax.clear_caches()
    return hlo.estimated_cycles(hlo.parse(lowered.compile().as_text()))


@pytest.mark.pods
@pytest.mark.skipif(
    "TEST_7B_CYCLES" not in os.environ, reason="compiles the 7B step 5 times; set TEST_7B_CYCLES=1"
)
@pytest.mark.parametrize("name", PLAIN_FOR_TPU)
def test_the_7b_step_takes_more_cycles(name):
    check(name, plain_is_bad=cycles_of_the_7b_step(name) > cycles_of_the_7b_step(None))
