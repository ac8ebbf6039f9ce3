"""PPO runs: a value head or a value model beside the policy; resumption, meshes, adapters, bad input."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.console.terminal import human_bytes
from llama_jax.train.scorer import Scorer
from tests import tiny
from tests.train.processes import Workshop, checkpoint_contents, records, steps
from tests.train.test_grpo_runs import CONFIG, EXACT, REWARDS, STEPS, lines

PPO = ("--train.objective", "ppo", "--rl.num_generations", 1, "--rl.beta", 0.05)
CASES: dict[str, tuple[object, ...]] = {
    "head": ("--rl.num_iterations", 2),
    "network": (*EXACT, "--rl.value_model", "judge"),
    "lora": ("--rl.value_model", "judge", "--adapter.type", "lora", "--adapter.rank", 4),
}


@pytest.fixture(scope="module")
def config(workshop: Workshop, shared_data: Path) -> str:
    """The configuration, and a reward model `judge`."""
    animals = ("cat", "dog", "bird", "fish", "mouse")
    rows = [{"prompt": f"The {a} was {n} days old", "animal": a} for a in animals for n in (1, 20, 300)]
    (workshop.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workshop.folder / "rewards.py").write_text(REWARDS)
    model = shared_data / "stories260K" / "stories260K.bin"
    path = workshop.folder / "ppo.toml"
    path.write_text(CONFIG.format(model=model, folder=workshop.folder))
    pairs = [
        {"prompt": f"The {a} was", "chosen": " happy.", "rejected": " sad and cold."} for a in animals[:4]
    ]
    (workshop.folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = ("--train.objective", "reward", "--data.files", "pairs.jsonl", "--train.steps", 2)
    workshop.train_all((path.name, "--train.run_dir", "judge", *flags))
    return path.name


Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(workshop: Workshop, config: str) -> Trained:
    @functools.cache
    def train(name: str) -> Path:
        run = workshop.folder / f"{name}_whole"
        workshop.train_all((config, "--train.run_dir", run, *PPO, *CASES[name]))
        return run

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_learns_policy_and_values_and_is_a_language_model(trained, name):
    run = trained(name)
    metrics = records(run)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    first, *others = metrics
    assert first["clip_fraction"] == first["value_clip_fraction"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-6) and "groups_equal" not in first
    assert first["value_loss"] > 0 and any(record.get("kl", 0) > 1e-9 for record in others)
    if name == "head":  # of zeros; the second update trains on the same completions
        assert first["value"] == 0 and "reward" not in metrics[1]
        assert metrics[1]["value_loss"] < first["value_loss"]
    else:
        assert first["value"] != 0
    if name == "network":
        assert [record["rollout_logprob_diff_max"] for record in metrics] == [0.0] * 4
    samples = records(run, "samples.jsonl")
    assert len({sample["prompt"] for sample in samples[:8]}) == 8
    assert any(np.abs(sample["advantage"]) > 0 for sample in samples)
    model = lj.load(run)
    assert model.config.labels == () and isinstance(model.generate("The cat", max_new_tokens=4), str)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_resumed_run_equals_uninterrupted_run(workshop, config, trained, name):
    whole = trained(name)
    halves = Path(shutil.copytree(whole, f"{whole}_interrupted", ignore=shutil.ignore_patterns("adapter")))
    _, last = steps(halves)
    shutil.rmtree(halves / "checkpoints" / str(last))
    workshop.train_all((config, "--train.run_dir", halves, *PPO, *CASES[name]), worker=2)
    (a, _), (b, _) = (checkpoint_contents(run, STEPS) for run in (whole, halves))
    assert a.keys() == b.keys() and any("value_function" in leaf for leaf in a)
    assert [leaf for leaf in a if a[leaf].tobytes() != b[leaf].tobytes()] == []
    assert lines(whole) == lines(halves)
    assert (whole / "samples.jsonl").read_text() == (halves / "samples.jsonl").read_text()


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(workshop, config, trained):
    run = workshop.folder / "mesh"
    mesh = ("--mesh.fsdp", 4, "--mesh.tensor", 2, "--train.steps", 2)
    workshop.train_all((config, "--train.run_dir", run, *PPO, *CASES["network"], *mesh), devices=8)
    ours, theirs = (records(folder) for folder in (trained("network"), run))
    for name in ("loss", "value", "return", "value_loss"):
        assert theirs[0][name] == pytest.approx(ours[0][name], abs=1e-4)
    assert theirs[0]["rollout_logprob_diff_max"] == 0.0
    ours, theirs = (records(folder, "samples.jsonl")[:8] for folder in (trained("network"), run))
    assert [sample["completion"] for sample in ours] == [sample["completion"] for sample in theirs]


@pytest.mark.slow
def test_a_reward_model_rewards_and_is_where_values_start(workshop, config):
    run = workshop.folder / "judged"
    flags = ("--rl.rewards", "model:judge", "--rl.value_model", "judge", "--train.steps", 1, "--rl.beta", 0)
    workshop.train_all((config, "--train.run_dir", run, *PPO, *flags))
    samples = records(run, "samples.jsonl")
    expected = Scorer.load(workshop.folder / "judge").scores(
        [(s["prompt"], s["completion"]) for s in samples]
    )
    np.testing.assert_allclose([s["reward"] for s in samples], expected[:, 0], atol=1e-4)


def test_show_batch_marks_tokens_by_their_own_advantages(workshop, config, shared_data):
    done = workshop.run(config, "--train.run_dir", "shown", "--show-batch", *PPO, "--rl.value_model", "judge")
    assert done.status == 0, done.err
    assert not (workshop.folder / "shown").exists()
    weights = jax.tree.leaves(lj.load(shared_data / "stories260K" / "stories260K.bin").params)
    size = human_bytes(sum(leaf.nbytes for leaf in weights))
    assert f"rollouts: of {size} of weights" in done.err  # the policy's alone
    assert done.out.count("\u27e6+ ") + done.out.count("\u27e6- ") > 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--rl.value_model", "{model}"),
            "is a language model, and a value is one number",
        ),
        (("--rl.value_model", "tiny"), "has a vocabulary of 288 and the policy of 512"),
        (("--rl.value_model", "nothing_here"), "nothing_here"),
        (("--rl.gamma", "2"), "rl.gamma is 2.0; it must be at most 1"),
        (("--rl.scale_rewards", "none"), 'it applies to "grpo": leave it out'),
        (("--rl.rewards", "model:tiny.bin"), "is a language model, which has no head"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(workshop, config, shared_data, flags, message):
    flags = [flag.format(model=shared_data / "stories260K" / "stories260K.bin") for flag in flags]
    if not (workshop.folder / "tiny").exists():
        tiny.write_model(workshop.folder)
        (workshop.folder / "short.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
        judge = ("--train.objective", "reward", "--data.files", "short.jsonl", "--train.steps", 1)
        model = ("--model.init_from", "tiny.bin", "--tokenizer.path", "tiny.bin")
        shape = ("--train.seq_len", 32, "--rl.max_completion_length", 8, "--data.validation_fraction", 0)
        workshop.train_all((config, "--train.run_dir", "tiny", *judge, *model, *shape, "--eval.every", 0))
    done = workshop.run(config, "--train.run_dir", "bad", *PPO, *flags)
    assert done.status == 2, done.err
    assert message in done.error
    assert not (workshop.folder / "bad" / "checkpoints").exists()
