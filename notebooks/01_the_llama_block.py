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
# # The Llama 2 block, piece by piece
#
# A Llama is an embedding table, a stack of identical blocks, one last norm and an output projection. A
# block is two lines:
#
# $$x \leftarrow x + \mathrm{Attention}(\mathrm{RMSNorm}(x)), \qquad
#   x \leftarrow x + \mathrm{SwiGLU}(\mathrm{RMSNorm}(x))$$
#
# This notebook explains the four parts (RMSNorm, rotary position embedding, grouped-query attention,
# SwiGLU), checks their properties, and combines them: at the end, a forward pass written out by hand gives
# the logits of `lj.forward` on pretrained weights, and shows what its 270 attention heads attend to.
#
# The references are Meta's papers (Llama, [arXiv 2302.13971](https://arxiv.org/abs/2302.13971); Llama 2,
# [2307.09288](https://arxiv.org/abs/2307.09288)) and the paper of each part. Letters are those of
# `llama_jax/__init__.py`: B batch, T and S query and key length, N query heads, K key/value heads, H head
# dimension, D width, F feed-forward width.

# %%
import math

import jax
import jax.numpy as jnp
import numpy as np
import style
from matplotlib.patches import Rectangle

import llama_jax as lj
from llama_jax.attention import AttentionMask, attention
from llama_jax.layers import embed, rms_norm, unembed
from llama_jax.ops.swiglu import swiglu
from llama_jax.rope import rotary, rotary_frequencies, rotate

style.use()
llama2 = lj.presets.LLAMA2_7B
model = lj.load("smollm2-135m")  # the same architecture, pretrained: 135M parameters, Apache-2.0
smol, tokenizer = model.config, model.tokenizer

print(f"{'':24}{'Llama 2 7B':>16}{'Llama 2 70B':>16}{'SmolLM2 135M':>16}")
for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "rope_theta", "num_params"):  # fmt: skip
    row = [getattr(config, field) for config in (llama2, lj.presets.LLAMA2_70B, smol)]
    print(f"{field:24}{row[0]:>16,.0f}{row[1]:>16,.0f}{row[2]:>16,.0f}")

# %% [markdown]
# ## 1. RMSNorm: normalizes the length, keeps the mean
#
# LayerNorm subtracts the mean and divides by the standard deviation, then scales and shifts. RMSNorm
# (Zhang and Sennrich, [arXiv 1910.07467](https://arxiv.org/abs/1910.07467)) divides by the root of the mean
# square and scales. Nothing is subtracted, and there is no bias:
#
# $$\mathrm{LayerNorm}(x) = \frac{x - \bar x}{\sqrt{\tfrac1D\sum_i (x_i-\bar x)^2 + \epsilon}}\odot g + b,
#   \qquad \mathrm{RMSNorm}(x) = \frac{x}{\sqrt{\tfrac1D\sum_i x_i^2 + \epsilon}}\odot g$$
#
# Three dimensions show the difference. RMSNorm projects every point onto the sphere of radius $\sqrt D$
# along its own ray. LayerNorm first projects the point onto the plane orthogonal to $(1, 1, 1)$, so that
# only a circle remains: one direction of the space is lost.


# %%
def layer_norm(x, scale, bias, *, eps):
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + eps) * scale + bias


def check(name, left, right, tolerance=1e-5):
    gap = float(jnp.max(jnp.abs(left - right)))
    print(f"{name:60} max difference {gap:.1e}")
    assert gap <= tolerance, name


points = jax.random.normal(jax.random.key(0), (400, 3)) * jnp.array([1.0, 0.6, 1.4]) + jnp.array(
    [0.8, 0.2, 0.0]
)
on_sphere = rms_norm(points, jnp.ones(3), eps=1e-6)
on_circle = layer_norm(points, jnp.ones(3), jnp.zeros(3), eps=1e-6)

figure_axes = style.panels(3, height=3.3, subplot_kw={"projection": "3d"})
titles = ("x, and a line along (1, 1, 1)", "RMSNorm(x): a sphere", "LayerNorm(x): a circle")
for axes, cloud, title in zip(figure_axes, (points, on_sphere, on_circle), titles, strict=True):
    inside = np.abs(cloud).max(1) < 2.2
    axes.scatter(*np.asarray(cloud)[inside].T, c=np.asarray(points).sum(1)[inside], s=6)
    axes.plot([-2, 2], [-2, 2], [-2, 2], color=style.RED, linewidth=1.2)
    axes.set(title=title, xlabel="$x_1$", ylabel="$x_2$", zlabel="$x_3$")
    axes.set(
        **{f"{axis}lim": (-2.2, 2.2) for axis in "xyz"}, **{f"{axis}ticks": (-2, 0, 2) for axis in "xyz"}
    )
    axes.set_box_aspect((1, 1, 1), zoom=0.9)
    axes.view_init(elev=14, azim=-14)
    axes.tick_params(labelsize=7, pad=-1)

# %% [markdown]
# Properties that follow from the formulas, on vectors of Llama 2 7B's width:

# %%
D, eps = llama2.hidden_size, llama2.rms_norm_eps
x = jax.random.normal(jax.random.key(1), (16, D)) + 0.5
one, zero = jnp.ones(D), jnp.zeros(D)
norm = lambda x: rms_norm(x, one, eps=eps)  # noqa: E731

check("RMSNorm's output has a mean square of 1", jnp.mean(norm(x) ** 2, -1), jnp.ones(16))
check("scale invariance: RMSNorm(3x) = RMSNorm(x)", norm(3 * x), norm(x), 1e-4)
check("on vectors of mean 0 both norms are equal",
    norm(x - x.mean(-1, keepdims=True)), layer_norm(x, one, zero, eps=eps), 1e-4)  # fmt: skip
assert jnp.abs(norm(x + 1) - norm(x)).max() > 0.1  # not shift invariant, unlike LayerNorm
check(
    "LayerNorm is shift invariant",
    layer_norm(x + 1, one, zero, eps=eps),
    layer_norm(x, one, zero, eps=eps),
    1e-4,
)

print()
for name, function, arguments in (
    ("RMSNorm", lambda x, g: rms_norm(x, g, eps=eps), (x, one)),
    ("LayerNorm", lambda x, g, b: layer_norm(x, g, b, eps=eps), (x, one, zero)),
):
    operations = jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
    print(
        f"{name:10} {len(arguments) - 1} x {D} parameters, "
        f"{operations / x.size:.1f} operations per element by XLA's count"
    )

# %% [markdown]
# The cost matters less than it seems: fused, either norm reads and writes the activations once, which takes
# far longer than the arithmetic. Llama uses RMSNorm because it loses no quality and saves a reduction, a
# parameter vector, and a subtraction that would have to be exact in f32.
#
# ## 2. Rotary position embedding: a position is an angle
#
# RoPE (Su et al., RoFormer, [arXiv 2104.09864](https://arxiv.org/abs/2104.09864)) adds nothing to the
# embeddings and has no parameters. After the projections, the H elements of each query and key head form
# H/2 pairs, and pair i of the token at position m is rotated by the angle $m\,\theta_i$, where $\theta_i =
# \theta^{-2i/H}$ and $\theta$ is 10,000 in Llama 2. Values are not rotated.
#
# The figure has four of the 64 pairs of a Llama 2 head, at positions 0 to 11. The first rotates by one
# radian per token, the last by about a ten-thousandth.

# %%
H = llama2.head_dim
positions = jnp.arange(12)[None]
unit = jnp.zeros((1, 12, 1, H)).at[..., : H // 2].set(1.0)  # every pair starts as the vector (1, 0)
turned = np.asarray(rotate(unit, rotary(llama2, positions)))[0, :, 0]

frequencies, _ = rotary_frequencies(head_dim=H, theta=llama2.rope_theta, scaling=None)  # radians per token
shade = style.plt.get_cmap(style.SHADES)
for axes, pair in zip(style.panels(4, height=2.7), (0, 8, 16, 63), strict=True):
    for m in range(12):
        # Dimensions i and i + H/2 form a pair; in Meta's files it is 2i and 2i + 1.
        tip = turned[m, pair], turned[m, pair + H // 2]
        axes.annotate(
            "", tip, (0, 0), arrowprops={"arrowstyle": "->", "color": shade(m / 11), "linewidth": 1.4}
        )
        axes.text(1.16 * tip[0], 1.16 * tip[1], m if pair < 16 or (pair == 16 and m in (0, 11)) else "",
                  ha="center", va="center", fontsize=7)  # fmt: skip
    if pair == 63:
        axes.text(1.1, -0.14, "0 to 11", ha="center", va="top", fontsize=7)
    axes.add_patch(style.plt.Circle((0, 0), 1, fill=False, color="#cccccc"))
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal", xticks=[], yticks=[],
             title=f"pair {pair}: {math.degrees(frequencies[pair]):.3g}° per token")  # fmt: skip
    axes.spines[:].set_visible(False)

# %% [markdown]
# Rotating two vectors by the same angle keeps the angle between them. So the score of a query at m with a
# key at n depends on their positions only through m - n:
#
# $$\langle R_m q,\; R_n k\rangle = \langle R_{m-n}\, q,\; k \rangle .$$
#
# With one query and one key vector at every position, the matrix of scores is constant along its diagonals.


# %%
def scores_at(config, q, k, positions):
    """Scores [T, T] of one q and one k [H] at all `positions`."""
    table = rotary(config, positions[None])
    q, k = (rotate(jnp.broadcast_to(v, (1, len(positions), 1, len(v))), table)[0, :, 0] for v in (q, k))
    return q @ k.T


q, k = jax.random.normal(jax.random.key(2), (2, H))
table = scores_at(llama2, q, k, jnp.arange(48))
spread = max(float(jnp.ptp(jnp.diagonal(table, offset))) for offset in range(-47, 48))
print(f"scores differ by at most {spread:.1e} along a diagonal, by {float(jnp.ptp(table)):.1f} overall")
assert spread < 1e-3
check("the same scores 300 positions later", scores_at(llama2, q, k, 300 + jnp.arange(48)), table, 5e-3)
rotated = rotate(q[None, None, None], rotary(llama2, jnp.array([[777]])))
check("rotation keeps lengths", jnp.linalg.norm(rotated), jnp.linalg.norm(q), 1e-4)

# %% [markdown]
# **Long-range decay.** RoFormer (section 3.4.3) bounds the score at distance s. Write the pairs as complex
# numbers, $h_i = q_i \overline{k_i}$, and $S_j(s) = \sum_{i<j} e^{\mathrm i s\theta_i}$; summing by parts,
#
# $$\Big|\sum_i h_i\, e^{\mathrm i s\theta_i}\Big| \;\le\; \max_i |h_{i+1} - h_i| \;\sum_j |S_j(s)| .$$
#
# The last factor, divided by H/2, is the curve that falls with distance in the paper's figure 2. It is an
# upper bound, and a loose one for heads whose neighboring pairs differ much; trained heads do attend far
# back, as section 5 shows. The other curve is the score itself in the simplest case, all $h_i = 1$: at
# small distances all pairs agree, at large ones they cancel.


# %%
def decay(config, distances):
    """The bound's factor, and the mean of cos(s theta_i), at each distance s."""
    frequencies, _ = rotary_frequencies(head_dim=config.head_dim, theta=config.rope_theta, scaling=None)
    turns = np.exp(1j * distances[:, None] * frequencies.astype(np.float64))
    return np.abs(np.cumsum(turns, axis=1)).mean(1), turns.real.mean(1)


def as_pairs(v):
    return np.asarray(v[: H // 2]) + 1j * np.asarray(v[H // 2 :])


h = as_pairs(q) * as_pairs(k).conj()
steps = np.abs(np.diff(np.append(h, 0))).max()
bound, _ = decay(llama2, np.arange(48.0))
assert (np.abs(table[:, 0]) <= steps * bound * (H // 2)).all()  # the inequality, on the scores above

(of_scores, of_turns), (of_bound, of_ones) = style.panels(2, 2, height=2.7, width=9)
limit = float(jnp.abs(table).max())
style.heat(of_scores, table, label="score", cmap=style.SIDES, aspect="equal", vmin=-limit, vmax=limit)
of_scores.set(
    title="scores of one q and one k", xlabel="position n of the key", ylabel="position m of the query"
)
distances = np.unique(np.geomspace(1, 8192, 220).astype(int)).astype(float)
for config, name, color in (
    (llama2, "Llama 2: H 128, θ 10⁴", style.BLUE),
    (smol, "SmolLM2: H 64, θ 10⁵", style.ORANGE),
):
    bound, ones = decay(config, distances)
    at_zero, _ = decay(config, np.zeros(1))
    frequencies, _ = rotary_frequencies(head_dim=config.head_dim, theta=config.rope_theta, scaling=None)
    pairs = len(frequencies)
    of_bound.plot(distances, bound / at_zero, color=color, label=name)
    of_ones.plot(distances, ones, color=color, linewidth=1)
    of_turns.plot(np.arange(pairs) / pairs, 2 * np.pi / frequencies, color=color, label=name)
    of_turns.axhline(config.max_position_embeddings, color=color, linestyle=":")
    never = int((2 * np.pi / frequencies > config.max_position_embeddings).sum())
    print(
        f"{name}: {never} of {pairs} pairs make less than one full rotation within the context of "
        f"{config.max_position_embeddings} tokens"
    )
of_bound.set(title="the bound's factor", xlabel="distance s = m - n", ylabel="share of its value at s = 0")
of_ones.set(
    title="the score with all $h_i = 1$",
    xlabel="distance s = m - n",
    ylabel="share of its value at s = 0",
)
of_turns.set(
    title="tokens per full rotation (dotted: the context)",
    xlabel="pair i / (H/2)",
    ylabel="tokens",
    yscale="log",
)
of_turns.legend()
for ax in (of_bound, of_ones):
    ax.set(xscale="log", ylim=(-0.2, 1))
    ax.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)

# %% [markdown]
# The slow pairs make less than a full rotation within the context: they distinguish far tokens from near
# ones without ambiguity. Beyond its training context, a model meets angles of these pairs that it has never
# seen. The scaling rules in `rope.py` (linear, NTK, YaRN, Llama 3) address this.
#
# ## 3. Grouped-query attention: a smaller KV cache
#
# While generating, a Llama stores the keys and values of all tokens so far, and reads all of them for every
# new token. Multi-query attention ([arXiv 1911.02150](https://arxiv.org/abs/1911.02150)) keeps one
# key/value head for all query heads; grouped-query attention (GQA, [arXiv
# 2305.13245](https://arxiv.org/abs/2305.13245)) keeps K of them, query head n reading number n // (N/K).
# Llama 2 7B and 13B are multi-head (K = N); 70B has N = 64 and K = 8. (Nothing is quantized: the G stands
# for groups of heads.)

# %%
axes = style.panels(3, height=1.7)
for ax, kv_heads, name in zip(
    axes, (8, 4, 1), ("multi-head: K = N = 8", "grouped: K = 4", "multi-query: K = 1"), strict=True
):
    for n in range(8):
        group = n * kv_heads // 8
        color = style.CYCLE[group]
        centre = (group + 0.5) * 8 / kv_heads
        ax.add_patch(Rectangle((n + 0.1, 0), 0.8, 0.5, color=color, alpha=0.55))
        ax.plot([n + 0.5, centre], [0.5, 1.2], color=color, linewidth=1)
        ax.add_patch(Rectangle((centre - 0.4, 1.2), 0.8, 0.5, color=color))
        ax.text(n + 0.5, 0.25, f"q{n}", ha="center", va="center", fontsize=7)
    ax.set(
        title=name,
        xlim=(0, 8),
        ylim=(-0.1, 1.9),
        xticks=[],
        yticks=[0.25, 1.45],
        yticklabels=["queries", "keys, values"],
    )
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)

# %% [markdown]
# GQA is multi-head attention whose key/value heads are equal within each group, so that one copy is stored.
# The cache has 2 x layers x K x H elements per token, whatever N is. `jax.eval_shape` of `init_cache`
# confirms it for models that do not fit on this machine:

# %%
B, T, N, K = 2, 24, 8, 2
kq, kk, kv = jax.random.split(jax.random.key(3), 3)
q, k, v = (
    jax.random.normal(kq, (B, T, N, 64)),
    jax.random.normal(kk, (B, K, T, 64)),
    jax.random.normal(kv, (B, K, T, 64)),
)
order = jnp.broadcast_to(jnp.arange(T), (B, T))
copies = lambda x: jnp.repeat(x, N // K, axis=1)  # noqa: E731
where = AttentionMask(order, order)
check(
    "grouped = multi-head with copied keys and values",
    attention(q, k, v, where),
    attention(q, copies(k), copies(v), where),
)


def cache_bytes(config, tokens):
    cache = jax.eval_shape(lambda: lj.kv_cache.init_cache(config, 1, tokens, jnp.bfloat16))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


ax = style.panels(1, height=2.6, width=7)
for group, (name, config) in enumerate((("7B", llama2), ("70B", lj.presets.LLAMA2_70B))):
    heads = config.num_attention_heads
    for place, kv_heads in enumerate((heads, 8, 1)):
        size = cache_bytes(config.replace(num_key_value_heads=kv_heads), 4096)
        assert size == 2 * config.num_hidden_layers * kv_heads * config.head_dim * 4096 * 2
        real = kv_heads == config.num_key_value_heads
        bar = ax.barh(
            4 * group + place,
            size / 1e9,
            color=style.CYCLE[place],
            hatch="//" if real else None,
            edgecolor="white",
        )
        kind = ("multi-head", "grouped", "multi-query")[place]
        ax.bar_label(
            bar,
            [f" {name} {kind}, K = {kv_heads}: {style.nbytes(size)}{', as published' if real else ''}"],
            fontsize=8,
        )
ax.invert_yaxis()
_ = ax.set(title="cache of one sequence of 4,096 tokens in bf16", xlabel="GB", yticks=[], xlim=(0, 15))
# %% [markdown]
# ## 4. SwiGLU: a feed-forward layer with a gate
#
# The classic feed-forward layer is `w_down(relu(w_up x))`. A gated linear unit multiplies two projections
# of x; with SiLU on one of them it is SwiGLU (Shazeer, [arXiv
# 2002.05202](https://arxiv.org/abs/2002.05202)):
#
# $$\mathrm{SwiGLU}(x) = W_{down}\,\big(\mathrm{silu}(W_{gate}\,x) \odot W_{up}\,x\big),
#   \qquad \mathrm{silu}(g) = g\,\sigma(g).$$
#
# A hidden unit of the classic layer responds to one direction of x. A gated unit is near zero where its
# gate is negative, and grows with the product of two directions where the gate is open, with either sign.
# It has three matrices instead of two: F = 8D/3 instead of 4D keeps the number of parameters, and Meta
# rounds up to a multiple of 256: 8 x 4096 / 3 = 10,922.7, hence 11,008.

# %%
assert 256 * math.ceil(8 * llama2.hidden_size / 3 / 256) == llama2.intermediate_size
g, u = jax.random.normal(jax.random.key(4), (2, 5, 32))
check("the library's swiglu is g * sigmoid(g) * u", swiglu(g, u), g / (1 + jnp.exp(-g)) * u)

axes = style.panels(3, height=2.9)
line = jnp.linspace(-5, 3, 200)
for name, curve in (("ReLU", jax.nn.relu), ("GELU", jax.nn.gelu), ("SiLU", jax.nn.silu)):
    axes[0].plot(line, curve(line), label=name)
lowest = float(line[jnp.argmin(jax.nn.silu(line))])
axes[0].annotate(f"SiLU has its minimum at {lowest:.2f}", (lowest, float(jax.nn.silu(lowest))), (-4.8, 1.2),
                 arrowprops={"arrowstyle": "-", "color": style.GREY}, fontsize=8)  # fmt: skip
axes[0].set(title="the curves", xlabel="g", ylabel="f(g)")
axes[0].legend(loc="upper left")
gates, ups = jnp.meshgrid(jnp.linspace(-4, 4, 161), jnp.linspace(-4, 4, 161))
for ax, values, name in (
    (axes[1], jax.nn.relu(gates), "one unit of a ReLU layer"),
    (axes[2], swiglu(gates, ups), "one unit of SwiGLU"),
):
    drawn = ax.contourf(gates, ups, values, levels=np.linspace(-16, 16, 33), cmap=style.SIDES)
    ax.contour(gates, ups, values, levels=[-0.25, 0.25], colors="black", linewidths=0.7)
    ax.set(
        title=name + (" (lines: ±0.25)" if name.endswith("GLU") else ""),
        xlabel="g: one direction of x",
        ylabel="u: another",
    )
_ = style.plt.colorbar(drawn, ax=axes[2], label="its output", fraction=0.05)

# %% [markdown]
# ## 5. The whole model, on pretrained weights
#
# The whole model in one function: the parameters from `lj.load`, the library's norm, rotation and SwiGLU,
# and einsums whose letters are the shapes. Unlike the library's forward pass it also returns every
# attention map, every gate, and the residual stream before every layer.


# %%
@jax.jit
def forward_with_activations(params, tokens):
    """Logits [1, T, V]; and per layer: attention maps [N, T, T], gates [T, F], the input [T, D]."""
    length = tokens.shape[1]
    table = rotary(smol, jnp.arange(length)[None])
    causal = jnp.tril(jnp.ones((length, length), bool))
    group = smol.num_attention_heads // smol.num_key_value_heads

    def layer(x, weights):
        norm = lambda x, name: rms_norm(x, weights[name]["scale"], eps=smol.rms_norm_eps)  # noqa: E731
        matrices = weights["attention"] | weights["feed_forward"]

        y = norm(x, "attention_norm")
        q = rotate(jnp.einsum("btd,dnh->btnh", y, matrices["wq"]), table)
        k = rotate(jnp.einsum("btd,dkh->btkh", y, matrices["wk"]), table)
        v = jnp.einsum("btd,dkh->btkh", y, matrices["wv"])
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(smol.head_dim)
        maps = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        heads = jnp.einsum("bnts,bsnh->btnh", maps, v)
        middle = x + jnp.einsum("btnh,nhd->btd", heads, matrices["wo"])

        y = norm(middle, "ffn_norm")
        gate, up = (jnp.einsum("btd,df->btf", y, matrices[name]) for name in ("w_gate", "w_up"))
        out = middle + jnp.einsum("btf,fd->btd", swiglu(gate, up), matrices["w_down"])
        return out, (maps[0], gate[0], x[0])

    x = embed(params["embed"]["embedding"], tokens, dtype=jnp.float32)
    x, activations = jax.lax.scan(layer, x, params["layers"])  # layer leaves are stacked [L, ...]
    x = rms_norm(x, params["final_norm"]["scale"], eps=smol.rms_norm_eps)
    return unembed(x, params), activations


text = (
    "When Mary and John went to the store, John gave a drink to Mary. Then Mary thanked John for the drink."
)
ids = jnp.array([tokenizer.encode(text)])
pieces = [tokenizer.decode([i]) for i in ids[0].tolist()]
logits, (maps, gates, stream) = forward_with_activations(model.params, ids)
check("logits by hand = lj.forward, relative to the maximum",
    logits / jnp.abs(logits).max(), lj.forward(smol, model.params, ids) / jnp.abs(logits).max())  # fmt: skip
print("attention maps", maps.shape, "(layer, head, query, key)")

# %% [markdown]
# **Kinds of heads.** Three patterns that occur in every trained transformer can be measured:
#
# - an *attention sink*: weight on the first token, whatever it is. Softmax weights must sum to one, and a
#   head with nothing to attend to puts its weight there (Xiao et al., [arXiv
#   2309.17453](https://arxiv.org/abs/2309.17453));
# - a *previous-token head*: weight on the previous token;
# - an *induction head* (Olsson et al., [arXiv 2209.11895](https://arxiv.org/abs/2209.11895)): in repeating
#   text, weight on the token that followed the last occurrence of the current one, which implements copying
#   in context. The input is 40 random tokens, repeated once; the weight is measured one position after the
#   first occurrence.

# %%
period = 40
random_ids = jax.random.randint(jax.random.key(5), (1, period), 1000, smol.vocab_size)
twice_logits, (twice, _, _) = forward_with_activations(model.params, jnp.tile(random_ids, 2))

sink = maps[:, :, 1:, 0].mean(-1)  # without the first query, which sees only itself
previous = jnp.diagonal(maps, offset=-1, axis1=2, axis2=3).mean(-1)
induction = jnp.diagonal(twice, offset=-(period - 1), axis1=2, axis2=3)[..., 1:].mean(-1)

axes = style.panels(3, height=4.2)
best = {}
for ax, score, name in zip(
    axes, (sink, previous, induction), ("sink", "previous token", "induction"), strict=True
):
    style.heat(ax, score, label="mean attention weight", vmin=0, vmax=1)
    layer, head = np.unravel_index(int(score.argmax()), score.shape)
    best[name] = int(layer), int(head)
    ax.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=style.RED, linewidth=2))
    ax.set(
        title=f"{name}: {float(score.max()):.2f} in layer {layer}, head {head}", xlabel="head", ylabel="layer"
    )
    assert score.max() > 0.5, name

prob = jax.nn.log_softmax(twice_logits[0, :-1])[jnp.arange(2 * period - 1), jnp.tile(random_ids[0], 2)[1:]]
first, second = -prob[: period - 1].mean(), -prob[period:].mean()
print(f"nats per token on the random text: {first:.1f} the first time, {second:.2f} when repeated")
assert second < first / 3  # because of such heads

# %% [markdown]
# The three marked heads; each row is a query and sums to one. The sink's map is nearly one column; the
# previous-token head's weight is below the diagonal; the induction head, on the 40 repeated random tokens,
# has a line one period below it.

# %%
axes = style.panels(3, height=3.9)
for ax, name in zip(axes, best, strict=True):
    source = twice if name == "induction" else maps
    layer, head = best[name]
    style.heat(
        ax,
        source[layer, head],
        label="attention weight",
        vmin=0,
        vmax=1,
        aspect="equal",
        colorbar=name == "induction",
    )
    ax.set(title=f"{name} (layer {layer}, head {head})")
    if name != "induction":
        style.token_ticks(ax, pieces, y=True)
    else:
        ax.set(xlabel="key position", ylabel="query position")

# %% [markdown]
# ## 6. The parts in a trained model
#
# The same pass returned the residual stream and the gates, so the statements of sections 1 and 4 can be
# checked on real activations. Left: the squared mean of a vector as a fraction of its mean square, which
# LayerNorm would remove and RMSNorm keeps. A random direction has a fraction of 1/D, and the trained model
# less. Middle: the length that RMSNorm normalizes: residual vectors grow from layer to layer, and the first
# token's, the sink's, is orders of magnitude larger. Right: the gates: more than half are negative, where
# SiLU's magnitude is at most 0.28.

# %%
axes = style.panels(3, height=2.9)
share = jnp.mean(stream, -1) ** 2 / jnp.mean(stream**2, -1)
axes[0].plot(jnp.median(share[:, 1:], axis=1), label="median over tokens")
axes[0].axhline(1 / smol.hidden_size, color=style.GREY, linestyle=":", label="1 / D")
axes[0].set(
    title="what LayerNorm would remove",
    xlabel="layer",
    ylabel="mean² / mean square",
    yscale="log",
    ylim=(1e-4, 1e-2),
)
axes[0].legend()
length = jnp.sqrt(jnp.mean(stream**2, -1))
axes[1].plot(jnp.median(length[:, 1:], axis=1), label="median over the other tokens")
axes[1].plot(length[:, 0], color=style.RED, label="first token")
axes[1].set(title="root mean square of the residual stream", xlabel="layer", ylabel="RMS", yscale="log")
axes[1].legend()
for layer, color in zip((0, 10, 20, 29), style.CYCLE, strict=False):
    label = f"layer {layer}: {float((gates[layer] < 0).mean()):.0%} below 0"
    axes[2].hist(
        np.ravel(gates[layer]),
        np.linspace(-4, 4, 81),
        density=True,
        histtype="step",
        color=color,
        label=label,
    )
axes[2].set(title="gates before SiLU", xlabel="g", ylabel="density", ylim=(0, 1.7))
axes[2].legend(fontsize=7, loc="upper left")
print(f"fraction of the mean, median over layers and tokens: {float(jnp.median(share[:, 1:])):.1e}")
print(f"gates below 0: {float((gates < 0).mean()):.0%}")
assert jnp.median(share[:, 1:]) < 0.05 and (gates < 0).mean() > 0.5

# %% [markdown]
# That is the whole Llama block. The library's version is `llama_jax/layers.py`, with one addition:
# `Attention` takes a function `attend(q, k, v)` that computes attention, so that the same module trains on
# packed documents, reads a KV cache, and runs over a mesh. The next notebook uses the model inside larger
# programs.
