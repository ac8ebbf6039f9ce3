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
# # GRPO: learning from rewards
#
# The last step of Llama 2-Chat's recipe: a model answers, a program says how good each answer is, and the
# model learns from the difference. This notebook trains a Llama small enough for a laptop's seconds:
#
# 1. an imitator, which learns to sort digits from demonstrations, most of which are wrong;
# 2. one group of its answers, their rewards and advantages;
# 3. GRPO (arXiv 2402.03300): reward, length, divergence and entropy while it learns to be right;
# 4. the mismatch between the program that samples and the one that trains, in f32 and in bf16;
# 5. `train.exact_rollouts`, which makes it exactly zero.

# %%
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import style

import llama_jax as lj
from llama_jax.train.rl.advantages import group_advantages

style.use()
folder = Path(tempfile.mkdtemp(prefix="grpo_"))
rng = random.Random(0)


def train(name, text, *flags):
    """`llama-jax train NAME.toml --section.key VALUE ...`, in its own process; returns its metrics."""
    (folder / f"{name}.toml").write_text(text)
    plain = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    command = [sys.executable, "-m", "llama_jax.train", f"{name}.toml", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=plain, check=False)
    assert done.returncode == 0, done.stderr
    run = dict(zip(flags[::2], flags[1::2], strict=True)).get("--train.run_dir", name)
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


# %% [markdown]
# ## 1. An imitator
#
# Four digits are to be sorted: `3 1 4 2 =` is answered by ` 1 2 3 4`. Of the demonstrations, one in three is
# right; the others are in some other order, or go on with more digits. A model that imitates them well is
# right one time in three: it knows how to sort, and that it mostly does not.


# %%
def task():
    digits = rng.sample(range(10), 4)
    return " ".join(map(str, digits)) + " =", " ".join(map(str, sorted(digits)))


def demonstration():
    prompt, answer = task()
    digits = answer.split()
    match rng.randrange(3):
        case 1:
            rng.shuffle(digits)
        case 2:
            digits += [str(rng.randrange(10)) for _ in range(rng.randint(1, 4))]
    return {"text": f"{prompt} {' '.join(digits)}"}


def write(name, records):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


write("demonstrations.jsonl", [demonstration() for _ in range(20_000)])
asked = [dict(zip(("prompt", "answer"), task(), strict=True)) for _ in range(1_100)]
write("prompts.jsonl", asked[:1_000])
write("unseen.jsonl", asked[1_000:])

imitator = train(
    "imitator",
    """
[model]
hidden_size = 64
intermediate_size = 192
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
tie_word_embeddings = true
[tokenizer]
vocab_size = 272
[data]
files = "demonstrations.jsonl"
validation_fraction = 0.01
[train]
run_dir = "imitator"
steps = 300
global_batch_size = 32
seq_len = 64
dtype = "float32"
remat = "none"
loss_chunks = 1
[optimizer]
name = "muon"
learning_rate = 1e-2
warmup_steps = 20
[checkpoint]
every = 0
[eval]
every = 0
max_new_tokens = 0
[log]
every = 10
tensorboard = false
plot = false
""",
)
model = lj.load(folder / "imitator")
config, tokenizer, params = model.config, model.tokenizer, lj.unstack(model.params)
print(f"{config.num_params:,} parameters; loss {imitator[0]['loss']:.2f}, then {imitator[-1]['loss']:.2f}")


def answers(params, prompts, copies=1, temperature=1.0, seed=0):
    """Sampled answers, `copies` for each prompt: texts, token ids, and the output of `lj.generate`."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    out = lj.generate(
        config,
        params,
        np.array([row + [0] * (width - len(row)) for row in rows], np.int32),
        np.array([len(row) for row in rows]),
        jax.random.key(seed),
        lj.Sampling(temperature=temperature),
        max_new_tokens=10,
        eos_id=tokenizer.eos_ids,
        num_return_sequences=copies,
    )
    ids = [row[:length].tolist() for row, length in zip(np.asarray(out.tokens), out.lengths, strict=True)]
    return (
        [tokenizer.decode(row).strip() for row in ids],
        [row for row in rows for _ in range(copies)],
        ids,
        out,
    )


def accuracy(params):
    texts = answers(params, [record["prompt"] for record in asked[1_000:]])[0]
    return np.mean([text == record["answer"] for text, record in zip(texts, asked[1_000:], strict=True)])


before = accuracy(params)
print(f"answers to unseen prompts that are right: {before:.0%}")
assert 0.1 < before < 0.6

# %% [markdown]
# ## 2. A group
#
# GRPO needs no value function: it compares the answers to one prompt with each other. An answer's advantage
# is its reward less the group's mean, divided by the group's standard deviation; all its tokens get it. The
# reward here is 1 for the right answer, and nothing else.

# %%
prompt, answer = asked[0]["prompt"], asked[0]["answer"]
texts, *_ = answers(params, [prompt], copies=12)
rewards = np.array([[float(text == answer) for text in texts]])
(advantages,) = group_advantages(rewards)
assert abs(advantages.sum()) < 1e-5

axes = style.panels(1, height=2.6, width=6)
colors = [style.GREEN if a > 0 else style.RED for a in advantages]
axes.barh(range(len(texts)), advantages, color=colors)
axes.set_yticks(range(len(texts)), texts, fontsize=8, family="monospace")
axes.invert_yaxis()
axes.axvline(0, color=style.GREY, linewidth=0.8)
axes.set(title=f"Answers to “{prompt}”", xlabel="advantage: made likelier (green), or less likely (red)")
plt.show()

# %% [markdown]
# ## 3. GRPO
#
# Each step samples eight answers to each of sixteen prompts, rewards them, and takes one step up the
# advantages, computing in bf16. `beta` weighs the divergence from the imitator. With `loss_type = "dr_grpo"`
# no token's weight depends on the length of its answer (arXiv 2503.20783).

# %%
GRPO = """
[model]
init_from = "imitator"
[data]
files = "prompts.jsonl"
validation_files = "unseen.jsonl"
[train]
objective = "grpo"
run_dir = "grpo"
steps = 40
global_batch_size = 128
seq_len = 24
dtype = "bfloat16"
remat = "none"
loss_chunks = 1
[rl]
rewards = ["exact_match"]
num_generations = 8
max_completion_length = 10
loss_type = "dr_grpo"
scale_rewards = "group"
beta = 0.01
[optimizer]
learning_rate = 5e-4
warmup_steps = 0
schedule = "cosine"
weight_decay = 0.0
[checkpoint]
every = 0
[eval]
every = 0
max_new_tokens = 0
[log]
every = 1
tensorboard = false
plot = false
"""
rounded = train("grpo", GRPO)
learned = lj.unstack(lj.load(folder / "grpo").params)
after = accuracy(learned)
print(f"answers to unseen prompts that are right: {before:.0%} before, {after:.0%} after")
assert after > 0.7 > before


def draw(axes, records, name, title, ylabel, **rest):
    axes.plot([r["step"] for r in records], [r[name] for r in records], **rest)
    axes.set(title=title, ylabel=ylabel, xlabel="step")


(reward, length), (kl, entropy) = style.panels(2, 2)
draw(reward, rounded, "reward", "Reward", "share of right answers", color=style.GREEN)
reward.set_ylim(0, 1.02)
draw(length, rounded, "completion_length", "Length", "tokens of an answer", color=style.BLUE)
draw(kl, rounded, "kl", "Divergence from the imitator", "nats per token", color=style.ORANGE)
draw(entropy, rounded, "entropy", "Entropy", "nats per token", color=style.PINK)
plt.show()

# %% [markdown]
# What it learned is which of the things that it could already do is wanted: the wrong orders and the extra
# digits disappear, so answers get shorter, and the entropy falls.

# %%
for name, weights in (("before", params), ("after", learned)):
    texts, *_ = answers(weights, [prompt], copies=6, seed=2)
    print(f"{name:>7}: {' | '.join(texts)}")

# %% [markdown]
# ## 4. Two programs, two roundings
#
# An answer's probability is computed twice: while it is sampled, token by token against a cache, and by the
# trainer, whole rows at a time. The numbers are equal but for rounding. The ratio $\pi / \pi_{\text{old}}$ of
# the loss is their quotient, so rounding is a bias; a difference between two stacks that is larger than
# rounding has ruined runs without a word.


# %%
def mismatch(dtype):
    """log p of the same tokens, by `forward` less that of `generate`, in a compute dtype."""
    weights = jax.tree.map(lambda x: x.astype(dtype), learned)
    _, rows, ids, out = answers(weights, [record["prompt"] for record in asked[:64]], copies=4)
    width = max(len(row) + len(own) for row, own in zip(rows, ids, strict=True))
    tokens = np.array(
        [row + own + [0] * (width - len(row + own)) for row, own in zip(rows, ids, strict=True)]
    )
    logits = lj.forward(config, weights, tokens[:, :-1])
    logs = np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2)[..., 0])
    found = []
    for row, (before, own) in enumerate(zip(rows, ids, strict=True)):
        found += (
            logs[row, len(before) - 1 :][: len(own)] - np.asarray(out.logprobs[row, : len(own)])
        ).tolist()
    return np.array(found)


columns = style.panels(2)
for axes, dtype, color in zip(columns, (jnp.float32, jnp.bfloat16), (style.BLUE, style.RED), strict=True):
    found = mismatch(dtype)
    axes.hist(found, bins=60, color=color, log=True)
    axes.set(title=jnp.dtype(dtype).name, xlabel="log p, trainer less sampler", ylabel="tokens")
    print(f"{jnp.dtype(dtype).name:>8}: up to {abs(found).max():.1e}")
plt.show()

# %% [markdown]
# ## 5. Exact rollouts
#
# With `train.exact_rollouts` the trainer's program has the last word: decoding proposes an answer, that
# program draws each token again from its own logits with the same random numbers, and where it gets another
# one, that is put in place and the rest proposed anew. At the end every token was drawn from the logits that
# it is trained on. The run of section 3 was in bf16; the same with exact rollouts:

# %%
exact = train("grpo", GRPO, "--train.run_dir", "exact", "--train.exact_rollouts", "true")

left, middle, right = style.panels(3)
for records, name, color in ((rounded, "as they come", style.RED), (exact, "exact", style.GREEN)):
    draw(left, records, "rollout_logprob_diff_max", "Mismatch, maximum", "nats", color=color, label=name)
    draw(middle, records, "reward", "Reward", "share of right answers", color=color, label=name)
left.legend()
draw(right, exact, "rollout_passes", "Cost", "passes of the trainer's program", color=style.BLUE)
right.set_ylim(0, None)
plt.show()
assert {record["rollout_logprob_diff_max"] for record in exact} == {0.0}
assert min(record["rollout_logprob_diff_max"] for record in rounded) > 1e-3
print(f"without: {max(record['rollout_logprob_diff_max'] for record in rounded):.3f} nats; with: exactly 0")
changed = sum(record["rollout_changed_tokens"] for record in exact)
drawn = sum(record["completion_length"] for record in exact) * 128
print(f"tokens that were changed: {changed:.0f} of {drawn:.0f}")

# %% [markdown]
# `llama-jax train configs/grpo_smollm2.toml` does the same with SmolLM2 and sums. Prompts, reward functions
# and models, and the variants of the loss: [docs/rl.md](../docs/rl.md).
