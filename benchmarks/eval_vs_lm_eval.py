"""Evaluation beside lm-eval's own `hf` model: `python -m benchmarks.eval_vs_lm_eval [--tasks FOLDER]`.

SmolLM2-135M in f32 on both sides, on three local tasks that are made here: `facts_choice`, questions about a
passage with four answers each; `facts_generate`, the same to be answered in words; `facts_rolling`, the
passages themselves. Each side stays warm in a process of its own on the same cores; within a round every
task is evaluated once, one side after the other. With `--tasks` they are written, and nothing is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.workers import pin

SMOLLM2 = "smollm2-135m"
QUESTIONS = 16
# fmt: off
NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo",
)
CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Dublin", "Cairo", "Boston", "Vienna")
WORK = (
    "repairs old clocks", "teaches mathematics", "sells fresh bread", "drives a night bus", "paints ships",
    "writes crime novels", "keeps bees", "builds wooden boats",
)
PETS = (
    "a grey cat", "two parrots", "an old dog", "a tortoise", "three hens", "a white rabbit", "a pony",
    "a goat",
)
# fmt: on
ASKED = {
    "city": ("In which city does {name} live?", CITIES),
    "work": ("What does {name} do for a living?", WORK),
    "pet": ("Which animals does {name} keep?", PETS),
}
SENTENCE = (
    "{name} lives in {city}, in a small house near the station, and {work}. At home {name} keeps {pet}."
)

CHOICE = """\
task: facts_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl, train: {folder}/examples.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
metadata: {{version: 1.0}}
"""
GENERATE = """\
task: facts_generate
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl, train: {folder}/examples.jsonl}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{{{passage}}}}\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 24, do_sample: false}}
filter_list:
  - name: stripped
    filter: [{{function: remove_whitespace}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
metadata: {{version: 1.0}}
"""
ROLLING = """\
task: facts_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{passage}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""
TASKS = {"facts_choice": CHOICE, "facts_generate": GENERATE, "facts_rolling": ROLLING}


def questions(count: int, seed: int, people: int) -> Iterator[dict[str, Any]]:
    """Questions about passages, each with four answers that occur in its passage."""
    rng = random.Random(seed)
    for _ in range(count):
        names = rng.sample(NAMES, people)
        facts = {key: rng.sample(values, people) for key, (_, values) in ASKED.items()}
        told = [
            SENTENCE.format(name=name, **{key: facts[key][place] for key in facts})
            for place, name in enumerate(names)
        ]
        asked, person = rng.choice(list(ASKED)), rng.randrange(people)
        right = facts[asked][person]
        wrong = [value for value in facts[asked] if value != right]
        choices = [*rng.sample(wrong, 3), right]
        rng.shuffle(choices)
        yield {
            "passage": " ".join(told),
            "question": ASKED[asked][0].format(name=names[person]),
            "choices": choices,
            "answer": choices.index(right),
        }


def write_tasks(folder: Path, count: int = QUESTIONS, people: int = 6) -> Path:
    """Writes the tasks and their data, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number, seed in (("questions", count, 0), ("examples", 8, 1)):
        lines = (json.dumps(record) + "\n" for record in questions(number, seed, people))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder.absolute()))
    return folder


def serve(side: str, weights: str, folder: str, batch_size: int) -> None:
    """Answers each task's name on stdin with its seconds and scores: one side, in a process of its own."""
    answers, sys.stdout = sys.stdout, sys.stderr  # keep a library's output out of the answers
    os.environ["TQDM_DISABLE"] = "1"

    from llama_jax.eval.harness import HarnessModel
    from llama_jax.eval.tasks import evaluate_tasks, load_tasks

    if side == "hf":
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model: Any = HFLM(weights, device="cpu", dtype="float32", batch_size=batch_size)
    else:
        model = HarnessModel(weights, batch_size=batch_size)
    print(json.dumps({"ready": side}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        tasks = load_tasks([str(Path(folder) / f"{task}.yaml")])
        start = time.perf_counter()
        results = evaluate_tasks(model, tasks)["results"][task]
        seconds = time.perf_counter() - start
        scores = {name: value for name, value in results.items() if isinstance(value, float)}
        print(json.dumps({"seconds": seconds, "scores": scores}), file=answers, flush=True)


def measure(rounds: int, batch_size: int, hf_batch_size: int) -> dict[str, Any]:
    """Runs everything; returns the object that is printed."""
    import llama_jax as lj

    model = lj.load(SMOLLM2)
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = write_tasks(Path(made) / "tasks")
        weights = lj.save(model, Path(made) / "hf", format="hf")
        del model
        sides = {}
        for side, source, size in (("hf", weights, hf_batch_size), ("llama_jax", SMOLLM2, batch_size)):
            command = [sys.executable, "-m", "benchmarks.eval_vs_lm_eval", "--serve", side, str(source)]
            command += ["--tasks", str(folder), "--batch-size", str(size)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            sides[side] = process
            stack.callback(process.wait)
            stack.callback(process.kill)
            _receive(process)
        answers: dict[str, dict[str, list[Any]]] = {task: {side: [] for side in sides} for task in TASKS}
        for number in range(rounds + 1):  # the first one compiles
            for task, found in answers.items():
                for side, process in sides.items():
                    assert process.stdin is not None
                    print(json.dumps(task), file=process.stdin, flush=True)
                    found[side].append(_receive(process))
                    print(number, task, side, found[side][-1]["seconds"], file=sys.stderr, flush=True)
    return {
        "batch_size": batch_size,
        "hf_batch_size": hf_batch_size,
        "load_average": os.getloadavg()[0],
        "results": [_summary(task, found) for task, found in answers.items()],
    }


def _receive(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"error: a side ended with status {process.wait()}")
    return json.loads(line)


def _summary(task: str, found: dict[str, list[Any]]) -> dict[str, Any]:
    ours, theirs = ([answer["seconds"] for answer in found[side][1:]] for side in ("llama_jax", "hf"))
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    a, b = (found[side][0]["scores"] for side in ("llama_jax", "hf"))
    return {
        "task": task,
        "seconds": [statistics.median(ours), statistics.median(theirs)],
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "ratio_range": [min(ratios), max(ratios)],
        "first": [found["llama_jax"][0]["seconds"], found["hf"][0]["seconds"]],
        "scores": a,
        "largest_difference": max(abs(a[name] - b[name]) for name in b),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares evaluation with lm-eval's own hf model.")
    parser.add_argument("--tasks", type=Path, help="write the tasks here, and measure nothing")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each task; the median counts")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--hf-batch-size", type=int, default=8)
    parser.add_argument("--cores", type=int, default=2, help="cores of each side")
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "WEIGHTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve, str(args.tasks), args.batch_size)
    elif args.tasks:
        print(write_tasks(args.tasks))
    else:
        pin(args.cores)
        print(json.dumps(measure(args.rounds, args.batch_size, args.hf_batch_size), indent=1))


if __name__ == "__main__":
    main()
