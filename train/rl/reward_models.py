"""Rewards of reward models: runs with `train.objective = "reward"`, beside the policy in the same mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llama_jax.errors import ConfigError, InputError

from ..config.rl import RLConfig, model_of
from ..scorer import Scorer
from .prompts import Prompt


class RewardModels:
    """The reward models among `rl.rewards`; every process of the run makes the same calls.

    Attributes:
      places: where they are in `rl.rewards`.
    """

    def __init__(
        self,
        config: RLConfig,
        log: Callable[[str], None],
        *,
        dtype: str,
        template: str = "",
        mesh: Mesh | None = None,
    ) -> None:
        """Loads them, sharded over the mesh, in a compute dtype; `template` is for those that have none.

        Raises:
          ConfigError: for a model that is no reward model.
          LlamaJaxError: if one cannot be read.
        """
        self._config, self._log = config, log
        self._scorers: dict[int, Scorer] = {}
        for place, spec in enumerate(config.rewards):
            if (path := model_of(spec)) is not None:
                scorer = self._scorers[place] = Scorer.load(path, dtype, template=template, mesh=mesh)
                if scorer.objective != "reward":
                    raise ConfigError(
                        f"rl.rewards: {spec!r} was trained to {scorer.objective}; give a run with "
                        'train.objective = "reward"'
                    )

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(self._scorers)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], place_of: Callable[[int], str]
    ) -> dict[int, np.ndarray]:
        """The rewards f64 [N] of each model, by its place in `rl.rewards`.

        A completion that a model cannot read, as it is too long for it, gets `rl.failed_reward` and is named.
        """
        inputs = [_input(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        found = {}
        for place, scorer in self._scorers.items():
            try:
                found[place] = scorer.scores(inputs)[:, 0].astype(np.float64)
            except InputError:
                found[place] = np.array(
                    [self._alone(place, i, one, place_of) for i, one in enumerate(inputs)]
                )
        return found

    def _alone(self, place: int, index: int, one: Any, place_of: Callable[[int], str]) -> float:
        try:
            return float(self._scorers[place].scores([one])[0, 0])
        except InputError as error:
            why = str(error).partition(": ")[2]
            self._log(
                f"{place_of(index)}: the reward model {self._config.rewards[place]!r} cannot read the "
                f"completion ({why}); scored {self._config.failed_reward:g} (rl.failed_reward)"
            )
            return self._config.failed_reward


def _input(prompt: Prompt, completion: str) -> Any:
    """A text with its prompt, or a conversation with the answer, as a `Scorer` takes them."""
    if isinstance(prompt.prompt, str):
        return prompt.prompt, completion
    return [*prompt.prompt, {"role": "assistant", "content": completion}]
