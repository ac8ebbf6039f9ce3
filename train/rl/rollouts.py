"""Rollouts for the training loop: the batches of policy optimization, made with the present weights.

What a step trains on is a function of the weights, the seed and the step: a resumed run samples what the
uninterrupted one does. With `rl.overlap` it is one of the weights before the last update, and completions
that are not yet trained on are part of a checkpoint.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax import LlamaConfig
from llama_jax.errors import DataError
from llama_jax.ops.gradient_sums import Maximum
from llama_jax.tokenizer import Tokenizer

from ..config.run import RunConfig
from ..devices import compute_dtype
from ..feed import Feed
from ..state import TrainState
from ..step import StepMetrics
from ..trainable import Frozen, TrainableSpec
from . import exact, packing
from .advantages import equal_groups, group_advantages
from .critic import Critic, add_advantages
from .judge import Judge
from .prompts import PromptData
from .reward_models import RewardModels
from .rewards import Rewards, names_of
from .rolled import Rolled, arrays_as_text, arrays_of_text
from .sampler import Sampled, Sampler
from .samples import SampleRecord
from .scoring import Scored, Scorer

_KEY = 3  # of the run's seed, what rollouts are sampled with


class Rollouts:
    """Samples completions of prompts, scores them, and makes batches of them.

    Attributes:
      skipped: count of the records that were skipped since the run started, by reason.
    """

    def __init__(
        self,
        run: RunConfig,
        model: LlamaConfig,
        platform: str,
        tokenizer: Tokenizer,
        feed: Feed,
        data: PromptData,
        trainable_spec: TrainableSpec,
        frozen: Frozen,
        rewards: Rewards | None,
        reward_models: RewardModels,
        *,
        log: Callable[[str], None],
        write: Callable[[Sequence[SampleRecord]], None] = lambda _: None,
    ) -> None:
        """`rewards` are process 0's, and None in others; `write` gets the samples of each rollout."""
        self._run, self._data = run, data
        self._feed, self._write, self._log = feed, write, log
        self._judge = Judge(tokenizer, data, rewards, reward_models, len(run.rl.rewards))
        self._frozen = _committed(frozen)
        dtype = compute_dtype(run.train, platform)
        is_exact = run.train.exact_rollouts
        self._sampler = Sampler(model, run.rl, tokenizer, dtype, trainable_spec, log, exact=is_exact)
        scorer = (run, model, platform, tokenizer, feed, trainable_spec, self._sampler.sampling)
        self._scorer = Scorer(*scorer)
        is_ppo = run.train.objective == "ppo"
        self._critic = Critic(run, model, platform, feed, trainable_spec) if is_ppo else None
        self._names = names_of(run.rl.rewards)
        self._prompts = data.train()
        self._arrays: packing.Arrays | None = None
        self._ahead: Callable[[], Rolled] | None = None  # sampled for the step after the present one
        self._metrics: dict[str, list[float]] = collections.defaultdict(list)

    @property
    def skipped(self) -> dict[str, int]:
        return dict(self._prompts.get_state()["skipped"])

    def next(self, state: TrainState, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of step `step`, counted from 0; samples first where that is due.

        Raises:
          DataError: if a prompt or a reward cannot be used.
        """
        trainable, rl, rows = _trained(state), self._run.rl, self._run.train.global_batch_size
        update, scored = step % rl.updates_per_rollout, None
        key = self._key(step - update)
        if update == 0:
            ahead, self._ahead = self._ahead, None
            rolled = (ahead or self._roll(trainable, key, step))()
            self._arrays, scored = rolled.arrays, None if ahead else rolled.scored
            self._measure(rolled.metrics)
            self._write(rolled.samples)
        assert self._arrays is not None
        part = update % rl.steps_per_generation
        batch = packing.parts(self._arrays, rows)[part]
        if self._run.train.exact_rollouts:
            found = scored[part] if scored else self._score(trainable, part, batch, key)
            batch["logprobs"] = np.where(batch["mask"] > 0, found.logprobs, 0).astype(np.float32)
        is_last = update + 1 == rl.updates_per_rollout
        if rl.overlap and is_last and step + 1 < self._run.train.steps:
            self._ahead = self._roll(trainable, self._key(step + 1), step + 1)
        return {name: self._local(x) for name, x in batch.items() if name != "index"}

    def first(self, trainable: Any) -> None:
        """Samples what the first step trains on."""
        self._write(self._roll(trainable, self._key(0), 0)().samples)

    def updated(self, seconds: float, metrics: StepMetrics) -> None:
        """Adds what an update measured, which took so many seconds."""
        assert metrics.policy is not None
        found = jax.device_get(metrics.policy)
        tokens = max(float(found.pop("tokens")), 1.0)
        if not self._run.rl.beta:
            found.pop("kl", None)
        self._measure({name: x.value if isinstance(x, Maximum) else x / tokens for name, x in found.items()})
        self._measure({"update_seconds": seconds, "update_tokens_per_second": tokens / seconds})

    def metrics(self) -> dict[str, float]:
        """The means of what was measured since the last call, and maxima of what ends in `_max`."""
        found, self._metrics = self._metrics, collections.defaultdict(list)
        return {
            name: float(max(values) if name.endswith("_max") else np.mean(values))
            for name, values in found.items()
        }

    def state(self) -> dict[str, Any]:
        """The position in the prompts, and the completions that are still trained on; JSON-serializable."""
        self._settle()
        arrays, ahead = None, None
        if jax.process_index() == 0:
            if self._arrays is not None and self._run.rl.updates_per_rollout > 1:
                arrays = arrays_as_text(self._arrays)
            ahead = None if self._ahead is None else self._ahead().state()
        return {"prompts": self._prompts.get_state(), "completions": arrays, "ahead": ahead}

    def restore(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Continues from the `state()` of every process.

        Raises:
          DataError: for the states of a run with another objective.
        """
        first = next(iter(states))
        if "prompts" not in first:
            raise DataError("the checkpoint's data state has no prompts; choose another train.run_dir")
        self._prompts.set_state(first["prompts"])
        if first["completions"]:
            self._arrays = arrays_of_text(first["completions"])
        if first.get("ahead"):
            rolled = Rolled.restore(first["ahead"])
            self._ahead = lambda: rolled

    def close(self) -> None:
        """Starts no reward function any more."""
        self._judge.close()

    def _settle(self) -> None:
        """Waits for the rewards of what was sampled ahead; if there are none, it is given up."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            rolled = ahead()
            self._ahead = lambda: rolled

    def evaluate(self, trainable: Any) -> dict[str, float]:
        """Rewards of one completion for each validation prompt, at `eval.temperature`.

        Returns:
          `eval_reward`, `eval_reward/NAME` of each function, `eval_completion_length`; nothing without
          validation prompts. At most `eval.batches` x `train.global_batch_size` prompts are used.
        """
        rows, longest = self._run.train.global_batch_size, self._run.rl.max_completion_length
        prompts = list(itertools.islice(self._data.validation(), self._run.eval.batches * rows))
        if not prompts:
            return {}
        self._settle()
        params, scores, lengths = self._sampler.params(trainable, self._frozen), [], []
        for start in range(0, len(prompts), rows):
            part = prompts[start : start + rows]
            filled = [*part, *([part[-1]] * (rows - len(part)))]
            sampled = self._sampler.sample(
                params,
                [prompt.ids for prompt in filled],
                jax.random.fold_in(jax.random.key(self._run.train.seed), start),
                copies=1,
                max_new_tokens=longest,
                temperature=self._run.eval.temperature,
            )
            kept = Sampled(*(x[: len(part)] for x in (sampled.tokens, sampled.lengths, sampled.logprobs)))
            scores.append(self._judge.start(part, kept, validation=True)().scores)
            lengths += kept.lengths.tolist()
        table = np.concatenate(scores)
        names = [f"eval_reward/{name}" for name in self._names]
        return {
            "eval_reward": float(self._total(table).mean()),
            **dict(zip(names, _means(table), strict=True)),
            "eval_completion_length": float(np.mean(lengths)),
        }

    def _total(self, scores: np.ndarray) -> np.ndarray:
        """The weighted sum f64 [N] of scores [N, F]; a function that does not apply, NaN, adds nothing."""
        return np.nansum(scores * np.array(self._run.rl.weights), axis=1)

    def _key(self, step: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self._run.train.seed), _KEY), step)

    def _local(self, values: np.ndarray) -> np.ndarray:
        """This process's rows of a batch."""
        count = len(values) // self._feed.num_shards
        return values[self._feed.shard * count :][:count]

    def _roll(self, trainable: Any, key: jax.Array, step: int) -> Callable[[], Rolled]:
        """Samples completions with these weights; the result waits for their rewards.

        All that takes these weights is computed here: they may be gone when the rewards are there.
        """
        run, rl = self._run, self._run.rl
        prompts, rows = self._next_prompts()
        sampled, measured = self._sample(trainable, prompts, rows, key)
        judged = self._judge.start(rows, sampled)
        arrays = packing.pack([row.ids for row in rows], sampled, run.train.seq_len)
        scored, values = self._add_logprobs(arrays, sampled, trainable, key, measured), None
        if self._critic is not None:
            local = [{name: self._local(x) for name, x in part.items()} for _, part in self._parts(arrays)]
            values = self._critic.evaluate(trainable, self._frozen, local)

        def finish() -> Rolled:
            scores, texts, seconds = judged()
            rewards = self._total(scores).reshape(-1, rl.num_generations)
            metrics = {
                **self._advantages(arrays, rewards, values, step),
                "reward": rewards.mean(),
                "reward_std": rewards.std(),
                **{f"reward/{n}": m for n, m in zip(self._names, _means(scores), strict=True)},
                **{f"reward_std/{n}": m for n, m in zip(self._names, _deviations(scores), strict=True)},
                "reward_seconds": seconds,
            }
            advantages = packing.gathered(arrays["advantages"], arrays, rl.max_completion_length)
            samples = [
                SampleRecord(
                    step=step + 1,
                    prompt=rows[row].prompt,
                    completion=texts[row],
                    rewards=dict(zip(self._names, scores[row].tolist(), strict=True)),
                    reward=float(rewards.reshape(-1)[row]),
                    advantages=tuple(advantages[row, : sampled.lengths[row]].tolist()),
                    prompt_ids=rows[row].ids,
                    completion_ids=tuple(sampled.tokens[row, : sampled.lengths[row]].tolist()),
                )
                for row in range(len(rows))
            ]
            return Rolled(arrays, measured | metrics, samples, scored)

        return finish

    def _add_logprobs(
        self,
        arrays: packing.Arrays,
        sampled: Sampled,
        trainable: Any,
        key: jax.Array,
        measured: dict[str, Any],
    ) -> list[Scored]:
        """Adds those of `RunConfig.logprob_arrays` that are known now; returns what was scored for them."""
        mask, rolled = arrays["mask"] > 0, packing.scattered(sampled.logprobs, arrays)
        if "rollout_logprobs" in self._run.logprob_arrays:
            arrays["rollout_logprobs"] = rolled.astype(np.float32)
            return []
        begin = time.perf_counter()
        scored = [self._score(trainable, *part, key) for part in self._parts(arrays)]
        measured["scoring_seconds"] = time.perf_counter() - begin
        plain, tempered = (np.concatenate([getattr(s, n) for s in scored]) for n in ("plain", "logprobs"))
        is_exact = self._run.train.exact_rollouts
        measured |= packing.mismatch(rolled, tempered if is_exact else plain, mask)
        arrays["old_logprobs"] = np.where(mask, rolled if is_exact else tempered, 0).astype(np.float32)
        return scored

    def _advantages(
        self, arrays: packing.Arrays, rewards: np.ndarray, values: tuple[Any, Any] | None, step: int
    ) -> dict[str, Any]:
        """Adds the advantages of completions with rewards f64 [P, n]; returns what is measured of them."""
        equal, place = equal_groups(rewards), f"step {step + 1}"
        if values is not None:
            if rewards.std() == 0:
                self._log(f"{place}: all rewards are equal; only values and the penalty are learned from")
            return add_advantages(arrays, rewards.reshape(-1), *values, self._run.rl)
        if equal.all():
            self._log(f"{place}: in each group of completions all rewards are equal; nothing is learned")
        advantages = group_advantages(rewards, self._run.rl.scale_rewards).reshape(-1, 1)
        arrays["advantages"] = np.where(arrays["mask"] > 0, advantages, 0).astype(np.float32)
        return {"groups_equal": equal.mean()}

    def _next_prompts(self) -> tuple[list[Any], list[Any]]:
        """The prompts of a rollout, and that of each of its completions."""
        rl = self._run.rl
        count = self._run.train.global_batch_size * rl.steps_per_generation
        prompts: list[Any] = [self._prompts.next_item()[2] for _ in range(count // rl.num_generations)]
        return prompts, [prompt for prompt in prompts for _ in range(rl.num_generations)]

    def _sample(
        self, trainable: Any, prompts: Sequence[Any], rows: Sequence[Any], key: jax.Array
    ) -> tuple[Sampled, dict[str, Any]]:
        """Completions, and what is measured of them."""
        run, longest, begin = self._run, self._run.rl.max_completion_length, time.perf_counter()
        params = self._sampler.params(trainable, self._frozen)
        copies = self._run.rl.num_generations
        ids = [prompt.ids for prompt in prompts]
        sampled = self._sampler.sample(params, ids, key, copies=copies, max_new_tokens=longest)
        measured: dict[str, Any] = {}

        def verify(sampled: Sampled) -> tuple[np.ndarray, np.ndarray]:
            arrays = packing.pack([row.ids for row in rows], sampled, run.train.seq_len)
            scored = [self._score(trainable, *part, key) for part in self._parts(arrays)]
            found = (np.concatenate([getattr(s, name) for s in scored]) for name in ("choices", "logprobs"))
            choices, logprobs = (packing.gathered(values, arrays, longest) for values in found)
            return choices, logprobs

        def resume(numbers: Sequence[int], begun: Sequence[Sequence[int]]) -> Sampled:
            keys = exact.keys_of_rows(key, numbers)
            given = [rows[r].ids for r in numbers]
            return self._sampler.resume(params, given, begun, keys, max_new_tokens=longest, most=len(rows))

        if run.train.exact_rollouts:
            end = lambda r, ids: self._sampler.end(rows[r].ids, ids)  # noqa: E731
            result = exact.settle(sampled, verify, resume, end)
            measured = {"rollout_passes": result.passes, "rollout_changed_tokens": result.changed}
            sampled = result.sampled
        seconds = time.perf_counter() - begin
        return sampled, measured | {
            "completion_length": sampled.lengths.mean(),
            "completion_length_max": sampled.lengths.max(),
            "truncated": 1 - np.mean(self._ended(rows, sampled)),
            "rollout_seconds": seconds,
            "rollout_tokens_per_second": sampled.lengths.sum() / seconds,
        }

    def _score(self, trainable: Any, part: int, batch: packing.Arrays, key: jax.Array) -> Scored:
        names = ("tokens", "segment_ids", "positions", "index")
        local = {name: self._local(batch[name]) for name in names}
        return self._scorer(trainable, self._frozen, local, key, part * len(batch["tokens"]))

    def _parts(self, arrays: packing.Arrays) -> Iterable[tuple[int, packing.Arrays]]:
        return enumerate(packing.parts(arrays, self._run.train.global_batch_size))

    def _ended(self, rows: Sequence[Any], sampled: Sampled) -> list[bool]:
        completions = zip(rows, sampled.tokens, sampled.lengths, strict=True)
        return [self._sampler.end(prompt.ids, ids[:n].tolist()) is not None for prompt, ids, n in completions]

    def _measure(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if not np.isnan(value):
                self._metrics[name].append(float(value))


def _trained(state: TrainState) -> Any:
    """The parameters that the optimizer updates, of which an EMA is none."""
    return _committed(state.params if state.moved is None else state.moved)


def _committed(params: Any) -> Any:
    """The same arrays, bound to their device as a compiled step returns them: else programs compile twice."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), params)


def _means(scores: np.ndarray) -> list[float]:
    """The mean of each function's scores [N, F], leaving NaN out; NaN if there are none."""
    return [
        float(np.mean(c)) if (c := column[~np.isnan(column)]).size else float("nan") for column in scores.T
    ]


def _deviations(scores: np.ndarray) -> list[float]:
    return [
        float(np.std(c)) if (c := column[~np.isnan(column)]).size else float("nan") for column in scores.T
    ]
