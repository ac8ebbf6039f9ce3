"""Meshes of 8 simulated devices give the results of one device."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import llama_jax as lj
from llama_jax import meshes, sharding
from llama_jax.errors import ConfigError
from tests.random_models import random_prompts

CONFIG = lj.presets.TINY
KEY = jax.random.key(0)


@functools.cache
def prompts():
    tokens, lengths = random_prompts(0, CONFIG, [5, 32, 1, 9, 8, 8, 30, 2])
    return np.where(tokens < CONFIG.vocab_size, tokens, 0), lengths


@pytest.fixture(scope="module")
def params():
    """In numpy, of which parts are cut for a mesh without compiling programs."""
    return jax.device_get(lj.init(CONFIG, KEY))


@functools.partial(jax.jit, static_argnums=2)
def losses(params, tokens, backend):
    """Logits, mean loss and its gradients."""
    options = lj.ForwardOptions(attention_backend=backend, remat="full")
    mean = lambda params: lj.next_token_loss(CONFIG, params, tokens, options=options).mean  # noqa: E731
    logits = lj.forward(CONFIG, params, tokens, attention_backend=backend)
    return logits, *jax.value_and_grad(mean)(params)


def generate(params):
    """Greedy and sampled rows."""
    sampling = lj.Sampling(temperature=np.array([0, 1] * 4), top_p=0.9, repetition_penalty=1.2)
    return lj.generate(CONFIG, params, *prompts(), KEY, sampling, max_new_tokens=6, eos_id=[3, 40])


@pytest.fixture(scope="module")
def alone(params):
    """Results without a mesh."""
    return losses(params, prompts()[0], "xla")


# Each axis, and one of all devices; `test_fused_cross_entropy.py` has the other backend for fsdp and context.
@pytest.mark.parametrize(
    ("spec", "backend"),
    [
        ("data=2,fsdp=2,tensor=2", "xla"),
        ("data=2,context=2,tensor=2", "blockwise"),
        ("context=8", "xla"),
    ],
)
def test_losses_on_a_mesh_equal_those_of_one_device(params, alone, spec, backend):
    mesh = meshes.make_mesh(spec)
    with jax.set_mesh(mesh):
        logits, value, grads = losses(lj.shard_params(params, mesh, CONFIG), prompts()[0], backend)
    np.testing.assert_allclose(logits, alone[0], atol=2e-6)
    np.testing.assert_allclose(value, alone[1], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, alone[2])


def test_parameters_and_generation_on_a_mesh_equal_those_of_one_device(params):
    expected = generate(params)
    with jax.set_mesh(meshes.make_mesh("fsdp=2,context=2,tensor=2")):
        here = lj.init(CONFIG, KEY)
        jax.tree.map(np.testing.assert_array_equal, here, params)
        out = generate(here)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)


def test_parameters_are_sharded_as_in_the_table(params):
    mesh = meshes.make_mesh("fsdp=4,tensor=2")
    specs = sharding.param_specs(CONFIG)
    with jax.set_mesh(mesh):
        made = lj.init(CONFIG, KEY)
    laid = lj.shard_params(params, mesh, CONFIG)
    unstacked = lj.shard_params(lj.unstack(params), mesh, CONFIG)
    for tree in (made, laid):
        jax.tree.map(
            lambda leaf, spec: (
                leaf.sharding.is_equivalent_to(sharding.named(mesh, spec), leaf.ndim)
                or pytest.fail(str(spec))
            ),
            tree,
            specs,
        )
        jax.tree.map(np.testing.assert_array_equal, tree, params)
    assert made["layers"]["attention"]["wq"].addressable_shards[0].data.shape == (2, 16, 4, 8)
    down = made["layers"]["feed_forward"]["w_down"]
    assert down.addressable_shards[0].data.shape == (2, CONFIG.intermediate_size // 2, 16)
    assert unstacked["layers"][0]["attention"]["wq"].addressable_shards[0].data.shape == (16, 4, 8)


def test_out_sharding_has_only_axes_of_the_mesh(params):
    tokens = np.ones((4, 8), np.int32)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    expected = lj.forward(CONFIG, params, tokens)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(lj.forward(CONFIG, lj.init(CONFIG, KEY), tokens), expected, atol=2e-6)
    with jax.set_mesh(jax.make_mesh((8,), ("mine",), axis_types=(AxisType.Auto,))):
        np.testing.assert_allclose(lj.forward(CONFIG, params, tokens), expected, atol=2e-6)


def test_70b_loss_traces_on_an_abstract_pod():
    config = lj.presets.LLAMA2_70B
    mesh = AbstractMesh((1, 64, 1, 8), meshes.AXES, axis_types=(AxisType.Explicit,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding.named(mesh, spec)
            ),
            jax.eval_shape(lambda key: lj.init(config, key), KEY),
            sharding.param_specs(config),
        )
        tokens = jax.ShapeDtypeStruct((64, 4096), jnp.int32)
        mean = lambda p, t: lj.next_token_loss(config, p, t, remat="full").mean  # noqa: E731
        grads = jax.eval_shape(jax.grad(mean), params, tokens)
    assert (
        grads["layers"]["attention"]["wq"].sharding.spec == params["layers"]["attention"]["wq"].sharding.spec
    )


def test_make_mesh_parses_a_string():
    assert dict(meshes.make_mesh("fsdp=4, tensor=2").shape) == {
        "data": 1,
        "fsdp": 4,
        "context": 1,
        "tensor": 2,
    }
    assert dict(meshes.make_mesh("fsdp=-1,tensor=2").shape)["fsdp"] == 4
    assert dict(meshes.make_mesh({"data": 8}).shape)["data"] == 8


def test_mesh_sizes_need_no_devices():
    assert meshes.mesh_sizes("fsdp=-1,tensor=8", 256) == {"data": 1, "fsdp": 32, "context": 1, "tensor": 8}
    with pytest.raises(
        ConfigError, match="mesh data 2 x fsdp 3: it takes 6 of 256 devices, and must take all"
    ):
        meshes.mesh_sizes({"fsdp": 3, "data": 2}, 256)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX looks at in a device when it lays a mesh over a torus."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def torus(*sides, kind="TPU v5", slice_index=0):
    first = slice_index * math.prod(sides)
    coords = enumerate(itertools.product(*map(range, sides)), first)
    return [Chip(i, (*at, 0, 0)[:3], kind, slice_index=slice_index) for i, at in coords]


@pytest.mark.parametrize(
    ("kind", "sides"),
    [
        ("TPU v4", (4, 4, 4)),
        ("TPU v5", (2, 2, 4)),
        ("TPU v5", (4, 4, 4)),
        ("TPU v5", (4, 8, 8)),
        ("TPU v5 lite", (4, 4)),
        ("TPU v6 lite", (16, 16)),
        ("TPU7x", (4, 4, 8)),
    ],
)
def test_every_mesh_of_powers_of_two_can_be_laid_over_a_torus(kind, sides):
    chips = torus(*sides, kind=kind)
    exponents = math.prod(sides).bit_length() - 1
    for shape in itertools.product(range(exponents + 1), repeat=4):
        if sum(shape) == exponents:
            sizes = {name: 2**power for name, power in zip(meshes.AXES, shape, strict=True)}
            mesh = meshes.make_mesh(sizes, devices=chips)
            assert dict(mesh.shape) == sizes
            assert {*mesh.devices.flat} == {*chips}


def test_the_tensor_axis_lies_on_neighbours_of_a_torus():
    mesh = meshes.make_mesh("fsdp=32,tensor=2", devices=torus(4, 4, 4))
    first, second = np.moveaxis(mesh.devices, -1, 0).reshape(2, -1)
    for a, b in zip(first, second, strict=True):
        apart = [min((x - y) % 4, (y - x) % 4) for x, y in zip(a.coords, b.coords, strict=True)]
        assert sum(apart) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fsdp=4,model=2", "mesh axis 'model' is unknown; the axes are data, fsdp, expert, context, tensor"),
        ("fsdp=x", "mesh part 'fsdp=x' is not AXIS=SIZE"),
        ("fsdp", "mesh part 'fsdp' is not AXIS=SIZE"),
        ("fsdp=0", "mesh axis fsdp has size 0"),
        ("fsdp=-1,data=-1", "both -1"),
        ("fsdp=4,fsdp=8", "mesh axis fsdp is given twice"),
        ({"fsdp": "8"}, "mesh axis fsdp has size '8'; it must be a whole number"),
        ("fsdp=3", "mesh fsdp 3: it takes 3 of 8 devices, and must take all"),
        (
            "fsdp=16",
            "mesh fsdp 16: it needs 16 devices and there are 8; CPU devices can be simulated: ",
        ),
    ],
)
def test_invalid_meshes_are_errors(spec, message):
    with pytest.raises(ConfigError) as error:
        meshes.make_mesh(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_error_names_the_sizes_that_divide_the_model():
    config = CONFIG.replace(num_attention_heads=6, num_key_value_heads=3, vocab_size=257, head_dim=8)
    with pytest.raises(ConfigError) as error:
        sharding.check_mesh(config, meshes.make_mesh("tensor=8"))
    text = str(error.value)
    assert "attention.wk: num_key_value_heads 3 does not divide over axis tensor of size 8" in text
    assert "(sizes that would: 1, 3)" in text
    assert "embed.embedding: vocab_size 257" in text and "attention.wq: num_attention_heads 6" in text
    with (
        jax.set_mesh(meshes.make_mesh("tensor=8")),
        pytest.raises(ConfigError, match="num_key_value_heads 3"),
    ):
        lj.init(config, KEY)


def test_error_names_all_axes_that_divide_parameters():
    config = CONFIG.replace(hidden_size=36, head_dim=8)
    message = (
        r"hidden_size 36 does not divide over axis fsdp x context of size 8 \(sizes that would: 1, 2, 3, 4\)"
    )
    with pytest.raises(ConfigError, match=message):
        sharding.check_mesh(config, meshes.make_mesh("fsdp=2,context=4"))


def test_a_sequence_that_tensor_does_not_divide_is_sharded_over_context(params):
    with jax.set_mesh(meshes.make_mesh("fsdp=2,context=2,tensor=2")):
        for length, expected in ((8, sharding.SEQUENCE), (6, "context"), (1, None)):
            assert sharding.out_sharding(sharding.ACT_BTD, (2, length, 64))[1] == expected


def test_error_names_a_batch_size_that_divides(params):
    mesh = meshes.make_mesh("fsdp=8")
    sharded = lj.shard_params(params, mesh, CONFIG)
    message = r"batch of 3 rows does not divide .* of size 8; use a multiple of 8"
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=message):
        lj.forward(CONFIG, sharded, np.ones((3, 4), np.int32))


def test_mesh_may_omit_axes(params):
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    sharded = lj.shard_params(params, mesh, CONFIG)
    assert sharded["layers"]["attention"]["wq"].addressable_shards[0].data.shape == (2, 64, 4, 8)


def test_forward_checks_the_model_against_the_mesh(params):
    with (
        jax.set_mesh(meshes.make_mesh("tensor=8")),
        pytest.raises(ConfigError, match="num_key_value_heads 4 does not divide over axis tensor of size 8"),
    ):
        lj.forward(CONFIG, params, np.ones((1, 4), np.int32))
