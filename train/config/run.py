"""`RunConfig`: all sections of a run's TOML file, and the rules between sections."""

from __future__ import annotations

import dataclasses

from llama_jax.errors import ConfigError

from .adapter import AdapterConfig
from .checkpoint import CheckpointConfig
from .data import DataConfig
from .distillation import DistillationConfig
from .distributed import DistributedConfig
from .eval import EvalConfig
from .log import LogConfig
from .mesh import MeshConfig
from .model import ModelConfig
from .objective import Objective
from .optimizer import OptimizerConfig
from .preference import PreferenceConfig
from .tokenizer import TokenizerConfig
from .train import TrainConfig

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistillationConfig",
    "DistributedConfig",
    "EvalConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferenceConfig",
    "RunConfig",
    "TokenizerConfig",
    "TrainConfig",
]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The configuration of a run; each attribute is a section of the TOML file.

    Raises:
      ConfigError: for settings of different sections that contradict each other.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=lambda: TokenizerConfig(vocab_size=4096))
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        if self.adapter.type != "none" and not self.model.init_from:
            raise ConfigError(
                f'adapter.type is "{self.adapter.type}" and model.init_from is not set; an adapter needs '
                "the weights of a base model"
            )
        if self.adapter.type == "prefix" and self.train.attention in ("splash", "cudnn"):
            raise ConfigError(
                f'train.attention is "{self.train.attention}", which does not support a prefix '
                '(adapter.type); use "auto" or "blockwise"'
            )
        if self.train.neftune_alpha and self.train.objective not in ("pretrain", "sft"):
            raise ConfigError(
                f"train.neftune_alpha is {self.train.neftune_alpha} and train.objective "
                f'"{self.train.objective}"; NEFTune applies to "sft": leave it out'
            )
        if self.train.quantization != "none" and (self.adapter.base in ("int8", "nf4") or self.adapter.dora):
            setting = "dora is true" if self.adapter.dora else f'base is "{self.adapter.base}"'
            raise ConfigError(
                f'train.quantization is "{self.train.quantization}" and adapter.{setting}; these products '
                "are of unquantized weights, or of LoRA's: leave one of them out"
            )
        self.preference.check_objective(self.train.objective)
        self.distillation.check_objective(self.train.objective)
        if self.train.objective == "distill" and not self.model.init_from and not self.tokenizer.path:
            raise ConfigError(
                'train.objective is "distill" and neither model.init_from nor tokenizer.path is set; student '
                f"and teacher share a vocabulary: set tokenizer.path to {self.distillation.teacher!r}"
            )
        if self.train.objective == "classify" and not self.data.labels:
            raise ConfigError(
                'train.objective is "classify" and data.labels is not set; list the names of the classes'
            )

    @property
    def data_objective(self) -> Objective:
        """The objective whose record formats and batches the run reads."""
        return self.distillation.data if self.train.objective == "distill" else self.train.objective
