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
# # Looking inside, and steering
#
# Every value inside the model has a name, at which it can be captured and replaced, under `jit`, `vmap`,
# `grad` and `jvp`. With SmolLM2-135M:
#
# 1. the logit lens: what each layer would say;
# 2. a tuned lens: the same through a map that is fitted to each layer;
# 3. activation patching: where a fact is, by layer and position, in one vectorized call;
# 4. steering while text is generated, at any strength without compiling again;
# 5. derivatives through the whole model: Jacobian-vector products, gradients of each example,
#    Hessian-vector products.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import style

import llama_jax as lj
from llama_jax import inspection
from llama_jax.layers import rms_norm

style.use()
model = lj.load("smollm2-135m")
config, params, tokenizer = model.config, model.params, model.tokenizer
for name, shape in lj.sites(config).items():
    print(f"{name:<26}{shape}")


def ids(text):
    return jnp.array([model.encode_prompt(text)])


def pieces(tokens):
    return [style.visible(tokenizer.decode([token])) for token in np.asarray(tokens).tolist()]


# %% [markdown]
# ## 1. The logit lens
#
# The residual stream after each layer, read by the final norm and the output projection (nostalgebraist,
# "interpreting GPT: the logit lens", 2020). `capture` gives all layers in one forward pass.


# %%
@jax.jit
def read_out(params, x):
    """Logits of residual streams [..., D]; the output projection of this model is its embedding table."""
    x = rms_norm(x, params["final_norm"]["scale"], eps=config.rms_norm_eps)
    return x @ params["embed"]["embedding"].T


prompt = "The capital of France is Paris. The capital of Germany is"
tokens = ids(prompt)
logits, found = lj.capture(config, params, tokens, sites=["block.residual_post"])
streams = found["block.residual_post"][:, 0]  # [L, T, D]
lens = read_out(params, streams)  # [L, T, V]
np.testing.assert_allclose(lens[-1], logits[0], atol=1e-3)  # the last layer says what the model says

# %%
best = np.asarray(lens.argmax(-1))
probability = np.asarray(jax.nn.softmax(lens, -1).max(-1))
axes = style.panels(1, height=5.5)
style.heat(axes, probability, label="probability of the likeliest token", origin="lower")
for layer in range(0, config.num_hidden_layers, 2):
    for place, piece in enumerate(pieces(best[layer])):
        light = probability[layer, place] > 0.5
        axes.text(
            place, layer, piece[:8], ha="center", va="center", size=5, color="black" if light else "white"
        )
axes.set_xticks(range(tokens.shape[1]), pieces(tokens[0]), rotation=60)
axes.set(xlabel="token", ylabel="layer", title="What each layer would say next")
plt.show()

# %% [markdown]
# ## 2. A tuned lens
#
# Earlier layers write in other coordinates than the last. A tuned lens (arXiv 2303.08112) maps each layer's
# stream to the last one's first; here by ridge regression on a text, in closed form.

# %%
text = (
    "A river begins as rain on the hills. The water runs down in small streams, which meet in the valley,"
    " and the river grows. It turns the wheels of mills, it carries boats from town to town, and in the "
    "end it comes to the sea. The old people of the village tell that in some winters it froze, and that "
    "children skated on it for weeks. Today it seldom does. In spring, when the snow melts, the river "
    "rises, and the fields beside it stand under water; farmers know this, and build their houses on "
    "higher ground. Engineers measure the level of the water every hour, and write it down. With these "
    "numbers they foresee a flood two days before it comes. "
)
fit_tokens = jnp.array(model.encode_prompt(text * 3)[:384])[None]
_, found = lj.capture(config, params, fit_tokens, sites=["block.residual_post"])
x, y = found["block.residual_post"][:-1, 0, 1:], found["block.residual_post"][-1, 0, 1:]  # [L - 1, T, D]


@jax.jit
@jax.vmap
def fit(x):
    """The map [D + 1, D] from one layer's stream to the last one's."""
    x = jnp.concatenate([x, jnp.ones((x.shape[0], 1))], 1)
    gram = x.T @ x
    return jnp.linalg.solve(gram + 1e-3 * jnp.trace(gram) / len(gram) * jnp.eye(len(gram)), x.T @ y)


maps = fit(x)
ones = jnp.ones((*streams.shape[:2], 1))[:-1]
tuned = read_out(params, jnp.concatenate([streams[:-1], ones], -1) @ maps)


def divergence(logits):
    """KL(model || lens) of each layer, in nats, averaged over the tokens of the prompt."""
    p = jax.nn.log_softmax(lens[-1])
    return (jnp.exp(p) * (p - jax.nn.log_softmax(logits))).sum(-1).mean(-1)


axes = style.panels(1)
axes.plot(divergence(lens[:-1]), label="logit lens")
axes.plot(divergence(tuned), label="tuned lens, fitted to another text")
axes.set(xlabel="layer", ylabel="nats from the model's answer", title="How far each layer is from the answer")
axes.legend()
plt.show()

# %% [markdown]
# ## 3. Activation patching
#
# Two prompts differ in one word. The run of the second is given, at one layer and one position, what the
# first had there: where that brings the first one's answer back, the fact is. An edit is a pytree, so that
# all layers and positions are one `vmap`.

# %%
clean = ids("The capital of France is Paris. The capital of Germany is")
corrupt = ids("The capital of France is Paris. The capital of Italy is")
assert clean.shape == corrupt.shape
answers = [tokenizer.encode(word)[-1] for word in (" Berlin", " Rome")]
clean_logits, captured = lj.capture(config, params, clean, sites=["block.residual_post"])
corrupt_logits = lj.forward(config, params, corrupt)


def preference(logits):
    """How much likelier Berlin is than Rome, in nats."""
    return logits[0, -1, answers[0]] - logits[0, -1, answers[1]]


def patched(params, stream, layer, position):
    captured = {"block.residual_post": stream[None]}
    edit = inspection.patch(captured, layers=layer, positions=position[None])
    return preference(lj.forward(config, params, corrupt, edit=edit))


layers = jnp.arange(0, config.num_hidden_layers, 3)
over_positions = jax.vmap(patched, (None, None, None, 0))
over_layers = jax.jit(jax.vmap(over_positions, (None, 0, 0, None)))
length = clean.shape[1]
effect = over_layers(params, captured["block.residual_post"][layers], layers, jnp.arange(length))
low, high = preference(corrupt_logits), preference(clean_logits)
print(f"Berlin over Rome: {float(high):+.1f} nats in the first prompt, {float(low):+.1f} in the second")

axes = style.panels(1, height=3.4)
style.heat(axes, (effect - low) / (high - low), label="share of the answer that is restored", origin="lower")
axes.set_xticks(range(length), pieces(corrupt[0]), rotation=60)
axes.set_yticks(range(len(layers)), np.asarray(layers).tolist())
axes.set(xlabel="token of the second prompt", ylabel="layer", title="Patching the residual stream")
plt.show()

# %% [markdown]
# ## 4. Steering
#
# The difference of two prompts' streams, added at every position while text is generated (arXiv 2308.10248).
# The cached decoding sees the same edit, and another strength is another number, not another program.

# %%
site, layer = "block.residual_post", 12


def stream_of(text):
    _, found = lj.capture(config, params, ids(text), sites=[site], layers=[layer])
    return found[site][0, 0].mean(0)


happy = ["I love this wonderful day.", "What a joyful, happy surprise!", "I feel great and full of hope."]
sad = ["I hate this terrible day.", "What a sad, painful loss!", "I feel awful and full of despair."]
vector = sum(map(stream_of, happy)) / len(happy) - sum(map(stream_of, sad)) / len(sad)
for scale in (-2.0, 0.0, 2.0):
    steered = model.with_edit(inspection.steer(vector, layers=layer, scale=scale))
    said = steered.generate("When I woke up this morning, I felt", max_new_tokens=24)
    print(f"{scale:+.0f}: {said.strip()}")

# %% [markdown]
# ## 5. Derivatives through the model
#
# Everything above is a pure function. The derivative of the answer in a direction of the stream is one
# forward-mode pass; `vmap` of `grad` has a gradient for each example; `jvp` of `grad` is a Hessian-vector
# product.


# %%
def answer(shift):
    edit = inspection.steer(shift, layers=layer)
    return preference(lj.forward(config, params, corrupt, edit=edit))


direction = vector / jnp.linalg.norm(vector)
value, slope = jax.jvp(answer, (jnp.zeros_like(direction),), (direction,))
step = 0.05
print(f"slope {float(slope):+.4f}; by differences {float((answer(step * direction) - value) / step):+.4f}")

batch = jnp.concatenate([clean, corrupt])
scales = params["final_norm"]["scale"]


def loss(scale, row):
    changed = {**params, "final_norm": {"scale": scale}}
    return lj.next_token_loss(config, changed, row[None], num_chunks=1).mean


each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(scales, batch)
print("gradients of each example:", each.shape, "; cosine between them:", end=" ")
print(f"{float(each[0] @ each[1] / jnp.linalg.norm(each[0]) / jnp.linalg.norm(each[1])):.3f}")
tangent = jnp.ones_like(scales) / np.sqrt(scales.size)
_, product = jax.jvp(lambda scale: jax.grad(loss)(scale, batch[0]), (scales,), (tangent,))
print(f"curvature in the direction of all scales: {float(tangent @ product):.3f}")
