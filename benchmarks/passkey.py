"""The passkey test: a small model of 2,048 tokens, extended by YaRN to 16,384, finds a key at every depth.

    python -m benchmarks.passkey OUT [--plot docs/long_context.png] [--json docs/long_context.json]

A text of filler sentences has a key of four words at some depth, and ends with the question for it (arXiv
2305.16300). Everything is made here, by the project's own programs: the vocabulary, the
examples (token ids, for `sft`), three runs of `llama-jax train`, each from the weights of the one before, and
the share of keys that are found, all four words, by greedy decoding. The runs, in OUT:

1. `short`: at most 256 tokens, where retrieval is learnt fastest; the model's context is 2,048 throughout.
2. `trained`: up to 2,048 tokens.
3. `extended`: YaRN with factor 8, a few steps of up to 16,384 tokens, on four simulated devices with
   `mesh.context = 4`.

The model is evaluated at each length and depth as it was trained, with YaRN alone, and after the steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import llama_jax as lj
from benchmarks.gpu import commit
from llama_jax.eval import heat_map
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.train import train_sentencepiece

FILLER = (
    " The grass is low.",
    " The sky is clear.",
    " The sun is high.",
    " Here we go.",
    " There and back again.",
    " A river runs by the old town.",
    " Birds sing at dawn.",
    " We walk on for hours.",
)
NEEDLE, QUESTION = " The pass key:", " What was the pass key:"
# A key has a word of each of these.
KEYS = (
    (" red", " blue", " green", " pink", " black", " white", " gold", " grey"),
    (" cat", " dog", " fox", " owl", " bear", " wolf", " duck", " frog"),
    (" oak", " elm", " fir", " ash", " palm", " pine", " rose", " fern"),
    (" one", " two", " six", " ten", " nine", " five", " four", " zero"),
)
VOCABULARY = 480  # enough for a word of a key to be one token

CONFIG = """\
[model]
{model}
[tokenizer]
path = "{folder}/tokenizer.model"
[data]
files = "{folder}/{name}.jsonl"
validation_fraction = 0.02
[train]
objective = "sft"
run_dir = "{folder}/{name}"
remat = "none"
dtype = "float32"
loss_chunks = 1
steps = {steps}
global_batch_size = {batch}
seq_len = {length}
[optimizer]
learning_rate = {rate}
warmup_steps = {warmup}
schedule = "constant"
weight_decay = 0.0
b2 = 0.98
[mesh]
context = {devices}
[checkpoint]
every = 0
[eval]
every = 0
batches = 4
max_new_tokens = 0
[log]
every = 10
tensorboard = false
"""
ARCHITECTURE = """\
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 1
num_key_value_heads = 1
head_dim = 32
max_position_embeddings = {context}
"""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run, and the examples it is trained on.

    Attributes:
      name: of the run.
      length: tokens of its longest example.
      shortest: tokens of its shortest.
      steps, batch, rate, warmup, devices: settings of the run.
      ends: the share of examples with the key at the very beginning, and as many with it at the end.
    """

    name: str
    length: int
    shortest: int
    steps: int
    batch: int
    rate: float
    warmup: int
    devices: int = 1
    ends: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs, one from the weights of the other, and what is evaluated.

    Attributes:
      context: tokens that the model is trained on before it is extended.
      factor: YaRN's, by which the context is extended.
      stages: the runs.
      lengths: of the texts that are evaluated, in tokens.
      depths: of the keys.
      samples: texts of each length and depth.
    """

    context: int
    factor: int
    stages: tuple[Stage, Stage, Stage]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int


FULL = Plan(
    context=2048,
    factor=8,
    stages=(
        Stage("short", length=256, shortest=24, steps=1400, batch=8, rate=3e-3, warmup=20),
        Stage("trained", length=2048, shortest=256, steps=200, batch=4, rate=1e-3, warmup=5, ends=0.1),
        Stage(
            "extended",
            length=16_384,
            shortest=13_000,
            steps=120,
            batch=1,
            rate=5e-4,
            warmup=1,
            devices=4,
            ends=0.1,
        ),
    ),
    lengths=(2048, 4096, 8192, 16_384),
    depths=tuple(i / 10 for i in range(11)),
    samples=2,
)


def make_tokenizer(folder: Path) -> Tokenizer:
    """Trains a vocabulary on the sentences; every word of a key is one token."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for words in KEYS for word in words]
    texts = ["".join((*FILLER, NEEDLE, QUESTION, *words)) for _ in range(8)]
    tokenizer = load_tokenizer(train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=VOCABULARY))
    assert all(len(tokenizer.encode(word, add_bos=False)) == 1 for word in words)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes examples of exact lengths in tokens."""

    tokenizer: Tokenizer

    @functools.cached_property
    def parts(self) -> tuple[list[list[int]], list[int], list[int]]:
        """The ids of the filler sentences, of needle and question."""
        encode = functools.partial(self.tokenizer.encode, add_bos=False)
        return [encode(text) for text in FILLER], encode(NEEDLE), encode(QUESTION)

    def example(self, length: int, depth: float, rng: np.random.Generator) -> list[int]:
        """The ids of a text of `length` tokens; the last of them, one for each of `KEYS`, are the answer.

        Args:
          length: T.
          depth: where the key is: 0 is the beginning, 1 just before the question.
          rng: draws the filler and the key.
        """
        filler, needle, question = self.parts
        key = [self.tokenizer.encode(words[rng.integers(len(words))], add_bos=False)[0] for words in KEYS]
        room = length - 1 - len(needle) - len(question) - 2 * len(key)
        ids: list[int] = []
        while len(ids) < room:
            ids += filler[rng.integers(len(filler))]
        before = round(depth * room)
        needle = [*ids[:before], *needle, *key, *ids[before:room]]
        return [self.tokenizer.bos_id, *map(int, needle), *question, *key]

    def write(self, path: Path, stage: Stage, count: int, seed: int) -> None:
        """Writes examples of a stage's lengths and depths as JSON lines of token ids."""
        rng = np.random.default_rng(seed)
        with path.open("w", encoding="utf-8") as file:
            for _ in range(count):
                length = int(np.exp(rng.uniform(np.log(stage.shortest), np.log(stage.length + 1))))
                depth = min(max(rng.uniform(-stage.ends, 1 + stage.ends), 0.0), 1.0)
                ids = self.example(length, depth, rng)
                mask = [0] * (len(ids) - len(KEYS)) + [1] * len(KEYS)
                file.write(json.dumps({"input_ids": ids, "completion_mask": mask}) + "\n")


def train(folder: Path, stage: Stage, maker: Maker, model: str) -> float:
    """Runs a stage, and returns its seconds."""
    examples = min(6 * stage.steps * stage.batch, 6000)
    maker.write(folder / f"{stage.name}.jsonl", stage, examples, seed=len(stage.name))
    text = CONFIG.format(folder=folder, model=model, **dataclasses.asdict(stage))
    config = folder / f"{stage.name}.toml"
    config.write_text(text, encoding="utf-8")
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "llama_jax.train", str(config)], check=True)
    return time.monotonic() - started


@functools.partial(jax.jit, static_argnums=0)
def _predictions(config: lj.LlamaConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """The most likely tokens int [B, answer] for the answers that texts int [B, T] end with."""
    logits = lj.forward(config, params, tokens[:, :-1], attention_backend="blockwise")
    return logits[:, -len(KEYS) :].argmax(-1)


def found_keys(config: lj.LlamaConfig, params: Any, maker: Maker, plan: Plan) -> list[list[float]]:
    """The share of keys of which greedy decoding writes every word: [lengths][depths].

    Greedy decoding writes the answer exactly if each of its words is the most likely one after those before.
    """
    table = []
    for length in plan.lengths:
        rng = np.random.default_rng(length)  # the same texts for every model
        row = []
        for depth in plan.depths:
            texts = np.array([maker.example(length, depth, rng) for _ in range(plan.samples)])
            answers = np.concatenate([_predictions(config, params, text[None]) for text in texts])
            row.append(float((answers == texts[:, -len(KEYS) :]).all(-1).mean()))
        table.append(row)
        print(
            f"{length:>6} tokens: " + " ".join(f"{share:.2f}" for share in row), file=sys.stderr, flush=True
        )
    return table


def run(folder: Path, plan: Plan) -> dict[str, Any]:
    """Trains and evaluates; returns the result, JSON-serializable."""
    maker = Maker(make_tokenizer(folder))
    short, trained, extended = plan.stages
    init = 'init_from = "{}/{}"\n'
    scaling = f'[model.rope_scaling]\nrope_type = "yarn"\nfactor = {plan.factor}\n'
    seconds = {
        short.name: train(folder, short, maker, ARCHITECTURE.format(context=plan.context)),
        trained.name: train(folder, trained, maker, init.format(folder, short.name)),
        extended.name: train(folder, extended, maker, init.format(folder, trained.name) + scaling),
    }
    before, params = lj.load_params(folder / trained.name)
    after, extended_params = lj.load_params(folder / extended.name)
    models = {
        "trained": (before, params),
        "trained, with YaRN": (after, params),
        "extended": (after, extended_params),
    }
    found = {}
    for name, (config, weights) in models.items():
        started = time.monotonic()
        print(name, file=sys.stderr, flush=True)
        found[name] = found_keys(config, weights, maker, plan)
        seconds[f"evaluation: {name}"] = time.monotonic() - started
    return {
        "plan": dataclasses.asdict(plan),
        "model": dataclasses.asdict(after),
        "found": found,
        "seconds": {name: round(value) for name, value in seconds.items()},
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "commit": commit(),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the heat maps: depth over length, one for each model."""
    plan = result["plan"]
    path.write_bytes(heat_map.png(result["found"], plan["lengths"], plan["depths"], "keys found"))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="The passkey test before and after extending a context.")
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="draw the heat maps here")
    parser.add_argument("--samples", type=int, default=FULL.samples, help="texts of each length and depth")
    args = parser.parse_args(argv)
    result = run(args.out.absolute(), dataclasses.replace(FULL, samples=args.samples))
    text = json.dumps(result, indent=1)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        draw(result, args.plot)
    print(text)


if __name__ == "__main__":
    main()
