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
# # `generate` inside a research program
#
# In most libraries, generation is a stateful method: it mutates caches, reads settings from an object, and
# cannot be part of a larger compiled program. Here it is a pure function of arrays,
#
# ```python
# lj.generate(config, params, tokens, lengths, key, sampling, max_new_tokens=...) -> GenerateOutput
# ```
#
# so JAX transformations apply to it. This notebook shows that on a pretrained model, SmolLM2 with 135M
# parameters: samples by `vmap`, a sweep of temperatures in one compiled program, batch invariance, a logit
# lens, guided decoding from `lj.prefill` and the parts of a step, self-consistency, and gradients with
# respect to the prompt.

# %%
import collections
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import style

import llama_jax as lj
from llama_jax.attention import AttentionMask, attention
from llama_jax.decoding.state import sample_token
from llama_jax.layers import Block, embed, rms_norm, unembed
from llama_jax.model import forward_cached
from llama_jax.rope import rotary

style.use()
model = lj.load("smollm2-135m")
config, tokenizer, stacked = model.config, model.tokenizer, model.params
params = lj.unstack(stacked)  # separate arrays per layer, which decoding reads without copying


def batch_of(texts):
    """Prompts for `generate`: right-padded tokens [B, T], and lengths [B]."""
    rows = [tokenizer.encode(text) for text in texts]
    width = max(map(len, rows))
    return jnp.array([row + [0] * (width - len(row)) for row in rows]), jnp.array([len(row) for row in rows])


def piece(token):
    return tokenizer.decode([int(token)], skip_special_tokens=False)


# %% [markdown]
# ## 1. One compilation, many samples
#
# The whole program below is jitted: a `vmap` over keys inside a `vmap` over temperatures. It returns tokens
# and their log-probabilities. Keys and temperatures are arguments: other values run the same program. The
# Python body runs when JAX traces it, so counting its runs counts compilations.

# %%
NEW = 16
traces = collections.Counter()


@jax.jit
def sweep(params, tokens, lengths, keys, temperatures):
    """For each temperature [J] and key [I]: tokens [J, I, NEW] and the model's log-probabilities of them."""
    traces["sweep"] += 1

    def one(temperature, key):
        sampling = lj.Sampling(temperature=temperature)
        out = lj.generate(config, params, tokens, lengths, key, sampling, max_new_tokens=NEW)
        return out.tokens[0], out.logprobs[0]

    over_keys = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_keys, in_axes=(0, None))(temperatures, keys)


prompt = "The strangest thing about the old house was"
tokens, lengths = batch_of([prompt])
temperatures = jnp.array([0.0, 0.4, 0.7, 1.0, 1.3])
for seed in (0, 1):
    start_time = time.perf_counter()
    texts, logprobs = jax.block_until_ready(
        sweep(params, tokens, lengths, jax.random.split(jax.random.key(seed), 12), temperatures + 0.01 * seed)
    )
    seconds = time.perf_counter() - start_time
    print(f"seed {seed}: {seconds:.1f} s for {texts.shape[0] * texts.shape[1]} texts")
    if seed == 0:
        first_texts, first_logprobs = texts, logprobs
assert traces["sweep"] == 1  # other keys and temperatures use the same program
assert (first_texts[0] == first_texts[0, 0]).all()  # at temperature 0 the key has no effect

for t, row in zip(temperatures, first_texts[:, 0], strict=True):
    print(f"\nT = {t:.1f}: {prompt}{tokenizer.decode(row)}", end="")

# %% [markdown]
# The effect of temperature. Left: the cumulative log-probability of each text (under the model, before
# temperature); greedy is on top, and high temperatures fall below it. Right, over all texts of a
# temperature: the mean negative log-probability, and the number of different tokens per position.

# %%
left, right = style.panels(2, height=3)
running = np.cumsum(first_logprobs, axis=-1)
for index, color in ((1, style.SKY), (3, style.BLUE), (4, style.RED)):
    left.plot(np.arange(1, NEW + 1), running[index].T, color=color, linewidth=0.7, alpha=0.8)
    left.plot([], color=color, label=f"T = {temperatures[index]:.1f}")
left.plot(np.arange(1, NEW + 1), running[0, 0], color="black", linewidth=2, label="greedy")
left.set(title="12 seeds at each temperature", xlabel="new tokens", ylabel="log-probability so far (nats)")
left.set_xticks(range(0, NEW + 1, 5))
left.legend()
surprise = -first_logprobs.mean((1, 2))
kinds = [np.mean([len(set(column.tolist())) for column in texts.T]) for texts in np.asarray(first_texts)]
right.plot(temperatures, surprise, "o-", color=style.BLUE)
right.set(title="quality against variety", xlabel="temperature", ylabel="nats per token", ylim=(0, None))
right.yaxis.label.set_color(style.BLUE)
other = right.twinx()
other.plot(temperatures, kinds, "s--", color=style.RED)
other.set(ylim=(0, 12.5))
other.set_ylabel("different tokens per position, of 12", color=style.RED)
assert np.all(np.diff(kinds) > 0)

# %% [markdown]
# Samples follow the model's distribution: 128 samples of one token, each batch row with its own key,
# against the softmax of `lj.forward`'s logits; the error bars are two standard errors.

# %%
num_samples = 128
out = lj.generate(
    config, params, tokens, lengths, jax.random.key(7), max_new_tokens=1, num_return_sequences=num_samples
)
probability = np.asarray(jax.nn.softmax(lj.forward(config, stacked, tokens)[0, -1]))
top_tokens = np.argsort(-probability)[:16]
frequency = np.bincount(np.asarray(out.tokens[:, 0]), minlength=config.vocab_size)[top_tokens] / num_samples
error = 2 * np.sqrt(probability[top_tokens] * (1 - probability[top_tokens]) / num_samples)
axes = style.panels(1, height=2.5, width=8)
places = np.arange(len(top_tokens))
axes.bar(
    places,
    probability[top_tokens],
    yerr=error,
    color=style.SKY,
    ecolor=style.GREY,
    capsize=2,
    label="softmax",
)
axes.plot(places, frequency, "D", color=style.RED, markersize=5, label=f"frequency in {num_samples} samples")
axes.set(title="the next token", ylabel="probability")
style.token_ticks(axes, [piece(token) for token in top_tokens])
axes.legend()
assert np.all(np.abs(frequency - probability[top_tokens]) < 2 * error)  # four standard errors, all 16

# %% [markdown]
# ## 2. Batch invariance
#
# A batch is ragged, and its rows have their own sampling settings and keys. In many systems a text depends
# on the rest of its batch: padding shifts positions, or all rows share one random stream. Here every row
# equals, token for token, the same prompt alone.

# %%
prompts = [
    "Water boils at",
    "My favourite book is about a young sailor who",
    "def add(a, b):\n    return",
    "Once upon a time",
]
settings = {
    "temperature": [0.0, 0.9, 0.0, 1.2],
    "top_p": [1.0, 0.9, 1.0, 0.95],
    "repetition_penalty": [1.0, 1.1, 1.0, 1.0],
}
rows, row_lengths = batch_of(prompts)
keys = jax.random.split(jax.random.key(3), len(prompts))
together = lj.generate(
    config,
    params,
    rows,
    row_lengths,
    keys,
    lj.Sampling(**{name: jnp.array(v) for name, v in settings.items()}),
    max_new_tokens=16,
)
for b, text in enumerate(prompts):
    sampling = lj.Sampling(**{name: values[b] for name, values in settings.items()})
    alone = lj.generate(config, params, *batch_of([text]), keys[b : b + 1], sampling, max_new_tokens=16)
    same = bool((alone.tokens[0] == together.tokens[b]).all())
    print(f"{'same' if same else 'DIFFERENT'}: {text!r} + {tokenizer.decode(together.tokens[b])!r}")
    assert same

# %% [markdown]
# ## 3. A logit lens
#
# Every layer adds to one residual stream, which the last norm and the unembedding turn into logits. The
# logit lens (nostalgebraist, *interpreting GPT: the logit lens*, 2020; refined as the tuned lens, [arXiv
# 2303.08112](https://arxiv.org/abs/2303.08112)) reads the stream after each layer as if it were the last.
# The library's `Block` takes parameters as a plain dict and attention as a function, so we can write the
# loop over layers ourselves:


# %%
def streams(params, x):
    """The residual stream [L + 1, T, D] before each layer and after the last, from embeddings x [1, T, D]."""
    order = jnp.arange(x.shape[1])[None]
    table, where = rotary(config, order), AttentionMask(order, order)

    def layer(x, weights):
        x, _ = Block(config).apply(
            {"params": weights}, x, table, lambda q, k, v: (attention(q, k, v, where), None)
        )
        return x, x[0]

    _, after = jax.lax.scan(layer, x, params["layers"])
    return jnp.concatenate([x, after])


def read(params, x):
    """Logits [..., T, V] of residual streams [..., T, D]."""
    return unembed(rms_norm(x, params["final_norm"]["scale"], eps=config.rms_norm_eps), params)


@jax.jit
def lens(params, tokens):
    x = streams(params, embed(params["embed"]["embedding"], tokens, dtype=jnp.float32))
    return jax.nn.softmax(read(params, x), axis=-1)


text = "The capital of France is Paris. The capital of Italy is"
ids, _ = batch_of([text])
seen = lens(stacked, ids)
assert jnp.allclose(seen[-1], jax.nn.softmax(lj.forward(config, stacked, ids)[0]), atol=1e-5)

layers = np.array([0, *range(4, 31, 2)])
shown = np.asarray(seen)[layers]
axes, ranks = style.panels(1, 2, height=3.6, height_ratios=(2.2, 1))
style.heat(axes, shown.max(-1), label="probability of the argmax token", vmin=0, vmax=1)
for (row, place), top in np.ndenumerate(shown.max(-1)):
    word = style.visible(piece(shown[row, place].argmax()))
    axes.text(place, row, word, ha="center", va="center", fontsize=8, color=style.ink(top))
axes.set(title="most likely next token, decoded after each layer", ylabel="layer")
axes.set_yticks(range(len(layers)), layers)
style.token_ticks(axes, [piece(i) for i in ids[0]])
axes.tick_params(axis="x", rotation=0)
axes.invert_yaxis()

rome = tokenizer.encode(" Rome")[0]
for word, mark in ((" Rome", "o-"), (" Paris", "s--"), (" France", "^:")):
    probability = seen[:, -1, tokenizer.encode(word)[0]]
    ranks.plot(1 + (seen[:, -1] > probability[:, None]).sum(-1), mark, markersize=3, label=word.strip())
ranks.set(
    title=f"ranks among {config.vocab_size:,} tokens, at the last position",
    xlabel="layer",
    ylabel="rank",
    yscale="log",
)
ranks.invert_yaxis()
ranks.legend()
print(f"after the last layer ' Rome' is most likely, with a probability of {seen[-1, -1, rome]:.2f}")
assert seen[-1, -1].argmax() == rome

# %% [markdown]
# Before the first layer the stream is the token's embedding, and since SmolLM2's output is tied to it, the
# lens decodes the token itself (except for the names, where `<filename>`, a marker of code files, scores
# even higher). In the middle it decodes short words with too much confidence: those layers use a basis that
# does not match the unembedding, which the tuned lens corrects. The dark column at the left is the first
# token, the attention sink of notebook 01: its stream is a hundred times larger than the others', and says
# nothing about the next token. The ranks show the layer at which a name starts to rise.
#
# ## 4. Guided decoding, in ten lines
#
# Classifier-free guidance for language models (Sanchez et al., [arXiv
# 2306.17806](https://arxiv.org/abs/2306.17806)), and context-aware decoding ([arXiv
# 2305.14739](https://arxiv.org/abs/2305.14739)) by the same formula, extrapolate from the model's
# logits without a context to those with it:
#
# $$\text{logits} = u + \gamma\,(c - u)$$
#
# with $c$ conditional and $u$ unconditional; $\gamma = 1$ is ordinary decoding, $\gamma = 0$ ignores the
# context. The two prompts are two rows of one `DecodeState`; a step runs the model on both, mixes the
# logits, and appends the same token to both rows. `sample_token` is the second half of `lj.decode_step`: it
# applies logits processors and sampling settings, samples a token, and appends it.


# %%
def guided(params, tokens, lengths, gamma, *, max_new_tokens):
    """Greedy text [max_new_tokens] of row 0 (with context) and row 1 (without), guided by gamma."""
    state = lj.prefill(
        config,
        params,
        tokens,
        lengths,
        jax.random.key(0),
        lj.Sampling(temperature=0.0),
        max_new_tokens=max_new_tokens,
    )

    def step(_, state):
        last = state.history.length - 1
        tokens = state.history.token_at(last)[:, None]
        (c, u), cache = forward_cached(config, params, tokens, last, state.cache)
        mixed = jnp.broadcast_to(u + gamma * (c - u), (2, config.vocab_size))
        state = sample_token(dataclasses.replace(state, cache=cache), mixed, ~state.done)
        return dataclasses.replace(state, count=state.count + 1)

    return jax.lax.fori_loop(0, max_new_tokens, step, state).output.tokens[0]


pair = batch_of(["In my house, the snow is black. The color of snow is", "The color of snow is"])
gammas = jnp.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
each_gamma = jax.vmap(functools.partial(guided, max_new_tokens=8), in_axes=(None, None, None, 0))
found = jax.jit(each_gamma)(params, *pair, gammas)
for gamma, row in zip(gammas, found, strict=True):
    print(f"γ = {gamma:.1f}: {tokenizer.decode(row)!r}")

greedy = lj.generate(config, params, *pair, jax.random.key(0), lj.Sampling(temperature=0.0), max_new_tokens=8)
assert (found[2] == greedy.tokens[0]).all()  # γ = 1 is generate with the context
assert (found[0] == greedy.tokens[1]).all()  # γ = 0 is generate without it

# %% [markdown]
# The first token's probabilities over γ. Up to a point guidance raises what the context implies; beyond it,
# the extrapolation favors every token that the context makes relatively more likely.

# %%
last = pair[1] - 1
c, u = jax.nn.log_softmax(lj.forward(config, stacked, pair[0])[jnp.arange(2), last])
grid = jnp.linspace(0, 4, 81)
mixed = np.asarray(jax.nn.softmax(u + grid[:, None] * (c - u), axis=-1))
axes = style.panels(1, height=2.8, width=7)
words = [" black", " white", " not", " determined", " ugly"]
for word, mark in zip(words, ("-", "--", "-.", ":", (0, (3, 1, 1, 1))), strict=True):
    axes.plot(grid, mixed[:, tokenizer.encode(word)[0]], linestyle=mark, label=word.strip())
axes.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
axes.text(
    1.03,
    0.98,
    "ordinary decoding",
    transform=axes.get_xaxis_transform(),
    va="top",
    fontsize=8,
    color=style.GREY,
)
axes.set(
    title="“In my house, the snow is black. The color of snow is …”",
    xlabel="γ",
    ylabel="probability",
    ylim=(0, None),
)
axes.legend(bbox_to_anchor=(1, 1))
black = mixed[:, tokenizer.encode(" black")[0]]
print(f"' black': {black[20]:.2f} at γ = 1, {black.max():.2f} at its best, γ = {grid[black.argmax()]:.2f}")
assert black.max() > 2 * black[20]

# %% [markdown]
# ## 5. Self-consistency: many samples, one vote
#
# Wang et al. ([arXiv 2203.11171](https://arxiv.org/abs/2203.11171)) sample several answers and take a
# majority vote. The samples of all questions form one batch, and each prompt is prefilled once
# (`num_return_sequences`).

# %%
capitals = {
    "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Poland": "Warsaw", "Ireland": "Dublin",
    "China": "Beijing", "Canada": "Ottawa", "Chile": "Santiago", "Portugal": "Lisbon", "Iraq": "Baghdad",
    "Thailand": "Bangkok", "Turkey": "Ankara",
}  # fmt: skip
questions = [f"Country: Vietnam. Capital: Hanoi.\nCountry: {country}. Capital:" for country in capitals]
N = 12
out = lj.generate(
    config, params, *batch_of(questions), jax.random.key(1), lj.Sampling(temperature=1.0),
    max_new_tokens=3, num_return_sequences=N,
)  # fmt: skip
answers = [
    [tokenizer.decode(ids).split(".")[0].strip() for ids in row]
    for row in out.tokens.reshape(len(capitals), N, -1)
]


def is_right(answer, capital):
    return bool(answer) and (capital.startswith(answer) or answer.startswith(capital))


def share_right(n, tries=200, rng=np.random.default_rng(0)):  # noqa: B008
    """Fraction of majority votes among n samples that name the capital."""
    right = 0
    for row, capital in zip(answers, capitals.values(), strict=True):
        for _ in range(tries):
            votes = [row[i] for i in rng.permutation(N)[:n]]
            right += is_right(collections.Counter(votes).most_common(1)[0][0], capital)
    return right / (tries * len(capitals))


left, right = style.panels(2, height=3.2, width_ratios=(1.7, 1))
for place, (row, capital) in enumerate(zip(answers, capitals.values(), strict=True)):
    start = 0
    ranked = sorted(
        collections.Counter(row).items(), key=lambda item: (not is_right(item[0], capital), -item[1])
    )
    for answer, votes in ranked:
        good = is_right(answer, capital)
        left.barh(place, votes, left=start, color=style.BLUE if good else style.ORANGE, edgecolor="white")
        if votes > 1:
            left.text(
                start + votes / 2,
                place,
                answer,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if good else "black",
            )
        start += votes
left.set_yticks(range(len(capitals)), capitals)
left.invert_yaxis()
left.set(title=f"{N} answers (blue: correct)", xlabel="votes")
sizes = [1, 3, 5, 7, 9, 12]
shares = [share_right(n) for n in sizes]
right.plot(sizes, shares, "o-", color=style.BLUE)
right.set(
    title="majority vote of n samples",
    xlabel="n samples",
    ylabel="fraction of questions correct",
    ylim=(0, 1.02),
    xticks=sizes,
)
print(f"one sample is correct {shares[0]:.0%} of the time, the vote of {N} {shares[-1]:.0%}")
assert shares[-1] > shares[0]

# %% [markdown]
# ## 6. Gradients with respect to the prompt
#
# Sampling a token has no gradient, but everything before it is differentiable. `streams` starts from
# embeddings, so `jax.grad` gives the sensitivity of the logit of " Rome" to each embedding of the prompt;
# its product with the embedding itself is the first-order estimate of what the token contributes.


# %%
@jax.jit
def logit(x, params, token):
    return read(params, streams(params, x)[-1:, -1:])[0, 0, token]


x = embed(stacked["embed"]["embedding"], ids, dtype=jnp.float32)
gradient = jax.grad(logit)(x, stacked, rome)[0]

direction = jax.random.normal(jax.random.key(0), x.shape)
direction /= jnp.linalg.norm(direction)
h = 1e-2
numeric = float(logit(x + h * direction, stacked, rome) - logit(x - h * direction, stacked, rome)) / (2 * h)
exact = float((gradient * direction[0]).sum())
print(f"along a random direction: gradient {exact:.4f}, finite difference {numeric:.4f}")
assert abs(numeric - exact) < 0.02 * float(jnp.linalg.norm(gradient))

norms = jnp.linalg.norm(gradient, axis=-1)
products = (gradient * x[0]).sum(-1)
upper, lower = style.panels(1, 2, height=1.7, width=8, sharex=True)
upper.bar(range(len(norms)), norms, color=style.BLUE)
upper.set(title="sensitivity of the logit of “Rome” to each embedding", ylabel="norm of the\ngradient")
lower.bar(range(len(norms)), products, color=[style.BLUE if p > 0 else style.ORANGE for p in products])
lower.axhline(0, color="black", linewidth=0.8)
lower.set(ylabel="gradient ·\nembedding")
style.token_ticks(lower, [piece(i) for i in ids[0]])
print("the gradient is largest at", repr(piece(ids[0, int(norms.argmax())])))

# %% [markdown]
# Everything above uses the public package and a few of its functions on arrays, without patches, subclasses
# or hooks. The same programs run over a mesh: load with `lj.load(...,
# mesh=lj.make_mesh("fsdp=4,tensor=2"))` and call them inside `jax.set_mesh(mesh)`.
