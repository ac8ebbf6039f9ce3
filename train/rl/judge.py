"""Rewards of completions: by functions in their own processes, and by models on the devices."""

from __future__ import annotations

import concurrent.futures
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.tokenizer import Tokenizer

from ..gather import gather_bytes
from .prompts import Prompt, PromptData
from .reward_models import RewardModels
from .rewards import Completions, RewardError, Rewards
from .sampler import Sampled


class Judged(NamedTuple):
    """Rewards of N completions.

    Attributes:
      scores: f64 [N, F], by each of `rl.rewards`; NaN where one does not apply.
      texts: the completions.
      seconds: what the functions took.
    """

    scores: np.ndarray
    texts: list[str]
    seconds: float


class Judge:
    """Rewards completions; every process of the run makes the same calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: PromptData,
        rewards: Rewards | None,
        models: RewardModels,
        count: int,
    ) -> None:
        """`rewards` are process 0's, and None in others; `count` is the number of `rl.rewards`."""
        self._tokenizer, self._data, self._count = tokenizer, data, count
        self._rewards, self._models = rewards, models
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def start(
        self, rows: Sequence[Prompt], sampled: Sampled, *, validation: bool = False
    ) -> Callable[[], Judged]:
        """Starts the functions, one call at a time; the result waits for them, and runs the models.

        It raises a `RewardError`, in every process, for a function that returns what is no reward, or fails
        on every example.
        """
        ids = [tokens[:n].tolist() for tokens, n in zip(sampled.tokens, sampled.lengths, strict=True)]
        texts = [self.text(prompt.ids, tokens) for prompt, tokens in zip(rows, ids, strict=True)]
        place_of = lambda i: self._data.place(rows[i], validation=validation)  # noqa: E731
        future: concurrent.futures.Future[tuple[Any, float]] | None = None
        if self._rewards is not None:
            completions = [
                text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(rows, texts, strict=True)
            ]
            names = dict.fromkeys(name for prompt in rows for name in prompt.columns)
            batch = Completions(
                prompts=[prompt.prompt for prompt in rows],
                completions=completions,
                completion_ids=ids,
                columns={name: [prompt.columns.get(name) for prompt in rows] for name in names},
                places=place_of,
            )
            future = self._thread.submit(self._call, batch)

        def result() -> Judged:
            answer = pickle.loads(gather_bytes(pickle.dumps(future and future.result()))[0])
            if isinstance(answer, str):
                raise RewardError(answer)
            functions = iter(answer[0].T)
            models = self._models(rows, texts, place_of)
            columns = [models[n] if n in models else next(functions) for n in range(self._count)]
            return Judged(np.stack(columns, axis=1), texts, answer[1])

        return result

    def text(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text of a completion, without end tokens."""
        decoder = self._tokenizer.stream()
        decoder.extend(prompt)
        eos = self._tokenizer.eos_ids
        return decoder.extend(token for token in tokens if token not in eos) + decoder.flush()

    def close(self) -> None:
        """Waits for the functions that have been started: their processes end after this."""
        self._thread.shutdown(cancel_futures=True)

    def _call(self, batch: Completions) -> Any:
        """The scores of the functions and the seconds that they took, or the message of their error."""
        assert self._rewards is not None
        begin = time.perf_counter()
        try:
            return self._rewards(batch), time.perf_counter() - begin
        except RewardError as error:
            return str(error)
