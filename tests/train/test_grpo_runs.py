"""GRPO runs: rollouts, rewards and updates; exactness, resumption, meshes, adapters, bad input."""

from __future__ import annotations

import functools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_jax.train.scorer import Scorer
from tests import tiny
from tests.train.processes import Workshop, checkpoint_contents, records, running, steps

STEPS = 4
REWARDS = """
import os, pathlib, signal
def mentions(completions, prompts, animal, **_):
    if (kill := pathlib.Path("kill")).exists():  # after so many calls
        kill.write_text(str(left := int(kill.read_text()) - 1))
        if not left:
            kill.unlink()
            os.kill(os.getppid(), signal.SIGKILL)
    return [float(text.count("e")) for text in completions]
def brief(completion_ids, **_):
    return [-len(ids) / 16 for ids in completion_ids]
def fails(completions, **_):
    raise RuntimeError("never works")
def short(completions, **_):
    return [1.0]
"""
CONFIG = """\
[model]
init_from = "{model}"
[tokenizer]
path = "{model}"
[data]
files = "{folder}/prompts.jsonl"
validation_fraction = 0.2
[train]
objective = "grpo"
global_batch_size = 8
seq_len = 48
steps = 4
dtype = "float32"
remat = "none"
attention = "xla"
loss_chunks = 1
[rl]
rewards = ["{folder}/rewards.py:mentions", "{folder}/rewards.py:brief"]
num_generations = 4
max_completion_length = 16
stop = ["."]
[optimizer]
learning_rate = 1e-3
warmup_steps = 0
schedule = "constant"
[eval]
every = 2
max_new_tokens = 0
[checkpoint]
every = 2
[log]
every = 1
tensorboard = false
plot = false
"""
EXACT = ("--train.exact_rollouts", "true")
BF16 = ("--train.dtype", "bfloat16")
SEVERAL = ("--rl.num_iterations", 2, "--rl.steps_per_generation", 2, "--rl.temperature", 0.8)
OVERLAP = ("--rl.overlap", "true")
LORA = ("--adapter.type", "lora", "--adapter.rank", 4, "--rl.beta", 0.1)
CASES: dict[str, tuple[object, ...]] = {
    "plain": (),
    "exact": EXACT,
    "exact_bf16": (*EXACT, *BF16),
    "several": (*EXACT, *SEVERAL),
    "lora": LORA,
    "overlap": (*EXACT, *OVERLAP),
}


@pytest.fixture(scope="module")
def config(workshop: Workshop, shared_data: Path) -> str:
    animals = ("cat", "dog", "bird", "fish", "mouse")
    rows = [{"prompt": f"The {a} was {n} days old", "animal": a} for a in animals for n in (1, 20, 300)]
    (workshop.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workshop.folder / "rewards.py").write_text(REWARDS)
    model = shared_data / "stories260K" / "stories260K.bin"
    path = workshop.folder / "grpo.toml"
    path.write_text(CONFIG.format(model=model, folder=workshop.folder))
    return path.name


Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(workshop: Workshop, config: str) -> Trained:
    @functools.cache
    def train(name: str) -> Path:
        run = workshop.folder / f"{name}_whole"
        workshop.train_all((config, "--train.run_dir", run, *CASES[name]))
        return run

    return train


def lines(run: Path, *without: str) -> list[dict[str, Any]]:
    """A run's metrics, but for what is a time."""
    timed = ("seconds", "per_second", "mfu", "goodput", "wall_time")
    return [
        {name: value for name, value in record.items() if not any(part in name for part in timed)}
        for record in records(run)
    ]


def test_a_run_samples_rewards_and_learns(trained):
    run = trained("plain")
    metrics = records(run)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    for record in metrics:
        assert 0 < record["rollout_logprob_diff_max"] < 1e-4
        assert record["rollout_logprob_diff_mean"] <= record["rollout_logprob_diff_max"]
        assert 0 <= record["rollout_kl"] < 1e-6
        assert record["clip_fraction"] == 0 and record["entropy"] > 0
        assert 0 < record["completion_length"] <= 16 and 0 <= record["truncated"] <= 1
        assert record["reward"] == pytest.approx(record["reward/mentions"] + record["reward/brief"])
    samples = records(run, "samples.jsonl")
    assert len(samples) == STEPS * 8 and {sample["step"] for sample in samples} == {1, 2, 3, 4}
    for start in range(0, len(samples), 4):
        group = samples[start : start + 4]
        assert len({sample["prompt"] for sample in group}) == 1
        assert sum(sample["advantage"] for sample in group) == pytest.approx(0, abs=1e-5)
        for sample in group:
            assert sample["rewards"]["mentions"] == sample["completion"].count("e")
            assert sample["reward"] == pytest.approx(sum(sample["rewards"].values()))
            assert "." not in sample["completion"][:-1]
    assert len({sample["completion"] for sample in samples}) > STEPS * 4
    first, last = records(run, "evaluations.jsonl")
    assert first["step"] == 2 and last["step"] == 4
    assert last["eval_reward"] == pytest.approx(last["eval_reward/mentions"] + last["eval_reward/brief"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "exact_bf16", "several", "overlap"])
def test_exact_rollouts_have_no_mismatch(trained, name):
    metrics = records(trained(name))
    for record in metrics:
        if name == "several" and record["step"] > 1:  # the second of two batches, and the second pass
            assert "rollout_logprob_diff_max" not in record
            continue
        assert record["rollout_logprob_diff_mean"] == record["rollout_logprob_diff_max"] == 0.0
        assert record["rollout_kl"] == 0.0
        assert record["rollout_passes"] >= 1
    if name == "exact_bf16":
        assert sum(record["rollout_changed_tokens"] for record in metrics) > 0


def assert_same(whole: Path, other: Path) -> None:
    """Two runs have the same last checkpoint, metrics, samples and evaluations, but for times."""
    (a, _), (b, _) = (checkpoint_contents(run, STEPS) for run in (whole, other))
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []
    assert lines(whole) == lines(other)
    for file in ("samples.jsonl", "evaluations.jsonl"):
        assert (whole / file).read_text() == (other / file).read_text()


@pytest.mark.slow
def test_a_run_killed_in_a_rollout_and_resumed_equals_an_uninterrupted_run(workshop, config, trained):
    """kill -9 after the completions of step 4 have been sampled, by the function that rewards them."""
    run, kill = workshop.folder / "killed", workshop.folder / "kill"
    kill.write_text("5")  # four rollouts, and an evaluation
    with running(workshop.start(config, "--train.run_dir", run)) as process:
        assert process.wait(120) == -signal.SIGKILL
    assert not kill.exists() and STEPS not in steps(run)
    workshop.train_all((config, "--train.run_dir", run))
    assert_same(trained("plain"), run)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_resumed_run_equals_uninterrupted_run(workshop, config, trained, name):
    whole = trained(name)
    halves = Path(shutil.copytree(whole, f"{whole}_interrupted", ignore=shutil.ignore_patterns("adapter")))
    _, last = steps(halves)
    shutil.rmtree(halves / "checkpoints" / str(last))
    workshop.train_all((config, "--train.run_dir", halves, *CASES[name]), worker=2)
    assert_same(whole, halves)


@pytest.mark.slow
def test_overlapping_rollouts_are_of_the_weights_before_the_update(workshop, config, trained):
    still = workshop.folder / "still"
    workshop.train_all((config, "--train.run_dir", still, *EXACT, "--optimizer.learning_rate", 0))
    completions = {
        run.name: {
            step: [sample["completion"] for sample in records(run, "samples.jsonl") if sample["step"] == step]
            for step in (1, 2)
        }
        for run in (still, trained("exact"), trained("overlap"))
    }
    assert completions["overlap_whole"] == completions["still"]  # of the weights at the start
    assert completions["exact_whole"][1] == completions["still"][1]
    assert completions["exact_whole"][2] != completions["still"][2]
    first, *others = records(trained("overlap"))
    assert first["clip_fraction"] == 0 < sum(record["clip_fraction"] for record in others)  # of ratios not 1


@pytest.mark.slow
def test_eight_devices_sample_what_one_does(workshop, config, trained):
    run = workshop.folder / "mesh"
    mesh = ("--mesh.fsdp", 4, "--mesh.tensor", 2)
    workshop.train_all((config, "--train.run_dir", run, *EXACT, *mesh, "--train.steps", 2), devices=8)
    ours, theirs = (records(folder, "samples.jsonl")[:8] for folder in (trained("exact"), run))
    assert [sample["completion"] for sample in ours] == [sample["completion"] for sample in theirs]
    metrics = records(run)
    assert [record["rollout_logprob_diff_max"] for record in metrics] == [0.0, 0.0]
    assert metrics[0]["loss"] == pytest.approx(records(trained("exact"))[0]["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_reward_model_of_this_trainer_rewards_beside_functions(workshop, config):
    pairs = [
        {"prompt": f"The {a} was", "chosen": " happy.", "rejected": " sad and cold."}
        for a in ("cat", "dog", "bird", "fish")
    ]
    (workshop.folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    judge, run = workshop.folder / "judge", workshop.folder / "judged"
    flags = ("--train.objective", "reward", "--data.files", "pairs.jsonl", "--train.steps", 2)
    workshop.train_all((config, "--train.run_dir", judge, *flags))
    rewards = ("--rl.rewards", f"rewards.py:brief,model:{judge}", "--rl.reward_weights", "0.5,2")
    workshop.train_all((config, "--train.run_dir", run, *rewards, "--train.steps", 2))
    samples = records(run, "samples.jsonl")
    expected = Scorer.load(judge).scores([(sample["prompt"], sample["completion"]) for sample in samples])
    for sample, (score,) in zip(samples, expected, strict=True):
        assert sample["rewards"]["judge"] == pytest.approx(score, abs=1e-4)
        assert sample["reward"] == pytest.approx(
            0.5 * sample["rewards"]["brief"] + 2 * sample["rewards"]["judge"], abs=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", [(), ("--adapter.type", "lora", "--adapter.rank", 4)], ids=["all", "lora"]
)
def test_a_reference_is_another_model(workshop, config, shared_data, trained, adapter):
    """The same model by its path is the one at the start; a trained one is not."""
    flags = (config, "--rl.beta", 0.1, "--train.steps", 2, *adapter)
    base = shared_data / "stories260K" / "stories260K.bin"
    names = [f"{name}{len(adapter)}" for name in ("start", "same", "other")]
    references = ("", base, trained("plain"))
    workshop.train_all(
        *[
            (*flags, "--train.run_dir", workshop.folder / name, "--rl.reference", reference)
            for name, reference in zip(names, references, strict=True)
        ]
    )
    start, same, other = ([record["kl"] for record in records(workshop.folder / name)] for name in names)
    assert start == same and start[0] == pytest.approx(0, abs=1e-9)
    assert other[0] > 1e-4


def test_show_batch_prints_completions_with_rewards_and_writes_nothing(workshop, config, trained):
    before = sorted(workshop.folder.iterdir())
    done = workshop.run(config, "--train.run_dir", "shown", "--show-batch")
    assert done.status == 0, done.err
    assert sorted(workshop.folder.iterdir()) == before
    titles = [line for line in done.out.splitlines() if line.startswith("completion ")]
    samples = records(trained("plain"), "samples.jsonl")[:8]
    assert len(titles) == 8
    for title, sample in zip(titles, samples, strict=True):
        assert f"reward {sample['reward']:g} (mentions {sample['rewards']['mentions']:g}, brief " in title
        assert f"advantage {sample['advantage']:+.3f}" in title
    assert "\u27e6+ " in done.out and "\u27e6- " in done.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rl.rewards", "rewards.py:short"), "short' returned 1 rewards for 8 completions"),
        (("--rl.rewards", "rewards.py:fails"), "fails' raised RuntimeError: never works, and on every other"),
        (("--rl.rewards", "rewards.py:nothing"), "rewards.py has no function 'nothing'"),
        (("--rl.num_generations", "1"), "an advantage is relative to the others of a group"),
        (("--rl.beta", "-1"), "rl.beta is -1"),
        (("--rl.max_completion_length", "46"), "none of the 15 records of"),
        (
            ("--data.too_long", "fail", "--rl.max_completion_length", "39"),
            "which leaves|leaves 9; shorten it",
        ),
        (
            ("--rl.reference", "tiny.bin", "--rl.beta", "0.1"),
            "has a vocabulary of 288 and the trained model of",
        ),
        (("--rl.reference", "{model}"), "rl.beta 0, which needs no reference"),
        (("--rl.rewards", "model:{model}"), "is a language model, which has no head"),
        (("--data.files", "other.jsonl"), "no field 'prompt' (fields: 'text')"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(workshop, config, shared_data, flags, message):
    flags = [flag.format(model=shared_data / "stories260K" / "stories260K.bin") for flag in flags]
    tiny.write_model(workshop.folder)
    (workshop.folder / "other.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    done = workshop.run(config, "--train.run_dir", "bad", *flags)
    assert done.status == 2, done.err
    assert any(part in done.error for part in message.split("|")), done.error
    assert not (workshop.folder / "bad" / "checkpoints").exists()
