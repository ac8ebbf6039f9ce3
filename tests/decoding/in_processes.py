"""What the two processes of `test_processes.py` run, and what a single one computes for comparison."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import AxisType, Mesh

import llama_jax as lj
from llama_jax.decoding import processes
from llama_jax.decoding.arguments import row_keys
from llama_jax.errors import InputError
from llama_jax.meshes import AXES
from llama_jax.text.conversation import Conversation
from llama_jax.train.data.conversations import Conversation as Prompt
from llama_jax.train.rejection_sampling import best_of_n
from tests import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, num_hidden_layers=1, max_position_embeddings=128)
PROMPTS = ["a cab", "the quick brown", "b"]  # three rows, which no axis of two devices divides
NEW = 6
# Greedy and sampled rows share the batch.
SAMPLING = lj.Sampling(temperature=np.array([0.0, 1.0, 1.0]), top_k=np.array([0, 0, 5]))
SAMPLE: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "top_p": 0.9, "seed": 0}


def write_model(folder: Path) -> None:
    """The model of both, with its chat template."""
    tiny.write_model(folder, CONFIG)
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}. {% endfor %}")


class FirstIsBest:
    """A reward model that prefers the first answer."""

    def scores(self, conversations: Sequence[Any]) -> np.ndarray:
        return -np.arange(len(conversations), dtype=np.float32)[:, None]


def results(model: lj.Model) -> dict[str, Any]:
    """What each way to generate returns, as plain values; on a mesh, in every one of its processes."""
    rows = [model.encode_prompt(text) for text in PROMPTS]
    lengths = np.array([len(row) for row in rows])
    tokens = np.array([row + [0] * (max(lengths) - len(row)) for row in rows])
    _, key = model.sampling(seed=0)
    keys = row_keys(key, 3)  # what the one stands for
    request = model.config, model.params, tokens, lengths
    with model.on_mesh():
        out = lj.generate(*request, key, SAMPLING, max_new_tokens=NEW)
        again = lj.generate(*request[:2], out.tokens, out.lengths, key, SAMPLING, max_new_tokens=NEW)
        streamed = [token for token, _ in lj.stream(*request, key, SAMPLING, max_new_tokens=NEW)]
        beams = lj.beam_search(*request, 2, max_new_tokens=NEW, length_penalty=np.array([0.0, 1.0, 2.0]))
        drafted = lj.speculative_generate(*request, keys, SAMPLING, num_draft_tokens=2, max_new_tokens=NEW)
    template = str(model.path.with_name("chat.jinja"))
    talk = Conversation(model, template=template)
    prompts = [Prompt([{"role": "user", "content": "a cab"}], 1)]
    best = best_of_n(model, FirstIsBest(), prompts, samples=1, **SAMPLE, template=template)  # type: ignore[arg-type]
    found = {
        "generate": vars(out),
        "generate from its own result": vars(again),
        "stream": np.stack(streamed, axis=1),
        "beam_search": vars(beams),
        "speculative": vars(drafted.output) | {"rounds": drafted.rounds, "accepted": drafted.accepted},
        "texts": model.generate(PROMPTS, max_new_tokens=NEW, stop_strings="b", temperature=1.0),
        "streamed text": "".join(model.stream("a cab", max_new_tokens=NEW)),
        "answers": ["".join(talk.say(text, max_new_tokens=NEW)) for text in PROMPTS[:2]],
        "reused": talk.session.reused,
        "best of n": list(best),
    }
    return jax.tree.map(lambda x: x if isinstance(x, str) else np.asarray(x).tolist(), found)


def crossing_mesh() -> Mesh:
    """Two processes of two devices each: rows and heads are both split between the processes."""
    a, b, c, d = jax.devices()
    assert a.process_index == b.process_index != c.process_index == d.process_index
    grid = np.array([a, c, d, b]).reshape(2, 1, 1, 2)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 4)


def wrong_calls(model: lj.Model, process: int) -> dict[str, str]:
    """The errors of calls that are not the same in both processes."""

    def error(call: Callable[[], object]) -> str:
        try:
            call()
        except InputError as refused:
            return str(refused)
        return "no error"

    mine = PROMPTS[process]
    found = {
        "prompts": error(lambda: model.generate(mine)),
        "seed and length": error(
            lambda: model.generate("a", temperature=1.0, seed=process, max_new_tokens=3 + process)
        ),
        "function": error(lambda: model.generate("a", num_beams=2) if process else next(model.stream("a"))),
        "too long": error(lambda: model.generate("a" if process else "a" * 200)),
        "too long in the other": error(lambda: model.generate("a" * 200 if process else "a")),
        "afterwards": error(lambda: model.generate("a cab", max_new_tokens=NEW)),
    }
    processes.TIMEOUT_SECONDS = 0.2
    return found | {"absent": "" if process else error(lambda: model.generate("a cab"))}


def from_the_first_process(line: str) -> str:
    """A line that only the first process knows, as docs/generation.md sends it."""
    typed = np.frombuffer(line.encode().ljust(4096), np.uint8)
    return bytes(np.asarray(broadcast_one_to_all(typed))).decode().strip()


def run(arguments: Sequence[str]) -> int:
    """One of two processes: writes its results and errors to a file of JSON in a folder."""
    folder, address, index = Path(arguments[0]), arguments[1], int(arguments[2])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, index)
    model = lj.load(folder / "tiny.bin", mesh=crossing_mesh(), scan_layers=False)
    typed = from_the_first_process("a café" if index == 0 else "")
    found: dict[str, Any] = {"results": results(model), "typed": typed}
    found["keys"] = len(processes._client().key_value_dir_get("llama_jax/decoding"))
    found["errors"] = wrong_calls(model, index)
    (folder / f"{index}.json").write_text(json.dumps(found))
    return 0
