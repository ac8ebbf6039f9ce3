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
# # Pretrain a small Llama, and watch it learn
#
# A randomly initialized Llama of two million parameters trains on Python's standard library, which every
# machine has. In 200 steps it goes from guessing among 2,048 tokens to writing text that looks like Python.
# The trainer is the one that runs on a pod; it writes metrics, validation losses, samples and checkpoints
# into a directory, and every figure below is made from that directory.
#
# ## The run
#
# A run is one TOML file. This one is small in every respect. `{stdlib}` is Python's standard library; a BPE
# vocabulary is trained on the same text first; 4% of the documents are the validation set, never trained
# on.

# %%
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import style
from matplotlib.patches import Rectangle

import llama_jax as lj
from llama_jax.layers import Block, embed
from llama_jax.rope import rotary
from llama_jax.train.config.read import load_config
from llama_jax.train.data import open_data

style.use()
folder = Path(tempfile.mkdtemp(prefix="small_llama_"))
(folder / "run.toml").write_text(f"""
[model]
hidden_size = 192
intermediate_size = 512
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 256
tie_word_embeddings = true

[tokenizer]
vocab_size = 2048
max_bytes = 3_000_000

[data]
files = "{{stdlib}}/*.py"
# Modules that are mostly numbers or place names would dominate what a small model learns.
exclude = [
    "*/_pydecimal.py", "*/statistics.py", "*/locale.py", "*/turtle.py", "*/mimetypes.py", "*/stringprep.py",
    "*/random.py", "*/fractions.py",
]
validation_fraction = 0.04

[train]
run_dir = {json.dumps(str(folder / "run"))}
steps = 200
global_batch_size = 6
seq_len = 256
remat = "none"
loss_chunks = 1

[optimizer]
name = "muon"
learning_rate = 1e-2
warmup_steps = 15

[checkpoint]
every = 40
keep = 10

[eval]
every = 40
batches = 12
sample_every = 40
prompt = "def read(self"
max_new_tokens = 60
temperature = 0.4

[log]
every = 8
tensorboard = false
""")
run, run_dir = load_config(folder / "run.toml"), folder / "run"
# `llama-jax train run.toml`, in its own process.
plain = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # which Jupyter sets
command = [sys.executable, "-m", "llama_jax.train", folder / "run.toml"]
done = subprocess.run(command, capture_output=True, text=True, env=plain, check=False)
print("\n".join(line for line in done.stderr.splitlines() if "sample" not in line and "tokens/s" not in line))
assert done.returncode == 0, done.stderr
print(sorted(path.name for path in run_dir.iterdir()))

# %% [markdown]
# ## The loss
#
# Two baselines: the uniform distribution over V tokens has a loss of ln V nats per token, and a unigram
# model, which knows only token frequencies, has a loss of their entropy. A lower loss means that the model
# uses the context. The validation loss follows the training loss: the model learns Python, and does not
# memorize these files.


# %%
def records(name):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


steps = records("metrics.jsonl")
evaluations = records("evaluations.jsonl")
measured = [record for record in evaluations if "eval_loss" in record]
model = lj.load(run_dir)
config, tokenizer = model.config, model.tokenizer
data = open_data(
    run.data,
    tokenizer,
    seq_len=run.train.seq_len,
    batch_size=run.train.global_batch_size,
    seed=run.train.seed,
)
uniform, unigram = math.log(config.vocab_size), data.unigram_loss()

left, right = style.panels(2, height=3.2, width_ratios=(2, 1))
left.plot(
    [r["step"] for r in steps], [r["loss"] for r in steps], color=style.SKY, label="training, mean of 8 steps"
)
left.plot(
    [r["step"] for r in measured],
    [r["eval_loss"] for r in measured],
    "o-",
    color=style.BLUE,
    label="validation",
)
for height, words in ((uniform, "uniform: ln 2048"), (unigram, "unigram model, validation")):
    left.axhline(height, color=style.GREY, linestyle=":", linewidth=1)
    left.text(run.train.steps, height + 0.05, words, ha="right", fontsize=8, color=style.GREY)
left.set(
    title=f"{config.num_params / 1e6:.1f}M parameters", xlabel="step", ylabel="nats per token", ylim=(2.5, 8)
)
left.legend(loc="lower left")
right.plot([r["step"] for r in steps], [r["learning_rate"] for r in steps], color=style.GREEN)
right.set(title="learning rate: warmup, then cosine", xlabel="step", ylabel="learning rate", ylim=(0, None))
print(
    f"loss {steps[0]['loss']:.2f} in the first steps (ln V is {uniform:.2f}); "
    f"eval_loss {measured[-1]['eval_loss']:.2f} at the end"
)
print(f"a unigram model: {unigram:.2f}; {measured[-1]['bits_per_byte']:.2f} bits per byte of text")
assert (
    abs(
        lj.next_token_loss(config, lj.init(config, jax.random.key(0)), jnp.arange(256)[None] * 7 % 2048).mean
        - uniform
    )
    < 0.5
)
assert measured[-1]["eval_loss"] < unigram - 1.5

# %% [markdown]
# ## Samples during training
#
# The trainer generated a sample every 40 steps, always after `def read(self`. First the most common tokens
# appear, then matching brackets and indentation, then names that belong together.

# %%
for record in evaluations:
    if record["step"] in (40, 80, 160, 200) and "text" in record:
        print(f"----- step {record['step']}, eval_loss {record['eval_loss']:.2f}\n{record['text']}\n")

# %% [markdown]
# ## Loss per token
#
# A function that is not in the library, token by token: the darker a token, the higher its loss. The
# initial weights are `lj.init` with the run's seed; the others are the run's checkpoints, each of which
# `lj.load` reads as a model.

# %%
first = lj.init(config, jax.random.key(run.train.seed))
snapshots = (
    {0: first}
    | {at: lj.load(run_dir / "checkpoints" / str(at)).params for at in (40, 120)}
    | {200: model.params}
)

snippet = '''def count_lines(path, encoding="utf-8"):
    """Return the number of lines in a file."""
    with open(path, "r", encoding=encoding) as file:
        lines = file.readlines()
    if not lines:
        return None
    return len(lines)
'''
ids = tokenizer.encode(snippet)
if tokenizer.bos_id is not None and ids[0] != tokenizer.bos_id:
    ids = [tokenizer.bos_id, *ids]
tokens = jnp.array([ids])


def surprise(params):
    """-log p of each token except the first, [T - 1], in nats."""
    logp = jax.nn.log_softmax(lj.forward(config, params, tokens))[0, :-1]
    return -np.asarray(logp[jnp.arange(len(ids) - 1), tokens[0, 1:]])


def draw_text(axes, pieces, shades):
    """Draws tokens as text, each on a background of its shade (0 to 1)."""
    mono = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 7}
    column = row = 0
    for piece, dark in zip(pieces, shades, strict=True):
        for part in piece.splitlines(keepends=True):
            letters = part.rstrip("\n")
            axes.add_patch(Rectangle((column, row - 0.5), len(letters), 1, color=shade(dark), linewidth=0))
            for place, letter in enumerate(letters):
                axes.text(column + place + 0.5, row, letter, color=style.ink(1 - dark), **mono)
            column, row = (0, row + 1) if part.endswith("\n") else (column + len(letters), row)
    axes.set(xlim=(0, 56), ylim=(row - 0.4, -0.6), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


stream = tokenizer.stream()
pieces = [stream.push(token) for token in ids]
at_step = {step: surprise(params) for step, params in snapshots.items()}
assert at_step[200].mean() < at_step[40].mean() < at_step[0].mean()

shade = style.plt.get_cmap("cividis_r")
for axes, step in zip(style.panels(2, 2, height=1.9, width=11).ravel(), snapshots, strict=True):
    draw_text(axes, pieces, [0, *np.minimum(at_step[step] / uniform, 1)])
    axes.set_title(f"step {step}: {at_step[step].mean():.2f} nats per token")
scale = style.plt.cm.ScalarMappable(style.plt.Normalize(0, uniform), shade)
_ = style.plt.gcf().colorbar(scale, ax=style.plt.gcf().axes, label="loss in nats", fraction=0.02)
# %% [markdown]
# ## What changed inside
#
# **Embeddings.** `True` and `False` become similar because they occur in similar contexts. Cosine
# similarity between embeddings of some tokens, by kind, before and after training:

# %%
kinds = {
    "digits": list("0123456789"),
    "constants": ["True", "False", "None"],
    "keywords": ["if", "for", "while", "return", "raise", "import"],
    "names": ["self", "name", "value", "data", "path", "file"],
    "brackets": ["(", ")", "[", "]", "{", "}"],
}
chosen = [
    (kind, word, tokenizer.encode(f"x = {word}")[-1]) for kind, words in kinds.items() for word in words
]
chosen = [
    (kind, word, i) for kind, word, i in chosen if tokenizer.decode([i]).strip() == word
]  # one token each


def cosines(params):
    rows = np.asarray(params["embed"]["embedding"])[[i for _, _, i in chosen]]
    rows = rows - np.asarray(params["embed"]["embedding"]).mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


same = np.array([[a[0] == b[0] and a is not b for b in chosen] for a in chosen])
other = np.array([[a[0] != b[0] for b in chosen] for a in chosen])
for axes, step in zip(style.panels(2, height=4), (0, 200), strict=True):
    table = cosines(snapshots[step])
    style.heat(axes, table, label="cosine", cmap=style.SIDES, vmin=-1, vmax=1, aspect="equal")
    style.token_ticks(axes, [word for _, word, _ in chosen], y=True)
    inside, across = table[same].mean(), table[other].mean()
    axes.set_title(f"step {step}: mean {inside:.2f} within a kind, {across:.2f} across")
assert inside > across + 0.1

# %% [markdown]
# **Attention.** The same `Block` as in training, with an `attend` that returns its weights. Before
# training, attention is nearly uniform over all previous tokens. After training, heads are selective; the
# figure shows the two heads that are farthest from uniform, on the start of the function.


# %%
@jax.jit
def attention_maps(params):
    """f32 [L, N, T, T] on the snippet."""
    order = jnp.arange(len(ids))
    causal = order[None, :] <= order[:, None]

    def attend(q, k, v):
        k, v = (
            jnp.repeat(x, config.num_attention_heads // config.num_key_value_heads, axis=1) for x in (k, v)
        )
        scores = jnp.einsum("btnh,bnsh->bnts", q, k) / math.sqrt(config.head_dim)
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bnsh->btnh", weights, v), weights[0]

    def layer(x, weights):
        x, (maps, _) = Block(config).apply({"params": weights}, x, rotary(config, order[None]), attend)
        return x, maps

    x = embed(params["embed"]["embedding"], tokens, dtype=jnp.float32)
    return jax.lax.scan(layer, x, params["layers"])[1]


before, after = (np.asarray(attention_maps(params)) for params in (snapshots[0], snapshots[200]))
uniform_map = np.tril(np.ones(before.shape[2:])) / np.arange(1, len(ids) + 1)[:, None]
distance_from_uniform = {
    name: np.abs(maps - uniform_map).sum(-1).mean(-1) / 2
    for name, maps in (("before", before), ("after", after))
}
ranked = np.argsort(-distance_from_uniform["after"], axis=None)
heads = [np.unravel_index(i, distance_from_uniform["after"].shape) for i in ranked[:2]]

first_tokens = 28
axes = style.panels(3, height=3.7)
for ax, maps, (layer, head), step in (
    (axes[0], before, heads[0], 0),
    (axes[1], after, heads[0], 200),
    (axes[2], after, heads[1], 200),
):
    corner = maps[layer, head, :first_tokens, :first_tokens]
    style.heat(ax, corner, label="attention weight", vmin=0, vmax=1, aspect="equal", colorbar=ax is axes[2])
    style.token_ticks(ax, pieces[:first_tokens], y=True)
    ax.tick_params(labelsize=6)
    ax.set_title(f"step {step}: layer {layer}, head {head}")
for name, distances in distance_from_uniform.items():  # total variation: 0 is uniform, 1 is disjoint from it
    print(
        f"distance from uniform, {name}: {distances.mean():.2f} over all heads, at most {distances.max():.2f}"
    )
assert distance_from_uniform["before"].max() < 0.1 < distance_from_uniform["after"].mean()

# %% [markdown]
# The run directory is a model: `llama-jax generate DIR --prompt "def "` continues a text, `llama-jax
# convert` exports it, and the same `llama-jax train` command with more `train.steps` resumes from its last
# checkpoint, bit for bit. `configs/tiny_cpu.toml` is a similar run, three times as long, and
# `configs/llama2_7b.toml` uses the same trainer on a pod.
