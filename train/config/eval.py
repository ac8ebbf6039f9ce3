"""`[eval]`: evaluation on the validation set, sampled text, and early stopping."""

from __future__ import annotations

import dataclasses

from llama_jax.errors import ConfigError

from .checks import check_at_least


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When to evaluate and to sample text during training, and when to stop early.

    Attributes:
      every: steps between evaluations; 0 evaluates at the end only. Without a validation set there are none.
      batches: maximum number of batches per evaluation.
      sample_every: steps between sampled texts; 0 samples at the end only.
      prompt, max_new_tokens, temperature: of the sampled text.
      patience: stop after this many evaluations in a row without an eval_loss at least `min_improvement`
        below the lowest before; 0 never stops early.
      min_improvement: the smallest decrease of eval_loss that counts as an improvement, in nats.

    Raises:
      ConfigError: for a value out of range, or patience without regular evaluations.
    """

    every: int = 500
    batches: int = 20
    sample_every: int = 0
    prompt: str = ""
    max_new_tokens: int = 64
    temperature: float = 0.0
    patience: int = 0
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("eval", self, every=0, batches=1, sample_every=0, max_new_tokens=0, temperature=0)
        check_at_least("eval", self, patience=0, min_improvement=0)
        if self.patience and not self.every:
            raise ConfigError(
                f"eval.patience is {self.patience} and eval.every is 0; set eval.every, the steps between "
                "evaluations"
            )
