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
# Llama 2 became Llama 2-Chat in two stages: supervised finetuning on good answers, then learning from
# preferences between answers (arXiv 2307.09288, section 3). This notebook runs both stages with SmolLM2 on
# a laptop, and writes out in a few lines what the trainer does (`llama-jax train
# configs/sft_smollm2.toml`):
#
# 1. a task that the model fails, and the accuracy of its answers;
# 2. which tokens of a conversation are trained on;
# 3. LoRA: a pair of low-rank matrices for each weight, the only trained parameters;
# 4. how much each matrix changes, layer by layer;
# 5. DPO: training on pairs of answers, with the base model as the reference;
# 6. one batch with a different adapter for each row.

# %%
import sys

sys.path.insert(0, "..")  # the repository, for benchmarks.tasks

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
SYSTEM = {"role": "system", "content": "Answer."}  # the template's default is longer

# %% [markdown]
# ## 1. A task, and the model's accuracy
#
# A sentence about some objects is to be answered by one line, `noun | color | number`. The prompt does not
# say so. `benchmarks/tasks.py` generates 600 training examples, and 100 validation examples with other
# sentences.

# %%
train, validation = ([[SYSTEM, *record["messages"]] for record in part] for part in tasks.extract())
validation = validation[:24]


def answers(params, conversations, max_new_tokens=12):
    """Greedy answers to conversations that end with a user turn."""
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
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_ids,
    )
    rows = zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
    return [tokenizer.decode(ids[:length].tolist()).strip() for ids, length in rows]


def show(conversations, *columns):
    for turns, *texts in list(zip(conversations, *columns, strict=True))[:3]:
        print(turns[-2]["content"])
        print(f"    expected {turns[-1]['content']!r}")
        for name, text in zip(("before", "after "), texts, strict=False):
            print(f"    {name}  {text!r}")


def accuracy(texts):
    return sum(text == turns[-1]["content"] for text, turns in zip(texts, validation, strict=True)) / len(
        texts
    )


before = answers(lj.unstack(params), [turns[:-1] for turns in validation])
show(validation, before)
print(f"\naccuracy: {accuracy(before):.0%}")
assert accuracy(before) < 0.1

# %% [markdown]
# ## 2. Which tokens are trained on
#
# The chat template renders the messages as one text. Only the assistant's answers and their end tokens are
# trained on; everything else is the prompt. `encode_turns` returns the ids and a mask; an answer starts
# exactly where the prompt of `generate` would end.

# %%
ids, mask = encode_turns(tokenizer, template, train[0])
assert ids[: mask.index(1)] == encode_chat(tokenizer, template, train[0][:-1])

axes = style.panels(1, height=0.9)
axes.imshow([mask], aspect="auto", cmap="Greens", vmin=0, vmax=1.6)
style.token_ticks(axes, [tokenizer.decode([i], skip_special_tokens=False) for i in ids])
axes.set_yticks([])
axes.set_title("green: tokens that are trained on")
plt.show()

# %% [markdown]
# ## 3. LoRA
#
# A weight $W$ is frozen, and replaced by $W + \tfrac{\alpha}{r} A B$, where $A$ has $r$ columns and $B$ has
# $r$ rows (arXiv 2106.09685). $B$ is initialized to zero, so the model is unchanged at first. In this
# library an adapter is a pytree of those matrices: `attach` combines it with the parameters, and `jax.grad`
# differentiates with respect to the adapter alone. The optimizer's two moments have the size of the
# adapter.


# %%
def batches(examples, rows, seed):
    """Infinite batches [batch_size, T] of padded examples, in an order given by the seed."""
    encoded = [encode_turns(tokenizer, template, turns) for turns in examples]
    width = max(len(ids) for ids, _ in encoded)
    draw = np.random.default_rng(seed)
    while True:
        chosen = [encoded[i] for i in draw.integers(0, len(encoded), rows)]
        yield tuple(
            np.array([list(part[k]) + [0] * (width - len(part[k])) for part in chosen], np.int32)
            for k in (0, 1)
        )


settings = lora.Lora(rank=8, alpha=16)
base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)  # frozen, so bf16 is enough
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
num_bytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
print(f"trained: {size(adapter) / 1e6:.2f}M of {size(params) / 1e6:.1f}M parameters")
print(
    f"with the optimizer's moments {style.nbytes(num_bytes((adapter, moments)))}; all the weights would take "
    f"{style.nbytes(3 * num_bytes(params))}"
)
assert num_bytes((adapter, moments)) < 0.02 * 3 * num_bytes(params)

losses, start_time = [], time.perf_counter()
for (tokens, mask), _ in zip(batches(train, 12, 0), range(20), strict=False):
    adapter, moments, value = step(adapter, moments, base, tokens, mask)
    losses.append(float(value))
seconds = time.perf_counter() - start_time
print(f"{len(losses)} steps of {tokens.size} tokens: {seconds:.0f} s, including compilation")

# %% [markdown]
# Merged into the weights, the adapter costs nothing at inference. Merged and attached adapters give the
# same logits.

# %%
attached = lora.attach(settings, params, adapter)
merged = lora.merge(attached)
some = np.array([ids])
of_merged, of_attached = lj.forward(config, merged, some), lj.forward(config, attached, some)
assert abs(of_merged - of_attached).max() < 2e-5 * abs(of_attached).max()  # two orders of summation in f32

after = answers(lj.unstack(merged), [turns[:-1] for turns in validation])
show(validation, before, after)
print(f"\naccuracy: {accuracy(before):.0%} before, {accuracy(after):.0%} after")
assert accuracy(after) > 0.9

left, bars = style.panels(2)
left.plot(losses, color=style.BLUE)
left.set(xlabel="step", ylabel="nats per trained token", title="Loss of the answers", yscale="log")
bars.bar(["before", "after"], [accuracy(before), accuracy(after)], color=[style.GREY, style.BLUE], width=0.5)
bars.set(ylim=(0, 1.05), ylabel="validation accuracy", title="Exact matches")
plt.show()

# %% [markdown]
# ## 4. How much the weights change
#
# The product $\tfrac{\alpha}{r} A B$ has the shape of $W$; the figure shows its norm relative to $W$'s, for
# each matrix of each layer. Changes of about one percent are enough for the new behavior.

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
axes.set(xlabel="layer", title="Relative change of each matrix")
axes.set_yticks(range(len(names)), names)
plt.show()

# %% [markdown]
# ## 5. DPO
#
# Often nobody can write the one right answer, but anybody can tell which of two is better. Direct
# preference optimization (arXiv 2305.18290) raises the probability of the chosen answer over the rejected
# one, relative to a reference model. With $r(y) = \beta \log \frac{\pi(y)}{\pi_{\text{ref}}(y)}$, the loss
# of a pair is
#
# $$-\log \sigma\big(r(y_{\text{chosen}}) - r(y_{\text{rejected}})\big).$$
#
# The reference is the base without its adapter, so it needs no extra memory. It does not change, so its
# log-probabilities can be computed once. The pairs have the same content in two styles: one polite, one
# not.

# %%
pairs, others = tasks.manner()
BETA = 0.1


def encode_pairs(records):
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
def answer_logprobs(adapter, base, tokens, mask):
    """log p of each row's answer, f32 [2P]."""
    attached = lora.attach(settings, base, adapter)
    return (lj.token_logprobs(config, attached, tokens, options=compute) * mask).sum(1)


def dpo_rewards(policy, reference):
    return dpo_loss(policy[::2], policy[1::2], reference[::2], reference[1::2], beta=BETA)


rule = optax.adam(5e-4)


@jax.jit
def prefer(adapter, moments, base, tokens, mask, reference):
    def loss(adapter):
        losses, chosen, rejected = dpo_rewards(answer_logprobs(adapter, base, tokens, mask), reference)
        return losses.mean(), (chosen, rejected)

    (value, rewards), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
    updates, moments = rule.update(gradient, moments)
    return optax.apply_updates(adapter, updates), moments, value, rewards


PAIRS = 6  # per step
tokens, mask = encode_pairs(pairs[: 12 * PAIRS])
fresh = lora.init(settings, base, jax.random.key(1))
slices = [slice(2 * PAIRS * i, 2 * PAIRS * (i + 1)) for i in range(12)]
start_time = time.perf_counter()
reference = [answer_logprobs(fresh, base, tokens[rows], mask[rows]) for rows in slices]
manner, moments, history = fresh, rule.init(fresh), []
for rows, reference_logprobs in zip(slices, reference, strict=True):
    manner, moments, value, rewards = prefer(
        manner, moments, base, tokens[rows], mask[rows], reference_logprobs
    )
    history.append([float(value), *(float(r.mean()) for r in rewards)])
print(f"{len(history)} steps of {PAIRS} pairs: {time.perf_counter() - start_time:.0f} s with compilation")

# %% [markdown]
# On pairs about unseen places: the fraction whose chosen answer has the larger implicit reward. Before the
# first step every reward is 0.

# %%
unseen, unseen_mask = encode_pairs(others[: 2 * PAIRS])
width = tokens.shape[1]
unseen, unseen_mask = (
    np.pad(x, ((0, 0), (0, max(0, width - x.shape[1]))))[:, :width] for x in (unseen, unseen_mask)
)
halves = (slice(0, 2 * PAIRS), slice(2 * PAIRS, None))
policy, start = (
    np.concatenate([answer_logprobs(tree, base, unseen[h], unseen_mask[h]) for h in halves])
    for tree in (manner, fresh)
)
_, chosen, rejected = dpo_rewards(policy, start)
pair_accuracy = float((chosen > rejected).mean())
print(f"validation pairs with the larger reward on the chosen answer: {pair_accuracy:.0%}")
assert pair_accuracy > 0.9

curves, dots = style.panels(2)
curves.plot([h[1] for h in history], color=style.BLUE, label="chosen")
curves.plot([h[2] for h in history], color=style.RED, label="rejected")
curves.axhline(0, color=style.GREY, linewidth=0.8)
curves.set(xlabel="step", ylabel="implicit reward", title="Implicit rewards on the pairs of each step")
curves.legend()
dots.scatter(rejected, chosen, color=style.BLUE, s=18)
low, high = min(rejected.min(), chosen.min(), 0), max(rejected.max(), chosen.max(), 0)
dots.plot([low, high], [low, high], color=style.GREY, linewidth=0.8)
dots.set(xlabel="reward of the rejected answer", ylabel="of the chosen one", title="Validation pairs")
plt.show()

# %% [markdown]
# ## 6. One batch, three models
#
# Adapters are small enough to keep many of them with one base. `attach_rows` gives each row of a batch its
# own adapter: here none, the extractor and the polite one, in one call of `generate`.

# %%
both = lora.attach_rows(
    lj.unstack(params), [(settings, adapter), (settings, manner)], rows=jnp.array([-1, 0, -1, 1])
)
asked = "She bought seven green hats at the market yesterday."
place = others[0]["prompt"][0]["content"]
turns = [[SYSTEM, {"role": "user", "content": text}] for text in (asked, asked, place, place)]
replies = answers(both, turns, max_new_tokens=20)
for name, (_, question), reply in zip(("base", "extract", "base", "manner"), turns, replies, strict=True):
    print(f"{name:>8}   {question['content']}\n{'':>8}   {reply!r}\n")
assert replies[1] == "hats | green | 7"

# %% [markdown]
# The trainer does the same with packing, meshes, checkpoints and exact resumption, and writes the adapter
# in PEFT's format: `llama-jax train configs/sft_smollm2.toml`, and
# [docs/finetuning.md](../docs/finetuning.md).
