"""What is known of a run before its state exists."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import LlamaConfig
from llama_jax.tokenizer import Tokenizer
from llama_jax.weights.runs import StepMetadata

from .config.objective import REFERENCE_OBJECTIVES
from .config.run import RunConfig
from .data import Data, Peers, open_data
from .feed import Feed
from .gather import gather_bytes
from .initialization import load_initial_params, load_reference, weights_fingerprint
from .provenance import place_of, provenance
from .rl.prompts import PromptData
from .state import split_params
from .trainable import Frozen, TrainableSpec


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything about a run that is known before its state exists.

    Attributes:
      run: the configuration.
      run_dir: the run's directory.
      platform: such as `cpu`, `gpu` or `tpu`.
      mesh: the device mesh; None for a single device.
      feed: transfers batches to the devices.
      tokenizer: the run's tokenizer.
      model: the model's configuration.
      trainable_spec: which parameters are trained.
      teacher: the configuration of the teacher; None without one.
      data: the training and validation data.
      is_primary: whether this is process 0, which writes files and logs.
      log: prints a line on stderr; does nothing in other processes.
      given: the configuration as it was given; in `run`, files that moved are where they are now.
      started: the record of the run's newest checkpoint; None if it has none.
    """

    run: RunConfig
    run_dir: Path
    platform: str
    mesh: Mesh | None
    feed: Feed
    tokenizer: Tokenizer
    model: LlamaConfig
    trainable_spec: TrainableSpec
    teacher: LlamaConfig | None
    data: Data | PromptData
    is_primary: bool
    log: Callable[[str], None]
    given: RunConfig
    started: StepMetadata | None

    @functools.cached_property
    def base(self) -> str | None:
        """The fingerprint of the frozen or reference weights; None if the run has none or they are random."""
        run, objective = self.run, self.run.train.objective
        is_reference = objective in REFERENCE_OBJECTIVES or self.run.has_reference
        if not run.model.init_from or not (is_reference or self.trainable_spec.adapter is not None):
            return None
        place = place_of(self.given, self.run_dir, self.started, "model.init_from")
        if place is None and self.started is not None:  # a run of all weights reads them no more
            return self.started.run.get("base")
        return weights_fingerprint(run.model.init_from)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """What is recorded in checkpoints, and compared when the run is resumed."""
        return provenance(
            self.given,
            self.run_dir,
            self.started,
            data=self.data.fingerprint,
            model=self.model,
            spec=self.trainable_spec,
            base=self.base,
            base_model=self.run.model.init_from,
            teacher=None if self.teacher is None else weights_fingerprint(self.run.distillation.teacher),
            value_model=self._value_fingerprint(),
        )

    def _value_fingerprint(self) -> str | None:
        """Of a value model with an adapter, whose frozen weights every start reads; None for any other."""
        if self.trainable_spec.value_model is None or self.trainable_spec.adapter is None:
            return None
        return weights_fingerprint(self.run.rl.value_model)

    def load_pretrained(self) -> Any:
        """The weights of `model.init_from`, None if they start random, with those of a value model."""
        return load_initial_params(self.run, self.mesh, self.trainable_spec)

    def with_reference(self, frozen: Frozen) -> Frozen:
        """The frozen parameters with those of `rl.reference`, if it is set."""
        if not self.trainable_spec.other_reference:
            return frozen
        reference = load_reference(self.run, self.model, self.mesh)
        return self.trainable_spec.with_reference(frozen, reference)

    def split_initial_params(self) -> tuple[Any, Frozen]:
        """The initial trainable and frozen parameters."""
        params = self.load_pretrained()
        return split_params(self.model, self.run.train.seed, params, self.trainable_spec)


def open_run_data(run: RunConfig, tokenizer: Tokenizer, *, shard: int, num_shards: int) -> Data | PromptData:
    """Opens the data that an objective trains on; this process reads shard `shard` of `num_shards`."""
    if run.samples:
        return PromptData(run, tokenizer)
    return open_data(
        run.data,
        tokenizer,
        objective=run.data_objective,
        seq_len=run.train.seq_len,
        batch_size=run.train.global_batch_size,
        seed=run.train.seed,
        process_index=shard,
        process_count=num_shards,
        peers=Peers(jax.process_index(), jax.process_count(), gather_bytes),
    )
