"""Distillation: packed rows equal each example alone, a mesh one device, a resumed run one in one go."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.loss import Loss
from llama_jax.meshes import make_mesh
from llama_jax.plan.topology import Topology
from llama_jax.sharding import use_mesh
from llama_jax.train.config.adapter import AdapterConfig
from llama_jax.train.config.distillation import DistillationConfig
from llama_jax.train.config.mesh import MeshConfig
from llama_jax.train.config.run import ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig, TrainConfig
from llama_jax.train.feed import Feed
from llama_jax.train.network import Network
from llama_jax.train.objectives import make_loss_fn, make_metrics_fn
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.planning.inputs import step_inputs
from llama_jax.train.state import init_state
from llama_jax.train.step import build_step
from llama_jax.train.teacher import check_teacher
from llama_jax.train.trainable import TrainableSpec
from tests.optimized import optimized
from tests.train.processes import Workshop, assert_same, checkpoint_contents, losses, records, steps
from tests.train.test_objectives import BATCH, COMPUTE, LENGTH, MODEL, examples, init_params, segments

# Wider, deeper, and with another number of heads than its student.
TEACHER = MODEL.replace(hidden_size=128, num_hidden_layers=2, num_attention_heads=8, head_dim=16)


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(MODEL)


@pytest.fixture(scope="module")
def teacher() -> Network:
    return Network(jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, init_params(TEACHER)), TEACHER)


def run_of(adapter: AdapterConfig | None = None, **settings: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(init_from="somewhere"),
        train=TrainConfig(objective="distill", steps=8, global_batch_size=BATCH, seq_len=LENGTH, **COMPUTE),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0),
        adapter=adapter or AdapterConfig(),
        distillation=DistillationConfig(teacher="elsewhere", **settings),
    )


@jax.jit
def logprobs_of(params: Any, teacher: Network, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of student and teacher at temperature 2, f32 [1, T, V] each."""
    logits = lj.forward(MODEL, params, tokens), lj.forward(teacher.config, teacher.params, tokens)
    return tuple(jax.nn.log_softmax(x / 2) for x in logits)


@pytest.mark.parametrize("data", ["sft", "pretrain"])
def test_on_packed_rows_equals_each_example_alone(data, params, teacher):
    """KL(teacher || student) from all logits, at the mask of `sft`, and at all but the first token."""
    batch = examples()
    if data == "pretrain":
        batch = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    expected = []
    for row, at in segments(batch):
        tokens = np.zeros((1, 8), np.int32)
        tokens[0, : len(at)] = batch["tokens"][row, at]
        student, of_teacher = (np.asarray(x[0], np.float64) for x in logprobs_of(params, teacher, tokens))
        kl = (np.exp(of_teacher) * (of_teacher - student)).sum(-1)
        expected += [kl[i - 1] for i in range(1, len(at)) if data == "pretrain" or batch["mask"][row, at[i]]]
    metrics_fn = jax.jit(make_metrics_fn(run_of(data=data, temperature=2.0), MODEL, "cpu"))
    loss, metrics = metrics_fn(params, batch, teacher=teacher)
    assert loss.count == len(expected)
    np.testing.assert_allclose(loss.total, sum(expected), rtol=1e-5)
    mask = batch.get("mask", batch["segment_ids"] > 0)
    where = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
    for name, model, weights in (
        ("cross_entropy", MODEL, params),
        ("teacher_cross_entropy", TEACHER, teacher.params),
    ):
        plain = lj.next_token_loss(model, weights, batch["tokens"], mask, **where)
        np.testing.assert_allclose(metrics[name], plain.total, rtol=1e-5)


def test_of_a_student_that_is_its_teacher_loss_and_gradient_are_zero(params):
    loss_fn = make_loss_fn(run_of(beta=0.5, top_k=7), MODEL, "cpu")
    total = lambda params, teacher: loss_fn(params, examples(), teacher=teacher).total  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(total))(params, Network(params, MODEL))
    assert abs(value) < 1e-4 and max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-4


def test_a_training_step_does_not_compute_the_metrics(params, teacher, monkeypatch):
    """The compiled gradient has the products that it has where the metrics are constants."""

    def products() -> int:
        loss_fn = make_loss_fn(run_of(), MODEL, "cpu")
        total = lambda params, teacher: loss_fn(params, examples(), teacher=teacher).total  # noqa: E731
        text = optimized(jax.jit(jax.grad(total)).lower(params, teacher)).as_text()
        return len(re.findall(r" dot\(", text))

    found = products()
    zero = Loss(total=jnp.zeros(()), count=jnp.zeros(()))
    monkeypatch.setattr("llama_jax.train.objectives.distillation.next_token_loss", lambda *_, **__: zero)
    assert found == products()


CASES = [
    ({"beta": 1.0}, None, "data=2,fsdp=2,tensor=2"),
    ({"top_k": 9, "beta": 0.3}, AdapterConfig(type="lora", rank=4, base="int8"), "fsdp=2,context=2,tensor=2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "adapter", "spec"), CASES, ids=["full", "lora on int8"])
def test_losses_on_a_mesh_equal_a_single_device(settings, adapter, spec, params, teacher):
    run = run_of(adapter, **settings)

    def curve(spec: str | None) -> np.ndarray:
        mesh = spec and make_mesh(spec)
        trainable_spec = TrainableSpec.from_config(run, "cpu")
        feed = Feed.for_mesh(mesh, BATCH, LENGTH)
        optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
        with use_mesh(mesh):
            step, *abstract = build_step(run, MODEL, mesh, "cpu", trainable_spec, TEACHER)
            laid, of_teacher = jax.tree.map(jnp.copy, params), teacher.params
            if mesh is not None:
                laid = lj.shard_params(laid, mesh, MODEL)
                of_teacher = lj.shard_params(of_teacher, mesh, TEACHER)
            state, frozen = init_state(MODEL, optimizer, 0, laid, trainable_spec)
            frozen = {**(frozen or {}), "teacher": Network(of_teacher, TEACHER)}
            compiled, found = step.lower(*abstract).compile(), []
            for seed in range(4):
                state, metrics = compiled(state, feed.put(examples(seed % 2)), frozen)
                found.append(float(metrics.loss))
        return np.array(found)

    one, many = curve(None), curve(spec)
    np.testing.assert_allclose(many, one, rtol=1e-3 if adapter else 1e-4)
    assert one[-2:].mean() < one[:2].mean()  # on the same two batches


def test_a_plan_counts_the_teacher_that_the_run_reads(tmp_path):
    """Its architecture is read from its files; an absent one is an error of a plan too."""
    lj.save(TEACHER, init_params(TEACHER), tmp_path / "teacher")
    run, slice_ = run_of(), Topology.parse("v5p:2x2x1")
    run = dataclasses.replace(
        run,
        distillation=dataclasses.replace(run.distillation, teacher=str(tmp_path / "teacher")),
        mesh=MeshConfig(fsdp=4),
    )
    teacher = step_inputs(run, MODEL, slice_).teacher
    assert teacher is not None and (teacher.hidden_size, teacher.num_params) == (128, TEACHER.num_params)
    with pytest.raises(CheckpointError):
        step_inputs(run_of(), MODEL, slice_)


BAD_SETTINGS = [
    ({}, {}, 'train.objective is "distill" and distillation.teacher is not set'),
    ({"teacher": "t", "beta": 1.5}, {}, "distillation.beta is 1.5; it must be from 0, forward KL, to 1"),
    ({"teacher": "t", "beta": -0.1}, {}, "distillation.beta is -0.1; it must be a number, at least 0"),
    ({"teacher": "t", "temperature": 0.0}, {}, "distillation.temperature is 0; it must be above 0"),
    ({"teacher": "t", "top_k": -1}, {}, "distillation.top_k is -1; it must be a number, at least 0"),
    ({"teacher": "t", "data": "dpo"}, {}, "distillation.data is 'dpo'; it must be one of pretrain, sft"),
    (
        {"teacher": "t"},
        {"objective": "sft"},
        'distillation.teacher is "t" and train.objective "sft", which has',
    ),
    (
        {"teacher": "t", "on_policy": True, "data": "pretrain"},
        {},
        "the data are prompts: leave it out",
    ),
    ({"on_policy": True}, {"objective": "sft"}, "distillation.on_policy is true and train.objective"),
    ({"top_k": 4}, {"objective": "dpo"}, 'distillation.top_k is 4 and train.objective "dpo", which has no'),
]


@pytest.mark.parametrize(("settings", "train", "message"), BAD_SETTINGS)
def test_bad_settings_are_named(settings, train, message):
    with pytest.raises(ConfigError) as error:
        RunConfig(
            train=TrainConfig(**{"objective": "distill", **train}),
            tokenizer=TokenizerConfig(path="t"),
            distillation=DistillationConfig(**settings),
        )
    assert message in str(error.value) and "\n" not in str(error.value)


def test_student_and_teacher_need_one_vocabulary():
    with pytest.raises(ConfigError, match=r"neither model.init_from nor tokenizer.path is set; student and"):
        RunConfig(train=TrainConfig(objective="distill"), distillation=DistillationConfig(teacher="t"))


CONFIG = """\
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
[tokenizer]
path = "{teacher}"
[data]
files = "{files}"
validation_fraction = 0.2
[train]
objective = "distill"
steps = 4
global_batch_size = 8
seq_len = 64
dtype = "float32"
remat = "none"
attention = "xla"
loss_chunks = 2
[distillation]
teacher = "{teacher}"
temperature = 2.0
top_k = 20
[optimizer]
learning_rate = 1e-2
warmup_steps = 0
schedule = "constant"
[checkpoint]
every = 2
[eval]
every = 2
max_new_tokens = 0
[log]
every = 1
tensorboard = false
plot = false
"""
Configure = Callable[..., tuple[str, Path]]


@pytest.fixture(scope="module")
def config(workshop: Workshop, shared_data: Path) -> tuple[str, Path]:
    """A configuration, and a copy of the teacher that a test may move."""
    folder = Path(shutil.copytree(shared_data / "stories260K", workshop.folder / "stories"))
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    files = workshop.folder / "sft.jsonl"
    rows = [{"prompt": f"There were {n} of them. ", "completion": "The duck said quack."} for n in range(40)]
    files.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "distill.toml"
    (workshop.folder / name).write_text(CONFIG.format(teacher=folder / "stories260K.bin", files=files))
    return name, folder


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_and_has_the_teacher_it_began_with(workshop, config):
    name, folder = config
    whole = workshop.folder / "whole"
    (done,) = workshop.train_all((name, "--train.run_dir", whole))
    assert "teacher: 0.3M parameters, 5 layers; beta 0, temperature 2, its top 20 tokens" in done.err
    assert losses(whole)[4] < losses(whole)[1]
    metrics = records(whole, "evaluations.jsonl")[-1]
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["cross_entropy"]))
    assert 0 < metrics["teacher_cross_entropy"] < metrics["cross_entropy"]
    assert "bits_per_byte" not in metrics
    halves = Path(shutil.copytree(whole, workshop.folder / "halves"))
    shutil.rmtree(halves / "checkpoints" / str(steps(halves)[-1]))
    moved = folder.rename(workshop.folder / "moved")
    try:
        command = (name, "--train.run_dir", halves)
        gone = workshop.run(*command)
        assert gone.status == 2
        assert "distillation.teacher" in gone.error and "with --distillation.teacher" in gone.error
        place = ("--distillation.teacher", moved / "stories260K.bin")
        weights = bytearray((moved / "stories260K.bin").read_bytes())
        other = Path(shutil.copytree(moved, workshop.folder / "other"))
        weights[256 :: 1 << 14] = bytes(byte ^ 1 for byte in weights[256 :: 1 << 14])  # samples are compared
        (other / "stories260K.bin").write_bytes(weights)
        refused = workshop.run(*command, "--distillation.teacher", other / "stories260K.bin")
        assert refused.status == 2 and "distillation.teacher holds other weights" in refused.error
        workshop.train_all((*command, *place), worker=2)
    finally:
        moved.rename(folder)
    assert_same(whole, halves, 4)
    assert losses(whole) == losses(halves)


@pytest.mark.slow
def test_a_student_learns_on_its_own_answers_and_resumes(workshop, config):
    name, _ = config
    own = ("--distillation.on_policy", "true", "--distillation.beta", 1, "--data.validation_fraction", 0)
    own += ("--rl.num_generations", 2, "--rl.max_completion_length", 12, "--distillation.top_k", 0)
    own += ("--rl.steps_per_generation", 2)
    whole = workshop.folder / "own"
    workshop.train_all((name, "--train.run_dir", whole, *own))
    samples = records(whole, "samples.jsonl")
    assert len(samples) == 4 * 8 and {sample["step"] for sample in samples} == {1, 3}
    assert samples[0]["prompt"] == samples[1]["prompt"] and "reward" not in samples[0]
    lengths = [sample["tokens"] for sample in samples]
    metrics = records(whole)
    learned = [line["update_tokens_per_second"] * line["update_seconds"] for line in metrics[:2]]
    assert learned == pytest.approx([sum(lengths[:8]), sum(lengths[8:16])], rel=1e-3)
    assert metrics[0]["completion_length"] == pytest.approx(np.mean(lengths[:16]))
    assert losses(whole)[4] < losses(whole)[1]
    halves = Path(shutil.copytree(whole, workshop.folder / "own_halves"))
    shutil.rmtree(halves / "checkpoints" / str(steps(halves)[-1]))
    workshop.train_all((name, "--train.run_dir", halves, *own), worker=2)
    (a, _), (b, _) = (checkpoint_contents(run, 4) for run in (whole, halves))
    assert a.keys() == b.keys() and all(a[leaf].tobytes() == b[leaf].tobytes() for leaf in a)
    assert (whole / "samples.jsonl").read_text() == (halves / "samples.jsonl").read_text()
    shown = workshop.run(name, "--train.run_dir", "shown", "--show-batch", *own)
    assert shown.status == 0 and "completion 0: 12 tokens after" in shown.out, shown.out
    refused = workshop.run(name, "--train.run_dir", "refused", *own, "--rl.rewards", "exact_match")
    assert refused.status == 2 and "rl.rewards is ['exact_match'] and train.objective" in refused.error


def test_bad_teachers_are_refused_before_the_run_begins(workshop, config, shared_data):
    name, _ = config
    base = (name, "--train.run_dir", workshop.folder / "refused")
    commands = {
        "distillation.top_k is 513, and the vocabulary has 512 tokens": ("--distillation.top_k", 513),
        "train.seq_len is 1024, and the context of distillation.teacher": (
            *("--train.seq_len", 1024),
            *("--model.max_position_embeddings", 1024),
        ),
        "has a vocabulary of 512 and the model of 600": ("--model.vocab_size", 600),
        "nothing.gguf": ("--distillation.teacher", "nothing.gguf"),
        "has another vocabulary than the model: its token": (
            "--tokenizer.path",
            shared_data / "llama2" / "tokenizer.model",
        ),
    }
    for message, flags in commands.items():
        done = workshop.run(*base, *flags)
        assert done.status == 2 and message in done.error, done.err
    assert not (workshop.folder / "refused" / "config.toml").exists()
    with pytest.raises(ConfigError, match="is a classifier or reward model, which predicts no tokens"):
        check_teacher(run_of(), dataclasses.replace(TEACHER, labels=("good", "bad")), MODEL, None)
