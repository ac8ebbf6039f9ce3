"""Finetuning processes: they learn, resume bit for bit, and write adapters that the library loads."""

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
from llama_jax.errors import CheckpointError, ConfigError, DataError, InputError
from llama_jax.text.convert import convert
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train import rejection_sampling
from llama_jax.train.config.data import DataConfig
from llama_jax.train.config.run import ModelConfig, RunConfig, TrainConfig
from llama_jax.train.initialization import model_config
from llama_jax.train.objectives.reference import REFERENCE_FILE
from llama_jax.train.scorer import Scorer
from llama_jax.weights.adapters import load_adapter
from tests import tiny
from tests.random_models import random_model
from tests.train.processes import Done, Workshop, assert_same, interrupted, losses, records, steps
from tests.weights import adapters

STEPS = 4
PAIRS = [
    ("cat", "meow"),
    ("dog", "woof"),
    ("cow", "moo"),
    ("duck", "quack"),
    ("owl", "hoot"),
    ("pig", "oink"),
]

CONFIG = """\
[model]
init_from = "{model}"
[tokenizer]
path = "{model}"
[data]
files = "{files}"
validation_fraction = 0.2
[train]
objective = "{objective}"
global_batch_size = 8
seq_len = 64
dtype = "float32"
remat = "none"
attention = "xla"
loss_chunks = 1
[optimizer]
learning_rate = {rate}
warmup_steps = 0
schedule = "constant"
[eval]
every = 2
max_new_tokens = 0
[log]
every = 1
tensorboard = false
plot = false
"""
LORA = '[adapter]\ntype = "lora"\nrank = 4\n'
BOTTLENECK = '[adapter]\ntype = "bottleneck"\nbottleneck_size = 8\n'
PREFIX = '[adapter]\ntype = "prefix"\nprefix_length = 4\n'
PRECOMPUTED = "[preference]\nprecompute_ref_log_probs = true\n"


def set_up(workshop: Workshop, shared_data, objective: str, adapter: str = "", rate: float = 1e-2) -> str:
    """Writes examples and a configuration; returns the name of its file."""
    rows = []
    for number in range(40):
        animal, sound = PAIRS[number % len(PAIRS)]
        prompt = f"There were {number} of them. The {animal} said: "
        if objective == "classify":
            rows.append({"text": prompt, "label": "bird" if animal in ("duck", "owl") else "beast"})
        elif objective == "regress":
            rows.append({"text": prompt, "label": number / 10})
        elif objective == "kto":
            rows.append(
                {"prompt": prompt, "completion": sound + "!" * (number % 2), "label": number % 2 == 0}
            )
        elif objective == "sft":
            rows.append({"prompt": prompt, "completion": sound})
        else:
            rows.append({"prompt": prompt, "chosen": f"{sound}, please", "rejected": f"{sound}! {sound}!"})
    files = workshop.folder / f"{objective}.jsonl"
    files.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = shared_data / "stories260K" / "stories260K.bin"
    config = workshop.folder / f"{objective}{len(adapter)}.toml"
    config.write_text(CONFIG.format(model=model, files=files, objective=objective, rate=rate) + adapter)
    return config.name


# Objective, adapter and learning rate of the runs that are resumed.
CASES = {
    "lora": ("sft", LORA, 2e-2),
    "bottleneck": ("sft", BOTTLENECK, 2e-2),
    "prefix": ("sft", PREFIX, 2e-2),
    "dpo": ("dpo", "", 1e-3),
    "precomputed": ("dpo", PRECOMPUTED, 1e-3),
    "kto": ("kto", "", 1e-3),
}
# What a resumed process computes does not come from a process that ran the first half.
RESUMED = {"worker": 2}
forward = jax.jit(lj.forward, static_argnums=0)

Trained = Callable[[str], tuple[str, Path, Done]]


@pytest.fixture(scope="module")
def trained(workshop, shared_data) -> Trained:
    """Trains a case once; returns its configuration, its run and what it printed."""

    @functools.cache
    def train(name: str) -> tuple[str, Path, Done]:
        config, run = set_up(workshop, shared_data, *CASES[name]), workshop.folder / f"{name}_whole"
        flags = ("--train.run_dir", run, "--train.steps", STEPS, "--checkpoint.every", STEPS // 2)
        return config, run, *workshop.train_all((config, *flags))

    return train


def test_a_run_killed_before_its_adapter_was_written_gets_it_when_resumed(workshop, trained):
    config, whole, _ = trained("lora")
    killed = Path(shutil.copytree(whole, f"{whole}_killed", ignore=shutil.ignore_patterns("adapter")))
    command = (config, "--train.run_dir", killed, "--train.steps", STEPS)
    (again,) = workshop.train_all(command)
    assert f"is complete after {STEPS} steps" in again.err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (killed / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


def test_an_adapter_is_not_resumed_on_another_base(workshop, shared_data, trained):
    config, whole, _ = trained("lora")
    halves = Path(shutil.copytree(whole, f"{whole}_other_base"))
    weights = bytearray((shared_data / "stories260K" / "stories260K.bin").read_bytes())
    elsewhere = workshop.folder / "elsewhere"
    elsewhere.mkdir()
    for file in (shared_data / "stories260K").iterdir():
        shutil.copy(file, elsewhere)
    base = ("--model.init_from", elsewhere / "stories260K.bin", "--train.run_dir", halves)
    moved, *_ = workshop.train_all((config, *base, "--train.steps", STEPS + 1))  # the same weights
    assert f"resuming {halves} after step {STEPS}" in moved.err
    weights[256 :: 1 << 14] = bytes(byte ^ 1 for byte in weights[256 :: 1 << 14])  # samples are compared
    (elsewhere / "stories260K.bin").write_bytes(weights)
    refused = workshop.run(config, *base, "--train.steps", STEPS + 2)
    assert refused.status == 2
    assert "model.init_from holds other weights than those that the adapter in" in refused.error
    shutil.rmtree(elsewhere)
    refused = workshop.run(config, *base, "--train.steps", STEPS + 2)
    assert f"the weights that the run in {halves} was started on are not there any more" in refused.error
    assert steps(halves)[-1] == STEPS + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_resumed_run_equals_uninterrupted_run(workshop, shared_data, trained, name):
    config, whole, done = trained(name)
    objective, adapter, _ = CASES[name]
    halves = interrupted(whole)
    if adapter.startswith("[adapter]"):  # a step is the model that its adapter would be exported as
        step = lj.load(halves)
        assert step.tokenizer.vocab_size == step.config.vocab_size
        jax.tree.map(
            np.testing.assert_array_equal,
            step.params,
            lj.load(whole / "checkpoints" / str(STEPS // 2)).params,
        )
    cached = halves / REFERENCE_FILE
    if adapter == PRECOMPUTED:  # the initial weights are loaded to compute it again
        cached.write_bytes(cached.read_bytes()[:-1])
    (again,) = workshop.train_all((config, "--train.run_dir", halves, "--train.steps", STEPS), **RESUMED)
    assert f"resuming {halves} after step {STEPS // 2}" in again.err
    for each, damaged in ((done, False), (again, adapter == PRECOMPUTED)):
        computed = "reference: computing the log-probabilities of 40 pairs" in each.err
        assert computed == (adapter == PRECOMPUTED)
        assert ("is damaged, or was computed from other data" in each.err) == damaged
    assert_same(whole, halves, STEPS)
    assert losses(whole) == losses(halves)
    assert losses(whole)[STEPS] < losses(whole)[1]
    metrics = records(whole, "evaluations.jsonl")[-1]
    if objective in ("dpo", "kto"):
        own = 0 <= metrics["accuracy"] <= 1 if objective == "dpo" else metrics["kl"] >= 0
        assert own and "eval_perplexity" not in metrics
        return
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_loss"]))
    assert f"eval_perplexity {metrics['eval_perplexity']:.2f}" in done.err
    files = [path.read_bytes() for path in sorted((whole / "adapter").iterdir())]
    assert files == [path.read_bytes() for path in sorted((halves / "adapter").iterdir())]
    settings, adapter = load_adapter(whole)
    base = shared_data / "stories260K" / "stories260K.bin"
    plain, loaded = lj.load(base), lj.load(base, adapter=whole)  # merged if the adapter type allows it
    tokens = np.array([plain.tokenizer.encode("There were 3 of them. The duck said: ", add_bos=True)])
    attached = lj.adapters.attach(settings, plain.params, adapter)
    expected = np.asarray(forward(plain.config, attached, tokens))
    np.testing.assert_allclose(forward(loaded.config, loaded.params, tokens), expected, atol=1e-4)
    run = lj.load(whole)  # a run loads as its base with its adapter
    jax.tree.map(np.testing.assert_array_equal, run.params, loaded.params)
    assert np.abs(expected - forward(plain.config, plain.params, tokens)).max() > 0.1


def test_show_batch_prints_the_tokens_in_the_loss_and_writes_nothing(workshop, shared_data):
    config = set_up(workshop, shared_data, *CASES["lora"])
    command = ("train", config, "--train.run_dir", "shown")
    labeled = ("train", set_up(workshop, shared_data, *CASES["kto"]), "--show-batch")
    before = sorted(workshop.folder.iterdir())
    done, without_base, labels = workshop.run_all(
        (*command, "--show-batch"), (*command, "--model.init_from", ""), labeled
    )
    assert done.status == labels.status == 0, done.err + labels.err
    assert "example 1, desirable: " in labels.out and "mismatched, for the KL estimate: " in labels.out
    assert "row 7: " in done.out and "⟦" in done.out
    assert "examples:" in done.err and "of them in the loss" in done.err
    assert sorted(workshop.folder.iterdir()) == before
    # Nor does a configuration with an error.
    assert without_base.status == 2
    assert without_base.err.count("\n") == 1
    assert "an adapter needs the weights of a base model" in without_base.error


@pytest.fixture(scope="module")
def reward_run(workshop, shared_data):
    """A reward model trained to prefer answers with "please"."""
    config = set_up(workshop, shared_data, "reward", LORA, rate=2e-2)
    flags = (
        "--train.run_dir",
        "reward",
        "--train.steps",
        24,
        "--eval.every",
        24,
        "--data.template",
        "llama-2",
    )
    done = workshop.run(config, *flags)
    assert done.status == 0, done.err
    # After 12 steps a pair of the 7 may still be wrong; after 24 every margin is far above 0.
    assert records(workshop.folder / "reward", "evaluations.jsonl")[-1]["accuracy"] > 0.9
    return workshop.folder / "reward"


@pytest.mark.slow
def test_reward_model_scores_and_rejection_sampling(workshop, reward_run, shared_data):
    scorer = Scorer.load(reward_run)
    prompt = "There were 7 of them. The owl said: "
    rewards = scorer.scores([(prompt, "hoot, please"), (prompt, "hoot! hoot!"), (prompt, "moo, please")])
    assert rewards.shape == (3, 1) and min(rewards[0], rewards[2]) > rewards[1]
    one = scorer.scores([(prompt, "hoot! hoot!")], batch_size=1)
    np.testing.assert_allclose(one[0], rewards[1], atol=1e-4)

    prompts, out = workshop.folder / "prompts.jsonl", workshop.folder / "best.jsonl"
    prompts.write_text(
        '{"prompt": "The cow said"}\n'
        '{"messages": [{"role": "user", "content": "The pig said"}], "tools": [{"name": "f"}]}\n'
    )
    base = str(shared_data / "stories260K" / "stories260K.bin")
    flags = (base, str(reward_run), str(prompts), str(out), "--template", "llama-2", "--max-new-tokens", "8")
    converted = convert(reward_run, workshop.folder / "reward_hf")
    again = Scorer.load(converted)
    inputs = [(prompt, "hoot, please"), (prompt, "hoot! hoot!")]
    np.testing.assert_allclose(again.scores(inputs), rewards[:2], atol=1e-5)
    with pytest.raises(ConfigError, match="a classifier or reward model"):
        again.model.generate("The cow", max_new_tokens=2)
    with pytest.raises(InputError, match="samples is 0"):
        rejection_sampling.main([*flags, "--samples", "0"])
    rejection_sampling.main([*flags, "--samples", "3"])
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["messages"][0]["content"] for record in answers] == ["The cow said", "The pig said"]
    assert [record.get("tools") for record in answers] == [None, [{"name": "f"}]]
    for record in answers:
        assert record["reward"] == max(record["rewards"]) and len(record["rewards"]) > 1
        assert record["messages"][-1]["role"] == "assistant" and record["messages"][-1]["content"]
    with pytest.raises(InputError, match="already exists"):
        rejection_sampling.main([*flags])
    prompts.write_text('{"prompt": "a"}\n{"messages": [{"role": "User", "content": "b"}]}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: messages\[0\]: role is 'User'"):
        rejection_sampling.main([*flags[:3], str(workshop.folder / "other.jsonl")])
    assert not (workshop.folder / "other.jsonl").exists()


@pytest.mark.slow
def test_classifier_with_full_finetuning(workshop, shared_data):
    config = set_up(workshop, shared_data, "classify", rate=2e-3)
    text = (workshop.folder / config).read_text()
    (workshop.folder / config).write_text(
        text.replace("validation_fraction", 'labels = ["beast", "bird"]\nvalidation_fraction')
    )
    done = workshop.run(config, "--train.run_dir", "classes", "--train.steps", 25, "--eval.every", 25)
    assert done.status == 0, done.err
    assert "accuracy" in done.err and "macro_f1" in done.err
    scorer = Scorer.load(workshop.folder / "classes")
    inputs = [f"There were 5 of them. The {animal} said: " for animal, _ in PAIRS]
    expected = ["bird" if animal in ("duck", "owl") else "beast" for animal, _ in PAIRS]
    assert scorer.classes(inputs) == expected

    # Converted to Hugging Face, it initializes another run, which a learning rate of 0 leaves unchanged.
    out = convert(workshop.folder / "classes", workshop.folder / "classes_hf")
    np.testing.assert_allclose(Scorer.load(out).scores(inputs), scorer.scores(inputs), atol=1e-6)
    flags = ("--model.init_from", out, "--optimizer.learning_rate", 0, "--train.steps", 1)
    swap = ("--data.labels", '["bird", "beast"]')
    done, swapped = workshop.run_all(
        ("train", config, "--train.run_dir", "again", *flags),
        ("train", config, "--train.run_dir", "swapped", *flags, *swap),
    )
    assert done.status == 0, done.err
    again = lj.load(convert(workshop.folder / "again", workshop.folder / "again_hf"))
    assert again.config == scorer.model.config and again.config.labels == ("beast", "bird")
    jax.tree.map(np.testing.assert_array_equal, again.params, scorer.model.params)
    assert swapped.status == 2 and "list them in that order" in swapped.error


@pytest.mark.slow
def test_head_replaces_the_lm_head(workshop, shared_data):
    """Of a randomly initialized model with an untied LM head: it trains, resumes and converts."""
    config = set_up(workshop, shared_data, "regress")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    flags = ["--model.init_from", "", *(f"--model.{name}={size}" for name, size in sizes.items())]
    flags += ["--train.steps", 4, "--checkpoint.every", 2]
    whole = workshop.folder / "regress"
    workshop.train_all((config, *flags, "--train.run_dir", whole))
    halves = interrupted(whole)
    workshop.train_all((config, *flags, "--train.run_dir", halves), **RESUMED)
    assert_same(whole, halves, 4)
    model = lj.load(convert(whole, workshop.folder / "regress_hf"))
    assert not model.config.tie_word_embeddings and "lm_head" not in model.params
    jax.tree.map(np.testing.assert_array_equal, model.params, lj.load(whole).params)


def test_model_without_a_head_is_an_error(tmp_path, shared_data):
    with pytest.raises(CheckpointError, match="holds no model"):
        Scorer.load(tmp_path)
    with pytest.raises(InputError, match="is a language model, which has no head"):
        Scorer.load(shared_data / "stories260K" / "stories260K.bin")


@pytest.mark.parametrize(
    ("pretrained_labels", "objective", "labels", "message"),
    [
        (("a", "b"), "sft", (), 'train.objective "sft" needs a language model; give the language'),
        (
            ("a", "b"),
            "reward",
            (),
            r'has a head with 2 outputs \(a, b\), and train.objective "reward" needs one',
        ),
        (("a", "b"), "classify", ("a", "b", "c"), r'"classify" has 3 data.labels; change data.labels'),
        (
            ("a", "b"),
            "classify",
            ("b", "a"),
            "data.labels are b, a, and the head of .* has them in the order a, b",
        ),
    ],
)
def test_head_that_does_not_fit_the_objective_is_an_error(
    pretrained_labels, objective, labels, message, tmp_path
):
    tiny.write_vocabulary(tmp_path / "tok.bin", tiny.PIECES)
    config, tokenizer = tiny.CONFIG.replace(labels=pretrained_labels), load_tokenizer(tmp_path / "tok.bin")
    path = lj.save(lj.Model(config, random_model(3, config)[1], tokenizer, tmp_path), tmp_path / "model")
    run = RunConfig(
        model=ModelConfig(init_from=str(path)),
        train=TrainConfig(objective=objective),
        data=DataConfig(labels=labels),
    )
    with pytest.raises(ConfigError, match=message):
        model_config(run, tokenizer)


@pytest.fixture(scope="module")
def still(workshop, trained) -> tuple[Path, tuple[object, ...], Done]:
    """A run that starts from the adapter of another and learns nothing; its command and what it printed."""
    config, stage1, _ = trained("lora")
    flags = ("--model.init_from", stage1, "--eval.every", 1, "--eval.patience", 2, "--train.steps", 50)
    run = workshop.folder / "still"
    command = (config, "--train.run_dir", run, *flags, "--optimizer.learning_rate", 0)
    return run, command, *workshop.train_all(command)


@pytest.mark.slow
def test_run_starts_from_the_adapter_of_another_and_resumes(workshop, shared_data, trained, still):
    """Two adapters in sequence: the second is trained on the base with the first merged."""
    _, stage1, _ = trained("lora")
    stage2, base = workshop.folder / "stage2", shared_data / "stories260K" / "stories260K.bin"
    flags = ("--model.init_from", stage1, "--train.steps", 4, "--checkpoint.every", 2)
    config = set_up(workshop, shared_data, "dpo", LORA, rate=1e-2)
    workshop.train_all((config, "--train.run_dir", stage2, *flags))
    halves = interrupted(stage2)
    workshop.train_all((config, "--train.run_dir", halves, *flags), **RESUMED)
    one, two = lj.load(stage1), lj.load(still[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), two.params, one.params)
    plain = lj.load(base)
    assert (
        np.abs(one.params["layers"]["attention"]["wq"] - plain.params["layers"]["attention"]["wq"]).max()
        > 0.01
    )

    assert_same(stage2, halves, 4)
    np.testing.assert_allclose(losses(stage2)[1], np.log(2), rtol=1e-5)  # the policy equals its reference
    # Loading and converting merge base and both adapters.
    settings, adapter = load_adapter(stage2)
    expected = lj.adapters.lora.merge(lj.adapters.lora.attach(settings, one.params, adapter))
    found = lj.load(stage2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.params, expected)
    whole = lj.load(convert(stage2, workshop.folder / "stage2_hf"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, found.params)


def test_circular_adapters_are_an_error(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        adapters.write(tmp_path / name / "adapter", base_model_name_or_path=str(tmp_path / base))
    with pytest.raises(CheckpointError, match="a chain of more than 16 adapters, or a cycle"):
        lj.load(tmp_path / "a")


@pytest.mark.slow
def test_early_stopping(workshop, still):
    run, command, done = still
    (again,) = workshop.train_all(command, **RESUMED)
    assert "eval_loss has not improved in 2 evaluations: stopped after step 3" in done.err
    assert (run / "adapter").is_dir()
    assert "stopped after step 3" in again.err and len(losses(run)) == 3
