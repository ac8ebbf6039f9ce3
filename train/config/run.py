"""What a run is: one frozen, checked dataclass a section of its TOML file.

`read_config.py` makes a `RunConfig` of a file and of `--section.key VALUE` words; nothing else reads files.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from llama_jax.attention import Backend
from llama_jax.errors import ConfigError
from llama_jax.model import Remat

from .checkpoint import CheckpointConfig
from .checks import at_least, one_of
from .data import DataConfig
from .finetune import AdapterConfig, PreferenceConfig
from .model import ModelConfig, TokenizerConfig
from .objective import Objective
from .optimizer import OptimizerConfig

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
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

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what is computed how.

    Attributes:
      objective: `pretrain`; `sft` on prompts and answers; on pairs of answers `dpo`, or `reward` for a
        reward model; `classify` or `regress` by a head on the last token.
      steps: optimizer steps in all, those before a resumption included.
      run_dir: where everything goes; the same directory again resumes the run.
      seed: of the initial weights, the data's order and the sampled text.
      global_batch_size: sequences a step, over all devices and processes.
      seq_len: tokens a sequence, T.
      gradient_accumulation_steps: microbatches that a step's batch is cut into; memory for activations shrinks with it.
      dtype: compute dtype (parameters are f32); `auto` is bfloat16 on accelerators and on CPUs with
        bf16 instructions.
      attention: backend; `auto` is `splash` on a TPU and `blockwise` elsewhere.
      remat: what the backward pass keeps of each layer, see `llama_jax.forward`.
      loss_chunks: in how many pieces of a sequence the logits are formed.
      z_loss: weight of log^2 Z, 0 for none (PaLM used 1e-4).
      neftune_alpha: noise on the embeddings in training, uniform within alpha / sqrt(seq_len x hidden_size)
        (NEFTune, arXiv 2310.05914, which used 5 to 15); 0 for none.
      max_bad_steps: consecutive steps with a non-finite loss or gradient before the run aborts; such a
        step changes nothing.
      profile_at, profile_steps: the step at which a profiler trace of so many steps is taken; 0 for none.
    """

    objective: Objective = "pretrain"
    steps: int = 1000
    run_dir: str = "runs/run"
    seed: int = 0
    global_batch_size: int = 8
    seq_len: int = 512
    gradient_accumulation_steps: int = 1
    dtype: Dtype = "auto"
    attention: Backend | Literal["auto"] = "auto"
    remat: Remat = "full"
    loss_chunks: int = 8
    z_loss: float = 0.0
    neftune_alpha: float = 0.0
    max_bad_steps: int = 5
    profile_at: int = 0
    profile_steps: int = 3

    def __post_init__(self) -> None:
        at_least(
            "train",
            self,
            steps=1,
            global_batch_size=1,
            seq_len=2,
            gradient_accumulation_steps=1,
            loss_chunks=1,
        )
        at_least("train", self, max_bad_steps=1, profile_at=0, profile_steps=1, z_loss=0, neftune_alpha=0)
        one_of("train.objective", self.objective, get_args(Objective))
        one_of("train.dtype", self.dtype, get_args(Dtype))
        one_of("train.attention", self.attention, ("auto", *get_args(Backend)))
        one_of("train.remat", self.remat, get_args(Remat))
        if not self.run_dir:
            raise ConfigError("train.run_dir is empty; give the folder that the run goes to")
        if "://" in self.run_dir:
            raise ConfigError(
                f"train.run_dir is {self.run_dir!r}; it must be a folder: mount the bucket and give its path"
            )
        if self.steps >= 1 << 31:
            raise ConfigError(
                f"train.steps is {self.steps}; it must be below 2^31, which a step counter holds"
            )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"train.seed is {self.seed}; it must fit 64 bits")
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of train.gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}; the microbatches of a step are of one size"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; see `llama_jax.sharding` for the axes.

    Attributes:
      data, fsdp, context, tensor: sizes; one may be -1, what is left.
      slices: pod slices joined by a data-centre network; they divide the `data` axis.
      topology: the slice that the file is written for, such as `v5p:4x4x4`: what
        `benchmarks/tpu_compile.py` compiles for. Training does not read it.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    slices: int = 1
    topology: str = ""

    def __post_init__(self) -> None:
        at_least("mesh", self, slices=1)
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "context", "tensor")}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{name} is {size}; it must be at least 1, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            free = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
            raise ConfigError(f"{' and '.join(free)} are both -1; only one can take what is left")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out loss and sampled text along the way.

    Attributes:
      every: steps between evaluations; 0 is at the end only. There is none where nothing is held out.
      batches: the most batches that one evaluation reads.
      sample_every: steps between sampled texts; 0 is at the end only.
      prompt, max_new_tokens, temperature: of the sampled text.
      patience: the run ends early after so many evaluations in a row without a held-out loss lower than the
        lowest by `min_improvement`; 0 is never.
      min_improvement: what counts as lower, nats.
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
        at_least("eval", self, every=0, batches=1, sample_every=0, max_new_tokens=0, temperature=0)
        at_least("eval", self, patience=0, min_improvement=0)
        if self.patience and not self.every:
            raise ConfigError(
                f"eval.patience is {self.patience} and eval.every is 0: set the steps between evaluations"
            )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is told, and to whom.

    Attributes:
      every: steps between lines of `metrics.jsonl`; each line is about the steps since the last.
      tensorboard: also write TensorBoard event files, to `tensorboard/` in the run directory.
      wandb: a Weights & Biases project to report to (needs the `wandb` extra); empty for none.
      plot: draw `loss.png` in the run directory at the end (needs the `plot` extra).
    """

    every: int = 10
    tensorboard: bool = True
    wandb: str = ""
    plot: bool = True

    def __post_init__(self) -> None:
        at_least("log", self, every=1)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How processes find one another. On TPU, Slurm, Open MPI and Kubernetes nothing need be given.

    Attributes:
      coordinator: host:port of process 0; empty to detect.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      heartbeat_seconds: how long a process may be silent before the others give up.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    heartbeat_seconds: int = 100

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.num_processes > 0, self.process_id >= 0)
        if any(given) and not all(given):
            raise ConfigError(
                "distributed.coordinator, distributed.num_processes and distributed.process_id go together; "
                "give all three, or none to detect them"
            )
        if self.num_processes and self.process_id >= self.num_processes:
            raise ConfigError(
                f"distributed.process_id is {self.process_id}; of {self.num_processes} processes the last is "
                f"{self.num_processes - 1}"
            )
        at_least("distributed", self, heartbeat_seconds=1)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run, one attribute a section of the TOML file."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=lambda: TokenizerConfig(vocab_size=4096))
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        if self.adapter.type != "none" and not self.model.init_from:
            raise ConfigError(
                f'adapter.type is "{self.adapter.type}" and model.init_from is not given: an adapter needs '
                "the weights of a model to sit on"
            )
        if self.adapter.type == "prefix" and self.train.attention == "splash":
            raise ConfigError(
                'train.attention is "splash", which takes no prefix (adapter.type); use "auto" or "blockwise"'
            )
        if self.train.neftune_alpha and self.train.objective not in ("pretrain", "sft"):
            raise ConfigError(
                f"train.neftune_alpha is {self.train.neftune_alpha} and train.objective "
                f'"{self.train.objective}"; the noise is for "sft"'
            )
        if self.preference.precompute_ref_log_probs and self.train.objective != "dpo":
            raise ConfigError(
                f'preference.precompute_ref_log_probs is true and train.objective "{self.train.objective}", which '
                'has no reference model; it is for "dpo": leave it out'
            )
        if self.train.objective == "classify" and not self.data.labels:
            raise ConfigError(
                'train.objective is "classify" and data.labels is not given; list the names of the classes'
            )
