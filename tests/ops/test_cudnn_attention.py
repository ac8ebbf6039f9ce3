"""Attention by cuDNN: its call equals the xla backend, and CUDA programs hold the calls and no scores.

Values are computed by the same call with `implementation="xla"`, which runs anywhere; that cuDNN computes the
same is measured on a GPU (`make gpu`).
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import meshes, sharding
from llama_jax.errors import ConfigError
from llama_jax.ops.cudnn_attention import cudnn_attention, refusal
from tests import cuda
from tests.ops.test_splash_attention import expected, inputs, thirds, value_and_gradients

RUN = {"batch": 2, "length": 64, "heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": jnp.dtype(jnp.bfloat16)}
MODEL = lj.LlamaConfig(
    vocab_size=128,
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)


@pytest.mark.parametrize(("kv_heads", "segmented"), [(1, True), (2, False), (4, True)])
def test_equals_xla_in_value_and_gradient(kv_heads, segmented):
    q, k, v, coeffs = inputs(length=40, kv_heads=kv_heads, head_dim=16)
    segments = thirds(2, 40) if segmented else None
    attend = functools.partial(cudnn_attention, segment_ids=segments, implementation="xla")
    found = value_and_gradients(attend, q, k, v, coeffs)
    for ours, theirs in zip(found, expected(q, k, v, coeffs, segments), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2"])
def test_meshes_equal_one_device(mesh):
    arrays = inputs(batch=4, length=40, head_dim=16)
    segments = thirds(4, 40)
    wanted = expected(*arrays, segments)
    with jax.set_mesh(meshes.make_mesh(mesh)):
        rows = [sharding.ACT_BTNH, sharding.CACHE_BKSH, sharding.CACHE_BKSH, sharding.ACT_BTNH]
        laid = [sharding.constrain(array, spec) for array, spec in zip(arrays, rows, strict=True)]
        split = sharding.constrain(segments, sharding.TOKENS_BT)
        attend = functools.partial(cudnn_attention, segment_ids=split, implementation="xla")
        found = value_and_gradients(attend, *laid)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def gradient(q, k, v, segments):
    return jax.grad(lambda *qkv: cudnn_attention(*qkv, segments).astype(jnp.float32).sum(), (0, 1, 2))(
        q, k, v
    )


@pytest.mark.parametrize("segmented", [False, True])
def test_cuda_programs_call_cudnn_and_hold_no_scores(segmented):
    """Keys are not repeated for their group, and only packed rows have something of T x T: one mask."""
    length = 48
    q, k, v, _ = inputs(length=length, dtype=jnp.bfloat16)
    text = cuda.lowered(jax.jit(gradient), q, k, v, thirds(2, length) if segmented else None)
    assert cuda.attention_calls(text) == (1, 1)
    square = {shape for shape in cuda.shapes(text) if shape[-2:] == (length, length)}
    assert square == ({(2, length, length), (2, 1, length, length)} if segmented else set())
    assert (2, length, 2, 64) in cuda.shapes(text)
    assert "CAUSAL" in text


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "fsdp=4,context=2"])
def test_each_device_of_a_mesh_calls_cudnn_on_its_own_shard(mesh):
    shapes = (4, 48, 4, 64), (4, 2, 48, 64), (4, 2, 48, 64)
    specs = sharding.ACT_BTNH, sharding.CACHE_BKSH, sharding.CACHE_BKSH
    mesh = meshes.make_mesh(mesh)
    with jax.set_mesh(mesh):
        args = [
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.named(mesh, spec))
            for shape, spec in zip(shapes, specs, strict=True)
        ]
        text = cuda.lowered(jax.jit(lambda *qkv: gradient(*qkv, None)), *args)
    assert cuda.attention_calls(text) == (1, 1)
    heads, queries = 4 // mesh.shape["tensor"], 48 // mesh.shape["context"]
    assert (1, queries, heads, 64) in cuda.shapes(text)
    assert any(shape[-2:] == (queries, 48) for shape in cuda.shapes(text)) == (mesh.shape["context"] > 1)


@pytest.mark.parametrize(
    ("remat", "forward_calls"), [("none", 1), ("attention", 1), ("save_projections", 1), ("full", 2)]
)
def test_the_kernel_runs_again_only_under_full_rematerialization(remat, forward_calls):
    """Layers are scanned: the program has one forward and one backward loop."""
    options = lj.ForwardOptions(dtype="bfloat16", attention_backend="cudnn", remat=remat, custom_vjp=True)
    params = jax.eval_shape(functools.partial(lj.init, MODEL), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)

    def loss(params, tokens):
        mask = jnp.ones(tokens.shape, bool)
        return lj.next_token_loss(MODEL, params, tokens, mask, segment_ids=tokens, options=options).mean

    text = cuda.lowered(jax.jit(jax.grad(loss)), params, tokens)
    assert cuda.attention_calls(text) == (forward_calls, 1)
    assert not {shape for shape in cuda.shapes(text) if len(shape) > 4 and shape[-2:] == (32, 32)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": jnp.dtype(jnp.float32)}, "its dtypes are bfloat16 and float16, and .* in float32"),
        ({"head_dim": 60}, "head dim must be <= 128 and a multiple of 8, but got 60"),
        ({"batch": 64, "length": 8192}, r"mask of 64 packed rows of 8192 tokens has 8.6 GB .* than 2.1 GB"),
        ({"length": 63}, "Unsupported sequence length Q 63, KV 63"),
        (
            {"device": SimpleNamespace(compute_capability="7.5", device_kind="Tesla T4")},
            "Tesla T4 has compute capability 7.5; flash attention needs 8.0",
        ),
    ],
)
def test_what_cudnn_refuses_has_a_reason(changes, words):
    with cuda.cudnn():
        assert refusal(**RUN) is None
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(refusal(**RUN | changes))


def test_a_kernel_that_does_not_compile_is_a_refusal():
    """On a device of this process the call is compiled: here for the CPU, which has no such kernel."""
    with cuda.cudnn():
        assert "not found for platform cpu" in str(refusal(**RUN, device=jax.devices()[0]))


def test_without_cudnn_the_backend_is_a_one_line_error():
    q, k, v, _ = inputs(length=16)
    assert refusal(**RUN) == "cuDNN is not detected"
    with pytest.raises(
        ConfigError, match=r"cuDNN refuses .* cuDNN is not detected; use the xla or blockwise"
    ):
        cudnn_attention(q, k, v)
    with pytest.raises(ConfigError, match="as many keys as queries and got 16 and 8"):
        cudnn_attention(q[:, :8], k, v)
