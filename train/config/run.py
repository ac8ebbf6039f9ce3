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
from .objective import REFERENCE_OBJECTIVES, RL_OBJECTIVES, Objective
from .optimizer import OptimizerConfig
from .preference import PreferenceConfig
from .rl import RLConfig
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
    "RLConfig",
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
    rl: RLConfig = dataclasses.field(default_factory=RLConfig)
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
        if self.samples:
            self._check_rl()
        if self.train.exact_rollouts and self.train.objective not in RL_OBJECTIVES:
            raise ConfigError(
                f'train.exact_rollouts is true and train.objective "{self.train.objective}", whose loss has '
                'no ratio; it applies to "grpo" and "ppo": leave it out'
            )

    @property
    def samples(self) -> bool:
        """Whether the run trains on completions that the model samples."""
        return self.train.objective in RL_OBJECTIVES or self.distillation.on_policy

    @property
    def runs_reference(self) -> bool:
        """Whether each step runs the reference model, the initial parameters, beside the trained one."""
        return self.has_reference and self.train.objective != "ppo"  # which runs it after sampling

    @property
    def has_reference(self) -> bool:
        """Whether the run keeps the reference model in memory."""
        if self.train.objective in RL_OBJECTIVES:
            return self.rl.beta > 0
        return self.train.objective in REFERENCE_OBJECTIVES and not self.preference.precompute_ref_log_probs

    @property
    def logprob_arrays(self) -> tuple[str, ...]:
        """The log-probabilities of completions that a batch carries.

        `old_logprobs`: by the trainer's weights at sampling, of a forward pass of their own; and with
        `train.exact_rollouts` `logprobs`, the present ones by the same program. Where each completion is
        trained on once, by the weights that sampled it, the update's own forward pass tells the old ones, and
        `rollout_logprobs`, those of decoding, are there to be compared with it.
        """
        if self.train.exact_rollouts:
            return ("old_logprobs", "logprobs")
        once = self.rl.updates_per_rollout == 1 and not self.rl.overlap
        return ("rollout_logprobs",) if self.train.objective == "grpo" and once else ("old_logprobs",)

    @property
    def data_objective(self) -> Objective:
        """The objective whose record formats and batches the run reads."""
        return self.distillation.data if self.train.objective == "distill" else self.train.objective

    def _check_rl(self) -> None:
        """Checks the settings of reinforcement learning against each other."""
        train, rl, name = self.train, self.rl, f'train.objective is "{self.train.objective}"'
        rl.check_objective(train.objective)
        if train.objective in RL_OBJECTIVES and not rl.rewards:
            raise ConfigError(
                f'{name} and rl.rewards is not set; name reward functions, such as "exact_match" or '
                '"package.module:function"'
            )
        if train.objective == "grpo" and rl.num_generations < 2:
            raise ConfigError(
                f"{name} and rl.num_generations {rl.num_generations}; an advantage is relative to the others "
                "of a group: give at least 2"
            )
        if train.global_batch_size % rl.num_generations:
            raise ConfigError(
                f"train.global_batch_size {train.global_batch_size} is not a multiple of rl.num_generations "
                f"{rl.num_generations}; a batch has whole groups: set it to "
                f"{-(-train.global_batch_size // rl.num_generations) * rl.num_generations}"
            )
        if rl.max_completion_length >= train.seq_len:
            raise ConfigError(
                f"rl.max_completion_length is {rl.max_completion_length} and train.seq_len {train.seq_len}, "
                "which a prompt and its completion share: raise train.seq_len"
            )
        if train.quantization != "none":
            raise ConfigError(
                f'{name} and train.quantization "{train.quantization}", which decoding does not compute: '
                "leave it out"
            )
        if self.data.too_long == "truncate":
            raise ConfigError(
                f'{name} and data.too_long "truncate"; a prompt that is cut asks something else: use "drop" '
                'or "fail"'
            )
        if self.eval.patience:
            raise ConfigError(
                f"{name} and eval.patience {self.eval.patience}, which follows eval_loss: leave it out"
            )
