# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sharding: one training step on one device and on eight
#
# The model code of this library does not depend on the number of devices. Each parameter and activation has
# a partition spec in one table (`llama_jax/sharding.py`); JAX carries it in the type of every array, and
# the compiler inserts the collectives. So the questions are: how are arrays sharded, is the step still the
# same, and what is communicated?
#
# This does not need eight chips. XLA simulates eight devices on this CPU, with a flag set before JAX is
# imported. Their speed is meaningless; shardings, values, memory and communication are those of a real
# program.

# %%
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import collections
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import style
from matplotlib.patches import Rectangle

import llama_jax as lj
from llama_jax import sharding

sys.path.append(str(Path(style.__file__).parents[1]))  # for benchmarks/, which is not in the package
from llama_jax.plan import collectives, hlo

style.use()
assert jax.device_count() == 8
config = lj.LlamaConfig(
    vocab_size=256,  # bytes: the training text is this notebook
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
)
B, T = 16, 128
print(f"{config.num_params / 1e6:.1f}M parameters, {style.nbytes(4 * config.num_params)} in f32")

# %% [markdown]
# ## 1. How arrays are sharded
#
# A mesh is a grid of devices with named axes. `data` and `fsdp` split the batch; `fsdp` also splits every
# matrix, and all-gathers it just before it is used (ZeRO, [arXiv
# 1910.02054](https://arxiv.org/abs/1910.02054)); `tensor` splits heads, the feed-forward width and the
# vocabulary, so that each device computes a part of every matrix product (Megatron-LM, [arXiv
# 1909.08053](https://arxiv.org/abs/1909.08053)).
#
# Below, each rectangle is a shard, with the ids of the devices that hold it. With `data=8` every device has
# all weights. With `fsdp=8` each has an eighth of each matrix. With `fsdp=4,tensor=2`, the 4x2 mesh,
# matrices are split along both dimensions, and activations inside the feed-forward layer along batch and
# width.

# %%
SPECS = ("", "data=8", "fsdp=8", "fsdp=4,tensor=2")
meshes = {spec: lj.make_mesh(spec, devices=jax.devices()[: 8 if spec else 1]) for spec in SPECS}
names = {spec: spec or "one device" for spec in SPECS}


def fresh(mesh):
    """Parameters initialized directly into their shards; each device computes only its own."""
    with jax.set_mesh(mesh):
        return lj.init(config, jax.random.key(0))


def draw(axes, shape, layout, dims):
    """Draws the shards of an array along two dimensions, and the devices that hold each."""
    devices_of_shard = collections.defaultdict(list)
    for device, index in layout.devices_indices_map(shape).items():
        bounds = [index[d].indices(shape[d])[:2] for d in dims]
        devices_of_shard[tuple(bounds)].append(device.id)
    for (rows, columns), devices in devices_of_shard.items():
        y, x = rows[0] / shape[dims[0]], columns[0] / shape[dims[1]]
        height, width = (rows[1] - rows[0]) / shape[dims[0]], (columns[1] - columns[0]) / shape[dims[1]]
        color = "#dddddd" if len(devices) == 8 else style.CYCLE[min(devices)]
        axes.add_patch(
            Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5, alpha=0.85)
        )
        label = "all 8" if len(devices) == 8 else ", ".join(map(str, sorted(devices)))
        axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


held = {spec: fresh(mesh) for spec, mesh in meshes.items()}
grid = style.panels(5, 3, height=1.6, width=10)
for row, spec in zip(grid, SPECS[1:], strict=True):
    mesh, params = meshes[spec], held[spec]
    layer = params["layers"]
    arrays = {
        "embedding\nV x D": (params["embed"]["embedding"], (0, 1)),
        "wq\nD x N (of each layer)": (layer["attention"]["wq"], (1, 2)),
        "w_down\nF x D (of each layer)": (layer["feed_forward"]["w_down"], (1, 2)),
    }
    for axes, (name, (array, dims)) in zip(row, arrays.items(), strict=False):
        draw(axes, array.shape, array.sharding, dims)
        axes.set_title(name if spec == SPECS[1] else "", fontsize=8)
    for axes, name, shape, place in (
        (row[3], "tokens\nB x T", (B, T), sharding.TOKENS_BT),
        (row[4], "feed-forward activations\nB x F", (B, T, config.intermediate_size), sharding.ACT_BTF),
    ):
        draw(axes, shape, sharding.named(mesh, place), (0, len(shape) - 1))
        axes.set_title(name if spec == SPECS[1] else "", fontsize=8)
    row[0].set_ylabel(names[spec])

# %% [markdown]
# ## 2. The same step on every mesh
#
# The whole step: the loss, its gradient, AdamW. Nothing in it depends on devices. `custom_vjp=True` is the
# backward pass that the trainer uses, and `remat="full"` recomputes each layer in it instead of saving its
# activations.

# %%
optimizer = optax.adamw(3e-3)


def train_step(params, moments, tokens):
    def loss(params):
        return lj.next_token_loss(config, params, tokens, custom_vjp=True, remat="full", num_chunks=1).mean

    value, gradient = jax.value_and_grad(loss)(params)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, value


def compiled_for(mesh, length=T):
    """The step compiled for a mesh, from shapes and shardings alone."""
    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda: lj.init(config, jax.random.key(0)))
        moments = jax.eval_shape(optimizer.init, params)
        tokens = jax.ShapeDtypeStruct(
            (B, length), jnp.int32, sharding=sharding.named(mesh, sharding.TOKENS_BT)
        )
        return jax.jit(train_step, donate_argnums=(0, 1)).lower(params, moments, tokens).compile()


text = np.frombuffer(Path("04_sharding.py").read_bytes(), np.uint8).astype(np.int32)
batches = [text[np.arange(B)[:, None] * 700 + 64 * step + np.arange(T)] for step in range(12)]
steps, losses, finals = {}, {}, {}
for spec, mesh in meshes.items():
    steps[spec] = compiled_for(mesh)
    with jax.set_mesh(mesh):
        params = held.pop(spec)
        moments = jax.jit(optimizer.init)(params)
        losses[spec] = []
        for batch in batches:
            tokens = jax.device_put(batch, sharding.named(mesh, sharding.TOKENS_BT))
            params, moments, value = steps[spec](params, moments, tokens)
            losses[spec].append(float(value))
    finals[spec] = jax.device_get(params)

left, right = style.panels(2, height=3)
for (spec, values), mark in zip(losses.items(), ("o", "s", "^", "D"), strict=True):
    left.plot(values, marker=mark, markersize=4, label=names[spec], alpha=0.8)
    if spec:
        gap = np.abs(np.array(values) - losses[""]) / losses[""]
        right.plot(
            np.maximum(gap, 1e-9),
            marker=mark,
            markersize=4,
            color=left.lines[-1].get_color(),
            label=names[spec],
        )
        print(f"{names[spec]:18} max relative difference of the loss {gap.max():.1e}")
        assert gap.max() < 1e-4
left.set(title="loss of the same twelve batches", xlabel="step", ylabel="nats per byte")
left.legend()
right.axhline(np.finfo(np.float32).eps, color=style.GREY, linestyle=":", linewidth=1)
right.set(title="difference from one device (dotted: f32's rounding)", yscale="log", ylim=(5e-10, 1e-4))
_ = right.set(xlabel="step", ylabel="relative (10⁻⁹ stands for 0)")

# %% [markdown]
# The differences are float rounding: partial sums of eight devices are added in a different order. Initial
# weights are bit-identical on every mesh.
#
# ## 3. Communication
#
# The compiled program contains all collectives. We parse its text and count each one, multiplied by the
# trip count of its loop (layers are a loop). In a ring of n devices, each sends (n-1)/n of an array for an
# all-gather or a reduce-scatter, and twice that for an all-reduce, which is a reduce-scatter followed by an
# all-gather.


# %%
def traffic(compiled):
    """By kind of collective: how often it runs in a step, and the bytes that each device sends."""
    times, sent = collections.Counter(), collections.Counter()
    for one in collectives.find(hlo.parse(compiled.as_text())):
        if one.group in (1, None) or one.bytes < 1024:  # a single device, or a few scalars
            continue
        times[one.kind] += one.times
        turns = 2 if one.kind == "all-reduce" else 1
        sent[one.kind] += one.times * one.bytes * turns * (one.group - 1) / one.group
    return times, sent


more = "fsdp=2,tensor=4"
meshes[more], names[more] = lj.make_mesh(more), more
steps[more] = compiled_for(meshes[more])
counted = {spec: traffic(steps[spec]) for spec in meshes if spec}
kinds = ("all-gather", "reduce-scatter", "all-reduce")
print(f"{'collectives per step':18}" + "".join(f"{kind:>26}" for kind in kinds))
for spec, (times, sent) in counted.items():
    print(
        f"{names[spec]:18}"
        + "".join(f"{f'{times[kind]} x, {style.nbytes(sent[kind])}':>26}" for kind in kinds)
    )
assert not any(traffic(steps[""])[1].values())  # one device does not communicate

axes = style.panels(1, height=2.6, width=8)
for place, (_, sent) in enumerate(counted.values()):
    start = 0.0
    for kind, color, hatch in zip(kinds, style.CYCLE, ("", "//", ".."), strict=False):
        axes.barh(
            place,
            sent[kind] / 1e6,
            left=start,
            color=color,
            hatch=hatch,
            edgecolor="white",
            label="" if place else kind,
        )
        start += sent[kind] / 1e6
axes.set_yticks(range(len(counted)), [names[spec] for spec in counted])
axes.invert_yaxis()
axes.set(title=f"sent by each device per step of {B} x {T} tokens", xlabel="MB")
_ = axes.legend(bbox_to_anchor=(1, 1))
# %% [markdown]
# These values can be derived by hand. With `data=8`, only gradients are all-reduced. With `fsdp=8`, every
# matrix of a layer is all-gathered twice, for the forward and for the backward pass, and the embedding and
# output matrices once each; every gradient is reduce-scattered once. On the 4x2 mesh `tensor` halves the
# all-gathers of weights. It divides the positions of the residual stream too (sequence parallelism, arXiv
# 2205.05198), so that a sublayer all-gathers its input [B/4, T, D] and reduce-scatters its output. A layer
# has six such all-gathers: of its two inputs in the forward pass, of both again in the backward pass, and of
# two gradients. It has five reduce-scatters: of two outputs, of the first again due to rematerialization, and
# of the gradients of two inputs. The two vocabulary matrices add one of each kind.

# %%
tables = 4 * 2 * config.vocab_size * config.hidden_size
matrices = 4 * (config.num_params - (2 * config.num_hidden_layers + 1) * config.hidden_size) - tables
activations = 4 * B * T * config.hidden_size


def check(name, counted, predicted):
    print(f"{name:56} counted {style.nbytes(counted):>8}, by hand {style.nbytes(predicted):>8}")
    assert abs(counted - predicted) <= 0.02 * predicted, name


sent = {spec: counted[spec][1] for spec in counted}
check("data=8: all-reduce of gradients", sent["data=8"]["all-reduce"], 2 * 7 / 8 * 4 * config.num_params)
check("fsdp=8: all-gather of weights", sent["fsdp=8"]["all-gather"], 7 / 8 * (2 * matrices + tables))
check("fsdp=8: reduce-scatter of gradients", sent["fsdp=8"]["reduce-scatter"], 7 / 8 * (matrices + tables))
mixed = sent["fsdp=4,tensor=2"]
moved, layers = 1 / 2 * activations / 4, config.num_hidden_layers  # by each of two devices
gathered = 3 / 4 * (2 * matrices + tables) / 2 + (6 * layers + 2) * moved
check("fsdp=4,tensor=2: all-gather of weights, activations", mixed["all-gather"], gathered)
scattered = 3 / 4 * (matrices + tables) / 2 + (5 * layers + 2) * moved
check("fsdp=4,tensor=2: reduce-scatter of gradients, activations", mixed["reduce-scatter"], scattered)
assert mixed["all-reduce"] < 0.02 * activations  # the gradients of norms, and what the loss sums

# %% [markdown]
# ## 4. fsdp communicates weights, tensor communicates activations
#
# The traffic of `fsdp` does not depend on the number of tokens per step; that of `tensor` is proportional
# to it. The same step, compiled for shorter and longer sequences:

# %%
lengths = (64, 128, 256)
moved = {
    spec: [
        sum(traffic(steps[spec] if length == T else compiled_for(meshes[spec], length))[1].values())
        for length in lengths
    ]
    for spec in ("fsdp=8", "fsdp=4,tensor=2", "fsdp=2,tensor=4")
}
axes = style.panels(1, height=3, width=7)
tokens_each = [B * length / 8 for length in lengths]
for (spec, values), mark in zip(moved.items(), ("^", "D", "o"), strict=True):
    slope, fixed = np.polyfit(tokens_each, values, 1)
    axes.plot(tokens_each, np.array(values) / 1e6, marker=mark, label=spec)
    print(f"{spec:18} {style.nbytes(fixed)} fixed, and {max(slope, 0) / 1000:.1f} kB per token on a device")
axes.set(
    title="sent by each device per step",
    xlabel="tokens per device",
    ylabel="MB",
    ylim=(0, None),
    xticks=tokens_each,
)
axes.legend()
assert max(moved["fsdp=8"]) < 1.02 * min(moved["fsdp=8"])
assert moved["fsdp=4,tensor=2"][0] < moved["fsdp=8"][0]  # few tokens: tensor is cheaper
assert moved["fsdp=4,tensor=2"][-1] > moved["fsdp=8"][-1]  # many tokens: fsdp is cheaper

# %% [markdown]
# This determines the mesh. With many tokens per device, `fsdp` is nearly free: its all-gathers overlap with
# the matrix products. With few (a large pod, or a fixed batch size), gathering the weights takes longer
# than using them, and some of the devices should be on `tensor`, within fast links. The scaling book
# ([jax-ml/scaling-book](https://jax-ml.github.io/scaling-book/)) derives where the two lines cross on real
# chips.
#
# ## 5. Memory
#
# Each device stores an eighth of the parameters and of AdamW's two moments where `fsdp` times `tensor` is
# 8, and all of them with plain data parallelism. Temporaries (activations, gradients, gathered weights)
# shrink with the batch per device.

# %%
memory = {spec: steps[spec].memory_analysis() for spec in meshes}
axes = style.panels(1, height=2.7, width=8)
for place, stats in enumerate(memory.values()):
    state, rest = stats.argument_size_in_bytes / 1e6, stats.temp_size_in_bytes / 1e6
    axes.barh(place, state, color=style.BLUE, label="" if place else "parameters, moments, batch")
    axes.barh(
        place,
        rest,
        left=state,
        color=style.ORANGE,
        hatch="//",
        edgecolor="white",
        label="" if place else "temporaries",
    )
    axes.text(state + rest, place, f"  {state:.1f} + {rest:.1f} MB", va="center", fontsize=8)
axes.set_yticks(range(len(memory)), [names[spec] for spec in memory])
axes.invert_yaxis()
axes.set(title="memory of one device", xlabel="MB", xlim=(0, 1.25 * axes.get_xlim()[1]))
axes.legend(loc="lower right")
whole = 3 * 4 * config.num_params
for spec, parts in (("", 1), ("data=8", 1), ("fsdp=8", 8), ("fsdp=4,tensor=2", 8)):
    check(
        f"{names[spec]}: state on a device",
        memory[spec].argument_size_in_bytes,
        whole / parts + 4 * B * T / (8 if spec else 1),
    )

# %% [markdown]
# A mesh that does not divide the model is an error before anything is compiled, with the sizes that work:

# %%
try:
    with jax.set_mesh(lj.make_mesh("tensor=8")):
        lj.init(config, jax.random.key(0))
except lj.LlamaJaxError as error:
    print(f"{type(error).__name__}: {error}")
else:
    raise AssertionError("eight devices do not divide four key/value heads")

# %% [markdown]
# The trainer's step (`train/step.py`) adds clipping, gradient accumulation and metrics; `llama-jax train
# CONFIG --mesh.fsdp 4 --mesh.tensor 2` runs it. `llama-jax plan llama2_70b --topology v5p-128` does for a
# pod what this notebook did for eight simulated devices: it compiles the step for the real TPU on a laptop
# and prints memory, time and collectives.
