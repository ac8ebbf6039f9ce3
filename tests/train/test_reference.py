"""A reference that was asked beforehand is the one asked at each step, and nobody asks it twice."""

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
from llama_jax.sharding import make_mesh, use_mesh
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.config.finetune import AdapterConfig, PreferenceConfig
from llama_jax.train.config.run import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from llama_jax.train.data import Data, DataConfig, open_data
from llama_jax.train.feed import Feed
from llama_jax.train.metrics.evaluate import make_held_out_loss
from llama_jax.train.objectives.reference import NAME, reference_logprobs
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import begin
from llama_jax.train.step import build_step
from llama_jax.train.trainable import Tuning
from tests.tiny import PIECES, write_model

BATCH, LENGTH, COUNT = 8, 64, 40
TOO_LONG = 5  # which record
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
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def params():
    made = lj.init(MODEL, jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, made)


def run_of(
    folder, reference: str = "precomputed", adapter: AdapterConfig | None = None, **train: Any
) -> RunConfig:
    settings = {"dtype": "float32", "remat": "none", "attention": "xla", "loss_chunks": 2, "seq_len": LENGTH}
    return RunConfig(
        model=ModelConfig(init_from=f"{folder}/tiny.bin") if adapter else ModelConfig(),
        data=DataConfig(files=f"{folder}/pairs.jsonl", validation_fraction=0.2),
        train=TrainConfig(objective="dpo", steps=8, global_batch_size=BATCH, **{**settings, **train}),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0),
        adapter=adapter or AdapterConfig(),
        preference=PreferenceConfig(reference=reference),
    )


def data_of(run: RunConfig, folder) -> Data:
    sizes = {"seq_len": run.train.seq_len, "batch_size": BATCH, "seed": 0}
    return open_data(run.data, load_tokenizer(folder / "tok.bin"), objective="dpo", **sizes)


class Launch:
    """A launch of a run as far as its reference."""

    def __init__(self, folder, run_dir, params, run: RunConfig | None = None, mesh: Any = None):
        self.run, self.run_dir = run or run_of(folder), run_dir
        self.data, self.mesh = data_of(self.run, folder), mesh
        self.feed = Feed.over(mesh, BATCH, self.run.train.seq_len)
        self.tuning = Tuning.of(self.run, "cpu")
        self.params = params if mesh is None else lj.shard_params(params, mesh, MODEL)
        self.said: list[str] = []
        self.asked = 0

    def beginning(self) -> Any:
        self.asked += 1
        return self.params

    def numbers(self, stop=lambda: 0) -> np.ndarray | None:
        what = (self.run, self.run_dir, MODEL, "cpu", self.data, self.feed, self.tuning)
        with use_mesh(self.mesh):
            return reference_logprobs(*what, beginning=self.beginning, stop=stop, say=self.said.append)

    def train(self, steps: int = 8) -> tuple[np.ndarray, dict[str, float], Any]:
        """Losses, held-out numbers and what is frozen."""
        optimizer = make_optimizer(self.run.optimizer, make_schedule(self.run.optimizer, 8))
        if self.run.preference.precompute_ref_log_probs:
            self.data = self.data.with_reference(self.numbers())
        with use_mesh(self.mesh):
            step, *abstract = build_step(self.run, MODEL, self.mesh, "cpu", self.tuning)
            compiled = step.lower(*abstract).compile()
            state, frozen = begin(MODEL, optimizer, 0, jax.tree.map(jnp.copy, self.params), self.tuning)
            losses, batches = [], self.data.train()
            for _ in range(steps):
                state, metrics = compiled(state, self.feed.put(next(batches)), frozen)
                losses.append(float(metrics.loss))
            batches.close()
            held_out = make_held_out_loss(self.run, MODEL, "cpu", self.data, self.feed, self.tuning, frozen)
            return np.array(losses), held_out(state.params), frozen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "specs"), [(None, ("", "fsdp=4,tensor=2")), (LORA, ("",))], ids=["full", "lora"]
)
def test_the_curve_is_that_of_asking_at_each_step(folder, tmp_path, params, adapter, specs):
    """Over more than an epoch of shuffled, packed pairs; full finetuning holds no second copy."""
    known, told, frozen = Launch(folder, tmp_path, params, run_of(folder, "on_the_fly", adapter)).train()
    assert set(frozen) == {"reference" if adapter is None else "base"}
    for spec in specs:
        (tmp_path / f"mesh {spec}").mkdir()
        run = run_of(folder, "precomputed", adapter)
        launch = Launch(folder, tmp_path / f"mesh {spec}", params, run, make_mesh(spec) if spec else None)
        assert not launch.tuning.reference
        losses, numbers, frozen = launch.train()
        np.testing.assert_allclose(losses, known, rtol=1e-4 if spec else 1e-5)
        assert numbers["accuracy"] == told["accuracy"]
        for name, value in told.items():
            np.testing.assert_allclose(numbers[name], value, rtol=1e-3)
        assert (frozen is None) == (adapter is None)
    assert known[-1] < known[0]


def test_the_numbers_are_those_of_each_answer_alone(folder, tmp_path, params):
    launch = Launch(folder, tmp_path, params)
    table = launch.numbers()
    source = launch.data._parts[0].source
    assert np.isnan(table[TOO_LONG]).all() and np.isnan(table).sum() == 2
    for record in (0, 17, COUNT - 1):
        for segment, number in zip(source.example(record).segments, table[record], strict=True):
            tokens = np.zeros((1, LENGTH), np.int32)
            tokens[0, : len(segment)] = segment.ids
            logprobs = jax.nn.log_softmax(lj.forward(MODEL, params, tokens))[0]
            learned = np.flatnonzero(segment.mask)
            expected = sum(float(logprobs[t - 1, segment.ids[t]]) for t in learned)
            np.testing.assert_allclose(number, expected, rtol=1e-5)
    mesh = Launch(folder, tmp_path / "mesh", params, mesh=make_mesh("data=2,fsdp=2,tensor=2"))
    (tmp_path / "mesh").mkdir()
    np.testing.assert_allclose(mesh.numbers(), table, rtol=1e-5)


@pytest.fixture(scope="module")
def kept(folder, tmp_path_factory, params):
    """The file that a launch leaves, and what is in it."""
    run_dir = tmp_path_factory.mktemp("kept")
    table = Launch(folder, run_dir, params).numbers()
    return (run_dir / NAME).read_bytes(), table


def test_a_second_launch_reads_what_the_first_computed(folder, tmp_path, params):
    first, second = (Launch(folder, tmp_path, params) for _ in range(2))
    computed, read = first.numbers(), second.numbers()
    assert computed.dtype == read.dtype == np.float32 and computed.tobytes() == read.tobytes()
    assert (first.asked, second.asked) == (1, 0)
    assert first.said == [f"reference: the log-probabilities of {COUNT} pairs, once, into {tmp_path / NAME}"]
    assert not second.said
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


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
def test_a_damaged_file_is_computed_again_and_said_to_be(folder, tmp_path, params, kept, damage):
    content, table = kept
    (tmp_path / NAME).write_bytes(DAMAGES[damage](content))
    again = Launch(folder, tmp_path, params)
    found = again.numbers(stop=lambda: 0 if damage == "flipped" else 15)  # once to the end
    assert again.asked == 1
    assert again.said[0] == (
        f"{tmp_path / NAME} is damaged, or of other data, weights or settings: it is computed again"
    )
    if damage == "flipped":
        np.testing.assert_array_equal(found, table)
        assert (tmp_path / NAME).read_bytes() == content


def test_a_file_that_cannot_be_read_or_written_is_named(folder, tmp_path, params):
    (tmp_path / NAME).mkdir()
    launch = Launch(folder, tmp_path, params)
    with pytest.raises(InputError, match=rf"{NAME}: cannot be written: Is a directory; make room"):
        launch.numbers()
    assert "it is computed again" in launch.said[0]


@pytest.mark.parametrize("train", [{"seq_len": 48}, {"dtype": "bfloat16"}, {"seed": 1}])
def test_other_settings_are_computed_anew(folder, tmp_path, params, kept, train):
    (tmp_path / NAME).write_bytes(kept[0])
    other = Launch(folder, tmp_path, params, run_of(folder, **train))
    other.numbers(stop=lambda: 15)
    assert other.asked == 1 and "of other data, weights or settings" in other.said[0]


def test_other_initial_weights_are_computed_anew(folder, tmp_path, params):
    path = write_model(tmp_path)
    run = dataclasses.replace(run_of(folder), model=ModelConfig(init_from=str(path)))
    first, second = (Launch(folder, tmp_path, params, run) for _ in range(2))
    first.numbers()
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    second.numbers(stop=lambda: 15)
    assert second.asked == 1 and "of other data, weights or settings" in second.said[0]


def test_stopped_on_the_way_it_leaves_nothing(folder, tmp_path, params):
    signals = iter([0, 15])
    assert Launch(folder, tmp_path, params).numbers(stop=lambda: next(signals)) is None
    assert not list(tmp_path.iterdir())


def test_a_reference_that_gives_no_number_is_refused_by_the_pair(folder, tmp_path, params):
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    message = (
        r"pairs\.jsonl:\d+: the model that training begins with gives an answer the log-probability nan; look"
    )
    with pytest.raises(DataError, match=message):
        Launch(folder, tmp_path, bad).numbers()
    assert not list(tmp_path.iterdir())


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ConfigError, match=r"preference\.reference is 'never'; .*on_the_fly"):
        PreferenceConfig(reference="never")
    for objective in ("pretrain", "sft", "reward"):
        with pytest.raises(ConfigError, match=f'train.objective "{objective}", which has no reference model'):
            RunConfig(
                train=TrainConfig(objective=objective),
                preference=PreferenceConfig(precompute_ref_log_probs=True),
            )
