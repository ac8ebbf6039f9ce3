"""Finetuning as a process: it learns, resumes bit for bit, and leaves an adapter that the library loads."""

from __future__ import annotations

import json
import shutil

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
from llama_jax.train.initialization import starting_model
from llama_jax.train.objectives.reference import NAME as REFERENCE
from llama_jax.train.scorer import Scorer
from llama_jax.weights.adapters import load_adapter
from tests import tiny
from tests.random_models import random_model
from tests.train.processes import Workshop, assert_same, losses, records
from tests.weights import adapters

STEPS = 6
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
LORA = '[adapter]\nkind = "lora"\nrank = 4\n'
BOTTLENECK = '[adapter]\nkind = "bottleneck"\nbottleneck_size = 8\n'
PREFIX = '[adapter]\nkind = "prefix"\nprefix_length = 4\n'
ASKED_BEFORE = '[preference]\nreference = "precomputed"\n'


def set_up(workshop: Workshop, shared_data, objective: str, adapter: str = "", rate: float = 1e-2) -> str:
    """Writes examples and a configuration; returns its name."""
    rows = []
    for number in range(40):
        animal, sound = PAIRS[number % len(PAIRS)]
        prompt = f"There were {number} of them. The {animal} said: "
        if objective == "classify":
            rows.append({"text": prompt, "label": "bird" if animal in ("duck", "owl") else "beast"})
        elif objective == "regress":
            rows.append({"text": prompt, "label": number / 10})
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "adapter", "rate"),
    [
        ("sft", LORA, 2e-2),
        ("sft", BOTTLENECK, 2e-2),
        ("sft", PREFIX, 2e-2),
        ("dpo", "", 1e-3),
        ("dpo", ASKED_BEFORE, 1e-3),
    ],
    ids=["lora", "bottleneck", "prefix", "dpo", "precomputed"],
)
def test_resumed_in_the_middle_it_is_the_run_in_one_go(
    workshop, shared_data, request, objective, adapter, rate
):
    config = set_up(workshop, shared_data, objective, adapter, rate)
    prefix = request.node.callspec.id
    for name, stops in (("whole", [STEPS]), ("halves", [STEPS // 2, STEPS])):
        for stop in stops:
            kept = workshop.folder / f"{prefix}_{name}" / REFERENCE
            if damaged := kept.exists():  # from the initial weights it is computed as before
                kept.write_bytes(kept.read_bytes()[:-1])
            done = workshop.run(config, "--train.run_dir", f"{prefix}_{name}", "--train.steps", stop)
            assert done.status == 0, done.err
            assert ("reference: the log-probabilities of 40 pairs" in done.err) == (adapter == ASKED_BEFORE)
            assert ("is damaged, or of other data" in done.err) == damaged
    whole, halves = (workshop.folder / f"{prefix}_{name}" for name in ("whole", "halves"))
    assert_same(whole, halves, STEPS)
    assert losses(whole) == losses(halves)
    assert losses(whole)[STEPS] < losses(whole)[1]
    told = records(whole, "evaluations.jsonl")[-1]
    if objective == "dpo":
        assert 0 <= told["accuracy"] <= 1 and "perplexity" not in told
        return
    made = [path.read_bytes() for path in sorted((whole / "adapter").iterdir())]
    assert made == [path.read_bytes() for path in sorted((halves / "adapter").iterdir())]
    settings, adapter = load_adapter(whole)
    base = shared_data / "stories260K" / "stories260K.bin"
    plain, loaded = lj.load(base), lj.load(base, adapter=whole)  # merged, where that can be done
    tokens = np.array([plain.tokenizer.encode("There were 3 of them. The duck said: ", add_bos=True)])
    attached = lj.adapters.attach(settings, plain.params, adapter)
    expected = lj.forward(plain.config, attached, tokens)
    np.testing.assert_allclose(lj.forward(loaded.config, loaded.params, tokens), expected, atol=1e-4)
    run = lj.load(whole)  # the run is its adapter on its base
    jax.tree.map(np.testing.assert_array_equal, run.params, loaded.params)
    assert np.abs(expected - lj.forward(plain.config, plain.params, tokens)).max() > 0.1


def test_show_batch_prints_what_is_learned_and_leaves_nothing(workshop, shared_data):
    config = set_up(workshop, shared_data, "sft", LORA)
    before = sorted(workshop.folder.iterdir())
    done = workshop.run(config, "--show-batch", "--train.run_dir", "shown")
    assert done.status == 0, done.err
    assert "row 7: " in done.out and "⟦" in done.out
    assert "examples:" in done.err and "are learned" in done.err
    assert sorted(workshop.folder.iterdir()) == before


def test_an_adapter_without_a_base_is_one_line(workshop, shared_data):
    config = set_up(workshop, shared_data, "sft", LORA)
    done = workshop.run(config, "--model.init_from", "", "--train.run_dir", "none")
    assert done.status == 2
    assert done.err.count("\n") == 1 and "an adapter needs the weights of a model" in done.err


@pytest.fixture(scope="module")
def reward_run(workshop, shared_data):
    """A reward model that has learned to like answers that say please."""
    config = set_up(workshop, shared_data, "reward", LORA, rate=2e-2)
    words = (
        "--train.run_dir",
        "reward",
        "--train.steps",
        12,
        "--eval.every",
        12,
        "--data.template",
        "llama-2",
    )
    done = workshop.run(config, *words)
    assert done.status == 0, done.err
    assert records(workshop.folder / "reward", "evaluations.jsonl")[-1]["accuracy"] > 0.9
    return workshop.folder / "reward"


@pytest.mark.slow
def test_a_reward_model_scores_as_in_training_and_picks_the_best_of_several(
    workshop, reward_run, shared_data
):
    scorer = Scorer.load(reward_run)
    prompt = "There were 7 of them. The owl said: "
    rewards = scorer.scores([(prompt, "hoot, please"), (prompt, "hoot! hoot!"), (prompt, "moo, please")])
    assert rewards.shape == (3, 1) and min(rewards[0], rewards[2]) > rewards[1]
    one = scorer.scores([(prompt, "hoot! hoot!")], batch_size=1)
    np.testing.assert_allclose(one[0], rewards[1], atol=1e-4)

    prompts, out = workshop.folder / "prompts.jsonl", workshop.folder / "best.jsonl"
    prompts.write_text(
        '{"prompt": "The cow said"}\n{"messages": [{"role": "user", "content": "The pig said"}]}\n'
    )
    base = str(shared_data / "stories260K" / "stories260K.bin")
    words = (base, str(reward_run), str(prompts), str(out), "--template", "llama-2", "--max-new-tokens", "8")
    whole = convert(reward_run, workshop.folder / "reward_hf")
    again = Scorer.load(whole)
    asked = [(prompt, "hoot, please"), (prompt, "hoot! hoot!")]
    np.testing.assert_allclose(again.scores(asked), rewards[:2], atol=1e-5)
    with pytest.raises(ConfigError, match="a classifier or reward model"):
        again.model.generate("The cow", max_new_tokens=2)
    with pytest.raises(InputError, match="samples is 0"):
        rejection_sampling.main([*words, "--samples", "0"])
    rejection_sampling.main([*words, "--samples", "3"])
    by_other = workshop.folder / "best_hf.jsonl"
    rejection_sampling.main([base, str(whole), str(prompts), str(by_other), *words[4:], "--samples", "3"])
    assert [json.loads(line)["messages"] for line in by_other.read_text().splitlines()] == [
        json.loads(line)["messages"] for line in out.read_text().splitlines()
    ]
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["messages"][0]["content"] for record in made] == ["The cow said", "The pig said"]
    for record in made:
        assert record["reward"] == max(record["rewards"]) and len(record["rewards"]) > 1
        assert record["messages"][-1]["role"] == "assistant" and record["messages"][-1]["content"]
    with pytest.raises(InputError, match="is there already"):
        rejection_sampling.main([*words])
    prompts.write_text('{"prompt": "a"}\n{"messages": [{"role": "bot", "content": "b"}]}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: messages\[0\]: role is 'bot'"):
        rejection_sampling.main([*words[:3], str(workshop.folder / "other.jsonl")])
    assert not (workshop.folder / "other.jsonl").exists()


@pytest.mark.slow
def test_a_classifier_of_all_the_weights_names_its_classes(workshop, shared_data):
    config = set_up(workshop, shared_data, "classify", rate=2e-3)
    text = (workshop.folder / config).read_text()
    (workshop.folder / config).write_text(text.replace("held_out", 'labels = ["beast", "bird"]\nheld_out'))
    done = workshop.run(config, "--train.run_dir", "classes", "--train.steps", 25, "--eval.every", 25)
    assert done.status == 0, done.err
    assert "accuracy" in done.err and "macro f1" in done.err
    scorer = Scorer.load(workshop.folder / "classes")
    asked = [f"There were 5 of them. The {animal} said: " for animal, _ in PAIRS]
    right = ["bird" if animal in ("duck", "owl") else "beast" for animal, _ in PAIRS]
    assert scorer.classes(asked) == right

    # Out to Hugging Face, and in again as where the next run begins; at a rate of 0 it ends there too.
    out = convert(workshop.folder / "classes", workshop.folder / "classes_hf")
    np.testing.assert_allclose(Scorer.load(out).scores(asked), scorer.scores(asked), atol=1e-6)
    words = ("--model.init_from", out, "--optimizer.learning_rate", 0, "--train.steps", 1)
    done = workshop.run(config, "--train.run_dir", "again", *words)
    assert done.status == 0, done.err
    again = lj.load(convert(workshop.folder / "again", workshop.folder / "again_hf"))
    assert again.config == scorer.model.config and again.config.labels == ("beast", "bird")
    jax.tree.map(np.testing.assert_array_equal, again.params, scorer.model.params)
    done = workshop.run(config, "--train.run_dir", "swapped", *words, "--data.labels", '["bird", "beast"]')
    assert done.status == 2 and "list them in its order" in done.error


@pytest.mark.slow
def test_a_head_is_in_the_place_of_the_output_projection(workshop, shared_data):
    """Of a model whose output is its own, and which begins at random: it trains, resumes and is written."""
    config = set_up(workshop, shared_data, "regress")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["--model.init_from", "", *(f"--model.{name}={size}" for name, size in sizes.items())]
    for name, stops in (("regress_whole", [4]), ("regress_halves", [2, 4])):
        for stop in stops:
            done = workshop.run(config, *words, "--train.run_dir", name, "--train.steps", stop)
            assert done.status == 0, done.err
    whole, halves = (workshop.folder / f"regress_{name}" for name in ("whole", "halves"))
    assert_same(whole, halves, 4)
    model = lj.load(convert(whole, workshop.folder / "regress_hf"))
    assert not model.config.tie_word_embeddings and "lm_head" not in model.params
    jax.tree.map(np.testing.assert_array_equal, model.params, lj.load(whole).params)


def test_what_has_no_head_cannot_be_asked(tmp_path, shared_data):
    with pytest.raises(CheckpointError, match="holds no model"):
        Scorer.load(tmp_path)
    with pytest.raises(InputError, match="is a language model, which has no head"):
        Scorer.load(shared_data / "stories260K" / "stories260K.bin")


@pytest.mark.parametrize(
    ("labels", "objective", "own", "message"),
    [
        (("a", "b"), "sft", (), 'train.objective "sft" needs a language model; give the one'),
        (("a", "b"), "reward", (), r'has a head of 2 \(a, b\), and train.objective "reward" needs one'),
        (("a", "b"), "classify", ("a", "b", "c"), r'"classify" with 3 data.labels; make them fit'),
        (("a", "b"), "classify", ("b", "a"), "data.labels are b, a, and the head of .* has them as a, b"),
    ],
)
def test_a_head_that_does_not_fit_what_is_trained_is_one_line(labels, objective, own, message, tmp_path):
    tiny.write_vocabulary(tmp_path / "tok.bin", tiny.PIECES)
    config, tokenizer = tiny.CONFIG.replace(labels=labels), load_tokenizer(tmp_path / "tok.bin")
    path = lj.save(lj.Model(config, random_model(3, config)[1], tokenizer, tmp_path), tmp_path / "model")
    run = RunConfig(
        model=ModelConfig(init_from=str(path)),
        train=TrainConfig(objective=objective),
        data=DataConfig(labels=own),
    )
    with pytest.raises(ConfigError, match=message):
        starting_model(run, tokenizer)


@pytest.mark.slow
def test_a_run_begins_from_the_adapter_of_another_and_resumes(workshop, shared_data):
    """Finetuned by one adapter and then by another: the second holds to base and first merged."""
    first = set_up(workshop, shared_data, "sft", LORA, rate=2e-2)
    done = workshop.run(first, "--train.run_dir", "stage1", "--train.steps", 4)
    assert done.status == 0, done.err
    stage1, base = workshop.folder / "stage1", shared_data / "stories260K" / "stories260K.bin"
    words = ("--model.init_from", stage1, "--train.steps")
    still = workshop.run(first, "--train.run_dir", "still", *words, 1, "--optimizer.learning_rate", 0)
    assert still.status == 0, still.err
    one, two = lj.load(stage1), lj.load(workshop.folder / "still")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), two.params, one.params)
    plain = lj.load(base)
    assert (
        np.abs(one.params["layers"]["attention"]["wq"] - plain.params["layers"]["attention"]["wq"]).max()
        > 0.01
    )

    unfinished = workshop.folder / "unfinished"
    shutil.copytree(stage1, unfinished, ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(CheckpointError, match="a run that trains an adapter and is not done; finish it"):
        lj.load(unfinished)

    second = set_up(workshop, shared_data, "dpo", LORA, rate=1e-2)
    for name, stops in (("stage2", [4]), ("stage2_halves", [2, 4])):
        for stop in stops:
            done = workshop.run(second, "--train.run_dir", name, *words, stop)
            assert done.status == 0, done.err
    stage2, halves = workshop.folder / "stage2", workshop.folder / "stage2_halves"
    assert_same(stage2, halves, 4)
    np.testing.assert_allclose(losses(stage2)[1], np.log(2), rtol=1e-5)  # the policy is its reference
    # What is loaded is all three, and what is converted is that.
    settings, adapter = load_adapter(stage2)
    expected = lj.adapters.lora.merge(lj.adapters.lora.attach(settings, one.params, adapter))
    found = lj.load(stage2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.params, expected)
    whole = lj.load(convert(stage2, workshop.folder / "stage2_hf"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, found.params)


def test_adapters_that_go_round_in_a_circle_are_one_line(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        adapters.write(tmp_path / name / "adapter", base_model_name_or_path=str(tmp_path / base))
    with pytest.raises(CheckpointError, match="more than 16 adapters on one another, if they end at all"):
        lj.load(tmp_path / "a")


@pytest.mark.slow
def test_a_run_that_no_longer_gets_better_ends_and_says_so(workshop, shared_data):
    config = set_up(workshop, shared_data, "sft", LORA)
    words = ("--train.run_dir", "patient", "--eval.every", 1, "--eval.patience", 2, "--train.steps", 50)
    done = workshop.run(config, *words, "--optimizer.learning_rate", 0)
    assert done.status == 0, done.err
    assert "has not fallen in 2 evaluations: stopped after step 3" in done.err
    assert (workshop.folder / "patient" / "adapter").is_dir()
    again = workshop.run(config, *words, "--optimizer.learning_rate", 0)
    assert "stopped after step 3" in again.err and len(losses(workshop.folder / "patient")) == 3
