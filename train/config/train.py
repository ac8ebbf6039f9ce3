"""`[train]`: objective, length, batch size and how a step is computed."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from llama_jax.attention import Backend
from llama_jax.errors import ConfigError
from llama_jax.ops.eight_bits import Scales
from llama_jax.ops.remat import Remat
from llama_jax.storage import as_path

from .checks import check_at_least, check_one_of
from .objective import Objective

Dtype = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["none", "int8", "fp8"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The objective, the number of steps, the batch, and the precision and memory settings of a step.

    Attributes:
      objective: `pretrain`; `sft` on prompts and answers; on pairs of answers `dpo`, `simpo` or `orpo`, or
        `reward` for a reward model; `kto` on answers labeled true or false; `distill` from a teacher;
        `classify` or `regress` with a head on the last token; `grpo` on completions that are sampled and
        rewarded.
      steps: total number of optimizer steps, including those before the run was resumed.
      run_dir: the run's output directory; the same directory again resumes the run.
      seed: of the initial weights, the data order and the sampled text.
      global_batch_size: sequences per step, over all devices and processes.
      seq_len: tokens per sequence, T.
      gradient_accumulation_steps: microbatches per step; more of them reduce activation memory.
      dtype: compute dtype (parameters are f32); `auto` is bfloat16 on accelerators and on CPUs with
        bf16 instructions.
      quantization: dtype of the layers' products, forward and backward; the rest of the step keeps `dtype`.
      quantization_scales: of a product's operands, one for each row (`channel`) or one for all (`tensor`).
      stochastic_rounding: of quantized gradients, in place of rounding to nearest.
      quantization_emulated: allow fp8 on chips without units for it, where it is slower than bfloat16.
      attention: attention backend; `auto` is `splash` on TPU, `cudnn` on NVIDIA GPUs where cuDNN supports the
        run, and `blockwise` elsewhere.
      remat: rematerialization policy: which activations of a layer are saved for the backward pass; see
        `llama_jax.forward`.
      loss_chunks: number of sequence chunks in which the logits are computed.
      z_loss: weight of log^2 Z, 0 for none (PaLM used 1e-4).
      router_aux_loss_coef: of a mixture of experts, weight of the load-balancing loss (Switch Transformer,
        arXiv 2101.03961; Mixtral 8x7B's config.json has 0.02).
      router_z_loss_coef: likewise, of the router z-loss (ST-MoE, arXiv 2202.08906, which used 1e-3).
      neftune_alpha: noise on the embeddings in training, uniform within alpha / sqrt(length of the example x
        hidden_size) (NEFTune, arXiv 2310.05914, which used 5 to 15); 0 for none.
      exact_rollouts: in reinforcement learning, sample with the very log-probabilities that the trainer
        computes, bit for bit: see docs/rl.md.
      max_bad_steps: consecutive steps with a non-finite loss or gradient after which the run aborts; such
        steps are skipped: they update nothing.
      profile_at, profile_steps: first step and number of steps of a profiler trace; profile_at 0 for none.

    Raises:
      ConfigError: for an invalid value.
    """

    objective: Objective = "pretrain"
    steps: int = 1000
    run_dir: str = "runs/run"
    seed: int = 0
    global_batch_size: int = 8
    seq_len: int = 512
    gradient_accumulation_steps: int = 1
    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    quantization_scales: Scales = "channel"
    stochastic_rounding: bool = False
    quantization_emulated: bool = False
    attention: Backend | Literal["auto"] = "auto"
    remat: Remat = "full"
    loss_chunks: int = 8
    z_loss: float = 0.0
    router_aux_loss_coef: float = 0.02
    router_z_loss_coef: float = 0.0
    neftune_alpha: float = 0.0
    exact_rollouts: bool = False
    max_bad_steps: int = 5
    profile_at: int = 0
    profile_steps: int = 3

    def __post_init__(self) -> None:
        check_at_least("train", self, steps=1, global_batch_size=1, seq_len=2, gradient_accumulation_steps=1)
        check_at_least("train", self, loss_chunks=1, max_bad_steps=1, profile_at=0, profile_steps=1)
        check_at_least("train", self, z_loss=0, neftune_alpha=0)
        check_at_least("train", self, router_aux_loss_coef=0, router_z_loss_coef=0)
        check_one_of("train.objective", self.objective, get_args(Objective))
        check_one_of("train.dtype", self.dtype, get_args(Dtype))
        check_one_of("train.quantization", self.quantization, get_args(Quantization))
        check_one_of("train.quantization_scales", self.quantization_scales, get_args(Scales))
        check_one_of("train.attention", self.attention, ("auto", *get_args(Backend)))
        check_one_of("train.remat", self.remat, get_args(Remat))
        if self.stochastic_rounding and self.quantization == "none":
            raise ConfigError(
                'train.stochastic_rounding is true and train.quantization is "none"; it rounds gradients of '
                '"int8" or "fp8"'
            )
        if self.quantization_scales != "channel" and self.quantization == "none":
            raise ConfigError(
                f'train.quantization_scales is "{self.quantization_scales}" and train.quantization is '
                '"none"; they are of "int8" or "fp8"'
            )
        if not self.run_dir:
            raise ConfigError("train.run_dir is empty; give the run's output directory")
        as_path(self.run_dir)  # or the error of an address that is none
        if self.steps >= 1 << 31:
            raise ConfigError(
                f"train.steps is {self.steps}; it must be below 2^31: the step counter is int32"
            )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"train.seed is {self.seed}; it must fit 64 bits")
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of "
                f"train.gradient_accumulation_steps {self.gradient_accumulation_steps}; all microbatches of "
                "a step have the same size"
            )
