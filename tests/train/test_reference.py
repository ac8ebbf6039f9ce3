"""Precomputed reference log-probabilities: same losses as with the reference model in each step; caching."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import ConfigError, DataError, InputError
from llama_jax.meshes import make_mesh
from llama_jax.sharding import use_mesh
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.config.adapter import AdapterConfig
from llama_jax.train.config.preference import PreferenceConfig
from llama_jax.train.config.run import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from llama_jax.train.data import Data, DataConfig, open_data
from llama_jax.train.feed import Feed
from llama_jax.train.initialization import weights_fingerprint
from llama_jax.train.metrics.evaluate import make_eval_fn
from llama_jax.train.objectives.reference import REFERENCE_FILE, reference_logprobs
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import init_state
from llama_jax.train.step import build_step
from llama_jax.train.trainable import TrainableSpec
from tests.tiny import PIECES, write_model

BATCH, LENGTH, COUNT = 8, 64, 40
TOO_LONG = 5  # index of the record
MODEL = lj.LlamaConfig(
    vocab_size=len(PIECES),
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
)
LORA = AdapterConfig(type="lora", rank=4, base="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    write_model(folder)  # and a vocabulary
    words = ["rain", "sun", "a tall tree", "ab", "yes", "no way"]
    rows = [
        {
            "prompt": f"{words[i % 6]} ",
            "chosen": words[i % 5] + " ab" * (i % 3),
            "rejected": f"not {words[i % 4]}",
        }
        for i in range(COUNT)
    ]
    rows[TOO_LONG]["chosen"] *= 30
    (folder / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labeled = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 > 0}
        for i, row in enumerate(rows)
    ]
    (folder / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labeled))
    return folder


@pytest.fixture(scope="module")
def params():
    params = lj.init(MODEL, jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)


def run_of(
    folder,
    precompute: bool = True,
    adapter: AdapterConfig | None = None,
    objective: Any = "dpo",
    **train: Any,
) -> RunConfig:
    settings = {"dtype": "float32", "remat": "none", "attention": "xla", "loss_chunks": 2, "seq_len": LENGTH}
    return RunConfig(
        model=ModelConfig(init_from=f"{folder}/tiny.bin") if adapter else ModelConfig(),
        data=DataConfig(files=f"{folder}/{objective}.jsonl", validation_fraction=0.2),
        train=TrainConfig(objective=objective, steps=8, global_batch_size=BATCH, **{**settings, **train}),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0),
        adapter=adapter or AdapterConfig(),
        preference=PreferenceConfig(precompute_ref_log_probs=precompute),
    )


def data_of(run: RunConfig, folder) -> Data:
    sizes = {"seq_len": run.train.seq_len, "batch_size": BATCH, "seed": 0}
    return open_data(run.data, load_tokenizer(folder / "tok.bin"), objective=run.train.objective, **sizes)


class Launch:
    """A run up to its reference log-probabilities, and its first steps."""

    def __init__(self, folder, run_dir, params, run: RunConfig | None = None, mesh: Any = None):
        self.run, self.run_dir = run or run_of(folder), run_dir
        self.data, self.mesh = data_of(self.run, folder), mesh
        self.feed = Feed.for_mesh(mesh, BATCH, self.run.train.seq_len)
        self.trainable_spec = TrainableSpec.from_config(self.run, "cpu")
        self.params = params if mesh is None else lj.shard_params(params, mesh, MODEL)
        self.messages: list[str] = []
        self.computed = 0

    def initial_params(self) -> Any:
        self.computed += 1
        return self.params

    def logprobs(self, stop=lambda: 0) -> np.ndarray | None:
        args = (self.run, self.run_dir, MODEL, "cpu", self.data, self.feed, self.trainable_spec)
        base = weights_fingerprint(self.run.model.init_from) if self.run.model.init_from else None
        options = {"base": base, "initial_params": self.initial_params, "log": self.messages.append}
        with use_mesh(self.mesh):
            return reference_logprobs(*args, stop=stop, **options)

    def train(self, steps: int = 8) -> tuple[np.ndarray, dict[str, float], Any]:
        """Losses, evaluation metrics, and the frozen parameters."""
        optimizer = make_optimizer(self.run.optimizer, make_schedule(self.run.optimizer, 8))
        if self.run.preference.precompute_ref_log_probs:
            self.data = self.data.with_reference(self.logprobs())
        with use_mesh(self.mesh):
            step, *abstract = build_step(self.run, MODEL, self.mesh, "cpu", self.trainable_spec)
            compiled = step.lower(*abstract).compile()
            state, frozen = init_state(
                MODEL, optimizer, 0, jax.tree.map(jnp.copy, self.params), self.trainable_spec
            )
            losses, batches = [], self.data.train()
            for _ in range(steps):
                state, metrics = compiled(state, self.feed.put(next(batches)), frozen)
                losses.append(float(metrics.loss))
            batches.close()
            evaluate = make_eval_fn(self.run, MODEL, "cpu", self.data, self.feed, self.trainable_spec, frozen)
            return np.array(losses), evaluate(state.params), frozen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "adapter", "specs"),
    [("dpo", None, ("", "fsdp=4,tensor=2")), ("dpo", LORA, ("",)), ("kto", LORA, ("data=2,fsdp=4",))],
    ids=["full", "lora", "kto"],
)
def test_losses_equal_those_with_the_reference_model_in_each_step(
    folder, tmp_path, params, objective, adapter, specs
):
    """Over more than an epoch of shuffled, packed pairs; full finetuning keeps no copy of the weights."""
    expected, expected_metrics, frozen = Launch(
        folder, tmp_path, params, run_of(folder, False, adapter, objective)
    ).train()
    assert set(frozen) == {"reference" if adapter is None else "base"}
    for spec in specs:
        (tmp_path / f"mesh {spec}").mkdir()
        run = run_of(folder, True, adapter, objective)
        launch = Launch(folder, tmp_path / f"mesh {spec}", params, run, make_mesh(spec) if spec else None)
        assert not launch.trainable_spec.reference
        losses, metrics, frozen = launch.train()
        np.testing.assert_allclose(losses, expected, rtol=1e-4 if spec else 1e-5)
        assert metrics.get("accuracy") == expected_metrics.get("accuracy")
        for name, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-3)
        assert (frozen is None) == (adapter is None)
    assert expected[-1] < expected[0]


def test_logprobs_are_those_of_each_answer_alone(folder, tmp_path, params):
    launch = Launch(folder, tmp_path, params)
    table = launch.logprobs()
    source = launch.data._parts[0].source
    assert np.isnan(table[TOO_LONG]).all() and np.isnan(table).sum() == 2
    for record in (0, 17, COUNT - 1):
        for segment, number in zip(source.example(record).segments, table[record], strict=True):
            tokens = np.zeros((1, LENGTH), np.int32)
            tokens[0, : len(segment)] = segment.ids
            logprobs = jax.nn.log_softmax(lj.forward(MODEL, params, tokens))[0]
            in_loss = np.flatnonzero(segment.mask)
            expected = sum(float(logprobs[t - 1, segment.ids[t]]) for t in in_loss)
            np.testing.assert_allclose(number, expected, rtol=1e-5)
    mesh = Launch(folder, tmp_path / "mesh", params, mesh=make_mesh("data=2,fsdp=2,tensor=2"))
    (tmp_path / "mesh").mkdir()
    np.testing.assert_allclose(mesh.logprobs(), table, rtol=1e-5)


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory, params):
    """The file that a run writes, and its table."""
    run_dir = tmp_path_factory.mktemp("cached")
    table = Launch(folder, run_dir, params).logprobs()
    return (run_dir / REFERENCE_FILE).read_bytes(), table


def test_second_launch_reads_the_cached_file(folder, tmp_path, params):
    first, second = (Launch(folder, tmp_path, params) for _ in range(2))
    computed, read = first.logprobs(), second.logprobs()
    assert computed.dtype == read.dtype == np.float32 and computed.tobytes() == read.tobytes()
    assert (first.computed, second.computed) == (1, 0)
    assert first.messages == [
        f"reference: computing the log-probabilities of {COUNT} pairs once, into {tmp_path / REFERENCE_FILE}"
    ]
    assert not second.messages
    assert [path.name for path in tmp_path.iterdir()] == [REFERENCE_FILE]


def flipped(content: bytes) -> bytes:
    return content[:200] + bytes([content[200] ^ 1]) + content[201:]


DAMAGES = {
    "flipped": flipped,
    "short": lambda c: c[:-1],
    "long": lambda c: c + b"\0",
    "empty": lambda c: b"",
    "another's": lambda c: b"x" + c[1:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_reported_and_computed_again(folder, tmp_path, params, cached, damage):
    content, table = cached
    (tmp_path / REFERENCE_FILE).write_bytes(DAMAGES[damage](content))
    again = Launch(folder, tmp_path, params)
    result = again.logprobs(stop=lambda: 0 if damage == "flipped" else 15)  # once to the end
    assert again.computed == 1
    assert again.messages[0] == (
        f"{tmp_path / REFERENCE_FILE} is damaged, or was computed from other data, weights or settings; "
        "computing it again"
    )
    if damage == "flipped":
        np.testing.assert_array_equal(result, table)
        assert (tmp_path / REFERENCE_FILE).read_bytes() == content


def test_file_that_cannot_be_read_or_written_is_named(folder, tmp_path, params):
    (tmp_path / REFERENCE_FILE).mkdir()
    launch = Launch(folder, tmp_path, params)
    with pytest.raises(
        InputError, match=rf"{REFERENCE_FILE}: cannot be written: Is a directory; free some space"
    ):
        launch.logprobs()
    assert "computing it again" in launch.messages[0]


@pytest.mark.parametrize("train", [{"seq_len": 48}, {"dtype": "bfloat16"}, {"seed": 1}])
def test_other_settings_invalidate_the_file(folder, tmp_path, params, cached, train):
    (tmp_path / REFERENCE_FILE).write_bytes(cached[0])
    other = Launch(folder, tmp_path, params, run_of(folder, **train))
    other.logprobs(stop=lambda: 15)
    assert other.computed == 1 and "from other data, weights or settings" in other.messages[0]


def test_other_initial_weights_invalidate_the_file(folder, tmp_path, params):
    path = write_model(tmp_path)
    run = dataclasses.replace(run_of(folder), model=ModelConfig(init_from=str(path)))
    first, second = (Launch(folder, tmp_path, params, run) for _ in range(2))
    first.logprobs()
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    second.logprobs(stop=lambda: 15)
    assert second.computed == 1 and "from other data, weights or settings" in second.messages[0]


def test_nothing_is_written_when_stopped(folder, tmp_path, params):
    signals = iter([0, 15])
    assert Launch(folder, tmp_path, params).logprobs(stop=lambda: next(signals)) is None
    assert not list(tmp_path.iterdir())


def test_nonfinite_logprob_is_an_error_that_names_the_pair(folder, tmp_path, params):
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    message = r"dpo\.jsonl:\d+: the reference model gives an answer the log-probability nan; check"
    with pytest.raises(DataError, match=message):
        Launch(folder, tmp_path, bad).logprobs()
    assert not list(tmp_path.iterdir())


def test_precomputed_logprobs_need_a_reference_model():
    for objective in ("pretrain", "sft", "reward"):
        with pytest.raises(ConfigError, match=f'train.objective "{objective}", which has no reference model'):
            RunConfig(
                train=TrainConfig(objective=objective),
                preference=PreferenceConfig(precompute_ref_log_probs=True),
            )
