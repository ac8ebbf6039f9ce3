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
# # LoRA and DPO, before and after
#
# Llama 2 became Llama 2-Chat in two moves: supervised finetuning on good answers, then learning from
# preferences between answers (arXiv 2307.09288, section 3). This notebook makes both moves with SmolLM2
# on a laptop, and writes out what the trainer does (`llama-jax train configs/sft_smollm2.toml`) in a few
# lines:
#
# 1. a task that the model fails, and the share of its answers that are right;
# 2. which tokens of a conversation are learned;
# 3. LoRA: two thin matrices beside each weight, trained alone;
# 4. what they learned, layer by layer;
# 5. DPO: from pairs of answers, with the model itself as the judge of how far it has gone;
# 6. all of them at once: each row of a batch with its own adapter.

# %%
import sys

sys.path.insert(0, "..")  # the repository: its made tasks

import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import style

import llama_jax as lj
from benchmarks import tasks
from llama_jax.adapters import lora
from llama_jax.chat import chat_template, encode_chat, encode_turns
from llama_jax.train.objectives.preference import dpo_loss

style.use()
model = lj.load("smollm2-135m")
config, tokenizer, params = model.config, model.tokenizer, model.params
template = chat_template(tokenizer)
SYSTEM = {"role": "system", "content": "Answer."}  # the template's own is longer

# %% [markdown]
# ## 1. A task, and how the model does
#
# A sentence about some things is to be answered by one line, `noun | colour | number`. Nobody has told
# the model so. `benchmarks/tasks.py` makes 600 examples to learn from and 100 with other words, which are
# held out.

# %%
train, held_out = ([[SYSTEM, *record["messages"]] for record in part] for part in tasks.extract())
validation_fraction = held_out[:24]


def answers(params, conversations, most=12):
    """Greedy answers to conversations that end with the user's turn."""
    prompts = [encode_chat(tokenizer, template, turns) for turns in conversations]
    width = max(map(len, prompts))
    tokens = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts], np.int32)
    out = lj.generate(
        config,
        params,
        tokens,
        np.array([len(prompt) for prompt in prompts]),
        jax.random.key(0),
        lj.Sampling(temperature=0.0),
        max_new_tokens=most,
        eos_id=tokenizer.eos_ids,
    )
    rows = zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
    return [tokenizer.decode(ids[:length].tolist()).strip() for ids, length in rows]


def show(conversations, *columns):
    for turns, *said in list(zip(conversations, *columns, strict=True))[:3]:
        print(turns[-2]["content"])
        print(f"    wanted  {turns[-1]['content']!r}")
        for name, text in zip(("before", "after "), said, strict=False):
            print(f"    {name}  {text!r}")


def right(said):
    return sum(text == turns[-1]["content"] for text, turns in zip(said, held_out, strict=True)) / len(said)


before = answers(lj.unstack(params), [turns[:-1] for turns in held_out])
show(held_out, before)
print(f"\nright: {right(before):.0%}")
assert right(before) < 0.1

# %% [markdown]
# ## 2. What is learned of a conversation
#
# The template turns the messages into one text. Only what the assistant says, and the token with which it
# stops, is to be predicted: the rest it is given. `encode_turns` returns the ids and a mask, and a turn's
# tokens begin exactly where the prompt that `generate` would get ends.

# %%
ids, mask = encode_turns(tokenizer, template, train[0])
assert ids[: mask.index(1)] == encode_chat(tokenizer, template, train[0][:-1])

axes = style.panels(1, height=0.9)
axes.imshow([mask], aspect="auto", cmap="Greens", vmin=0, vmax=1.6)
style.token_ticks(axes, [tokenizer.decode([i], skip_special_tokens=False) for i in ids])
axes.set_yticks([])
axes.set_title("green: what is learned")
plt.show()

# %% [markdown]
# ## 3. LoRA
#
# A weight $W$ stays as it is, and $W + \tfrac{\alpha}{r} A B$ takes its place, with $A$ of $r$ columns
# and $B$ of $r$ rows (arXiv 2106.09685). $B$ begins as zero, so that nothing is changed at first. In this
# library an adapter is a tree of those matrices beside the tree of parameters: `attach` puts both
# together, and what `jax.grad` is asked for is the adapter alone. The optimizer's two moments are as
# small as it is.


# %%
def batches(examples, rows, seed):
    """Endless batches [rows, T] of padded examples in an order of the seed."""
    coded = [encode_turns(tokenizer, template, turns) for turns in examples]
    width = max(len(ids) for ids, _ in coded)
    draw = np.random.default_rng(seed)
    while True:
        chosen = [coded[i] for i in draw.integers(0, len(coded), rows)]
        yield tuple(
            np.array([list(part[k]) + [0] * (width - len(part[k])) for part in chosen], np.int32)
            for k in (0, 1)
        )


settings = lora.Lora(rank=8, alpha=16)
base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)  # frozen, so half of the bytes will do
compute = lj.ForwardOptions(dtype=jnp.bfloat16, custom_vjp=True, remat="full")
optimizer = optax.adam(1e-3)


@jax.jit
def step(adapter, moments, base, tokens, mask):
    def loss(adapter):
        attached = lora.attach(settings, base, adapter)
        return lj.next_token_loss(config, attached, tokens, mask=mask, options=compute).mean

    value, gradient = jax.value_and_grad(loss)(adapter)
    updates, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(adapter, updates), moments, value


adapter = lora.init(settings, base, jax.random.key(0))
moments = optimizer.init(adapter)
size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
held = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
print(f"trained: {size(adapter) / 1e6:.2f}M of {size(params) / 1e6:.1f}M parameters")
print(
    f"with the optimizer's moments {style.nbytes(held((adapter, moments)))}; all the weights would take "
    f"{style.nbytes(3 * held(params))}"
)
assert held((adapter, moments)) < 0.02 * 3 * held(params)

losses, began = [], time.perf_counter()
for (tokens, mask), _ in zip(batches(train, 12, 0), range(20), strict=False):
    adapter, moments, value = step(adapter, moments, base, tokens, mask)
    losses.append(float(value))
print(f"{len(losses)} steps of {tokens.size} tokens: {time.perf_counter() - began:.0f} s, compiling included")

# %% [markdown]
# Merged into the weights, the adapter costs nothing at all when the model is used; merged or attached,
# the numbers are the same.

# %%
attached = lora.attach(settings, params, adapter)
merged = lora.merge(attached)
some = np.array([ids])
np.testing.assert_allclose(
    lj.forward(config, merged, some), lj.forward(config, attached, some), atol=1e-4, rtol=1e-5
)

after = answers(lj.unstack(merged), [turns[:-1] for turns in held_out])
show(held_out, before, after)
print(f"\nright: {right(before):.0%} before, {right(after):.0%} after")
assert right(after) > 0.9

left, bars = style.panels(2)
left.plot(losses, color=style.BLUE)
left.set(xlabel="step", ylabel="nats a learned token", title="The loss of the answers", yscale="log")
bars.bar(["before", "after"], [right(before), right(after)], color=[style.GREY, style.BLUE], width=0.5)
bars.set(ylim=(0, 1.05), ylabel="share of held-out answers", title="Exactly right")
plt.show()

# %% [markdown]
# ## 4. Where the change is
#
# The product $\tfrac{\alpha}{r} A B$ is a matrix as large as $W$; the picture shows its norm as a share
# of $W$'s, for each matrix of each layer. The whole behaviour is in changes of about a percent.

# %%
names = list(settings.matrices)
share = np.zeros((len(names), config.num_hidden_layers))
for row, name in enumerate(names):
    part = lora.PROJECTIONS[name][0]
    leaf, weight = adapter["layers"][part][name], params["layers"][part][name]
    for layer in range(config.num_hidden_layers):
        delta = settings.scale * leaf["a"][layer] @ leaf["b"][layer]
        share[row, layer] = jnp.linalg.norm(delta) / jnp.linalg.norm(weight[layer].reshape(-1))
axes = style.panels(1, height=2.2)
style.heat(axes, 100 * share, label="percent of the weight's norm")
axes.set(xlabel="layer", title="How much each matrix was changed")
axes.set_yticks(range(len(names)), names)
plt.show()

# %% [markdown]
# ## 5. DPO
#
# Often nobody can write the one right answer, but anybody can say which of two is better. Direct
# preference optimisation (arXiv 2305.18290) raises the chosen answer over the rejected one, measured from
# where the model began. With $r(y) = \beta \log \frac{\pi(y)}{\pi_{\text{ref}}(y)}$, the loss of a pair
# is
#
# $$-\log \sigma\big(r(y_{\text{chosen}}) - r(y_{\text{rejected}})\big).$$
#
# The reference is the base without its adapter, so it takes no memory; and as it does not change, its
# numbers can be computed once. The pairs here say the same thing in two manners: one polite, one not.

# %%
pairs, others = tasks.manner()
BETA = 0.1


def coded(records):
    """Rows 2i and 2i + 1 are the chosen and the rejected answer of pair i: tokens and mask [2P, T]."""
    rows = [
        encode_turns(tokenizer, template, [SYSTEM, *record["prompt"], *record[which]])
        for record in records
        for which in ("chosen", "rejected")
    ]
    width = max(len(ids) for ids, _ in rows)
    return tuple(
        np.array([list(row[k]) + [0] * (width - len(row[k])) for row in rows], np.int32) for k in (0, 1)
    )


@jax.jit
def said(adapter, base, tokens, mask):
    """log p of each row's answer, f32 [2P]."""
    attached = lora.attach(settings, base, adapter)
    return (lj.token_logprobs(config, attached, tokens, options=compute) * mask).sum(1)


def compared(policy, reference):
    return dpo_loss(policy[::2], policy[1::2], reference[::2], reference[1::2], beta=BETA)


rule = optax.adam(5e-4)


@jax.jit
def prefer(adapter, moments, base, tokens, mask, reference):
    def loss(adapter):
        losses, chosen, rejected = compared(said(adapter, base, tokens, mask), reference)
        return losses.mean(), (chosen, rejected)

    (value, rewards), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
    updates, moments = rule.update(gradient, moments)
    return optax.apply_updates(adapter, updates), moments, value, rewards


PAIRS = 6  # a step
tokens, mask = coded(pairs[: 12 * PAIRS])
fresh = lora.init(settings, base, jax.random.key(1))
cut = [slice(2 * PAIRS * i, 2 * PAIRS * (i + 1)) for i in range(12)]
began = time.perf_counter()
reference = [said(fresh, base, tokens[at], mask[at]) for at in cut]
manner, moments, history = fresh, rule.init(fresh), []
for at, before_it in zip(cut, reference, strict=True):
    manner, moments, value, rewards = prefer(manner, moments, base, tokens[at], mask[at], before_it)
    history.append([float(value), *(float(r.mean()) for r in rewards)])
print(f"{len(history)} steps of {PAIRS} pairs: {time.perf_counter() - began:.0f} s, compiling included")

# %% [markdown]
# On pairs about places that it has not seen: the share whose chosen answer has the larger reward, and how
# the model answers by itself now. Before the first step every reward is 0, and which answer is better is
# a coin's toss.

# %%
unseen, learned = coded(others[: 2 * PAIRS])
width = tokens.shape[1]
unseen, learned = (np.pad(x, ((0, 0), (0, max(0, width - x.shape[1]))))[:, :width] for x in (unseen, learned))
halves = (slice(0, 2 * PAIRS), slice(2 * PAIRS, None))
policy, start = (
    np.concatenate([said(tree, base, unseen[h], learned[h]) for h in halves]) for tree in (manner, fresh)
)
_, chosen, rejected = compared(policy, start)
accuracy = float((chosen > rejected).mean())
print(f"held-out pairs ordered as people would: {accuracy:.0%}")
assert accuracy > 0.9

curves, dots = style.panels(2)
curves.plot([h[1] for h in history], color=style.BLUE, label="chosen")
curves.plot([h[2] for h in history], color=style.RED, label="rejected")
curves.axhline(0, color=style.GREY, linewidth=0.8)
curves.set(xlabel="step", ylabel="implicit reward", title="What DPO moves, on the pairs of each step")
curves.legend()
dots.scatter(rejected, chosen, color=style.BLUE, s=18)
low, high = min(rejected.min(), chosen.min(), 0), max(rejected.max(), chosen.max(), 0)
dots.plot([low, high], [low, high], color=style.GREY, linewidth=0.8)
dots.set(xlabel="reward of the rejected answer", ylabel="of the chosen one", title="Held-out pairs")
plt.show()

# %% [markdown]
# ## 6. One batch, three models
#
# Adapters are small enough to keep many of them beside one base. `attach_rows` gives each row of a batch
# its own, here the base, the extractor and the polite one, in one call of `generate`.

# %%
both = lora.attach_rows(
    lj.unstack(params), [(settings, adapter), (settings, manner)], rows=jnp.array([-1, 0, -1, 1])
)
asked = "She bought seven green hats at the market yesterday."
place = others[0]["prompt"][0]["content"]
turns = [[SYSTEM, {"role": "user", "content": text}] for text in (asked, asked, place, place)]
replies = answers(both, turns, most=20)
for name, (_, question), reply in zip(("base", "extract", "base", "manner"), turns, replies, strict=True):
    print(f"{name:>8}   {question['content']}\n{'':>8}   {reply!r}\n")
assert replies[1] == "hats | green | 7"

# %% [markdown]
# The trainer does the same with packing, meshes, checkpoints and exact resumption, and writes the adapter
# in PEFT's format: `llama-jax train configs/sft_smollm2.toml`, and
# [docs/finetuning.md](../docs/finetuning.md).
