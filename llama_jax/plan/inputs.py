"""What the cost of a training step depends on: the input of the arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.topology import Topology


def check_experts(model: LlamaConfig, mesh: Mapping[str, int]) -> None:
    """Checks that the axis `expert` divides the experts.

    Raises:
      ConfigError: naming both.
    """
    if model.num_experts % mesh.get("expert", 1):
        raise ConfigError(
            f"num_experts {model.num_experts} does not divide over mesh.expert {mesh['expert']}"
        )


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """A training step, as far as its cost goes.

    Attributes:
      model: of which the step trains all weights, or an adapter.
      topology: the slices.
      mesh: sizes of the axes `data`, `fsdp`, `context` and `tensor`, and `expert` if it is above 1, whose
        product is the number of devices.
      global_batch_size: sequences a step.
      seq_len: T, tokens a sequence.
      steps: of the whole run.
      accumulation: microbatches a step.
      remat: a policy of `memory.SAVED`.
      loss_chunks: chunks of T in which logits are computed.
      compute_bytes: of a number in activations and products: 2 in bfloat16.
      quantization: of the layers' products: `none`, `int8` or `fp8`.
      optimizer_bytes: of optimizer state per trained parameter; 8 with AdamW.
      gradient_bytes: of a gradient summed over `data`, scales included; below 2, what is left out is kept.
      trained: number of trained parameters if the base is frozen; None: all.
      base_bytes: of a frozen base weight, scales included; of its gathered form too.
      reference: whether a reference model runs forward in each step.
      reference_bytes: of a reference weight that the step holds beside the trained ones; 0 if it is the base.
      ema: whether the state has a moving average of the trained parameters too.
      attention_backward: products of attention's backward kernels, of steps that had two of them: 7; 0: of
        `ops.splash_gradient`.
      value_model: a second network that is trained in each step, with a head and without output projection:
        the value function of PPO; None without one.
      value_trained: number of its trained parameters if its base is frozen; None: all.
      beside: networks that stay in memory in the compute dtype and have no part in the step: reward models.
      teacher: a network that runs forward in each step, in the compute dtype: of a distillation.
      scoped_vmem_kib: the compiler's `xla_tpu_scoped_vmem_limit_kib`; 0: its default.

    Raises:
      ConfigError: for a mesh of another number of chips, or a batch, length or model that it does not divide.
    """

    model: LlamaConfig
    topology: Topology
    mesh: Mapping[str, int]
    global_batch_size: int
    seq_len: int
    steps: int = 1
    accumulation: int = 1
    remat: str = "full"
    loss_chunks: int = 8
    compute_bytes: float = 2.0
    quantization: str = "none"
    optimizer_bytes: float = 8.0
    gradient_bytes: float = 4.0
    trained: int | None = None
    base_bytes: float = 2.0
    reference: bool = False
    reference_bytes: float = 0.0
    ema: bool = False
    attention_backward: int = 0
    value_model: LlamaConfig | None = None
    value_trained: int | None = None
    teacher: LlamaConfig | None = None
    beside: tuple[LlamaConfig, ...] = ()
    scoped_vmem_kib: int = 0

    def __post_init__(self) -> None:
        chip = CHIPS.get(self.topology.kind)
        if chip is None:
            raise ConfigError(f"chip {self.topology.kind!r} is unknown; plan for {', '.join(CHIPS)}")
        check_experts(self.model, self.mesh)
        if math.prod(self.mesh.values()) != self.topology.chips * chip.devices:
            shape = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
            raise ConfigError(f"mesh {shape} is not the {self.topology.chips} chips of {self.topology.name}")
        if self.global_batch_size % (self.accumulation * self.batch_shards):
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} does not divide into "
                f"{self.accumulation} microbatches over data x fsdp{' x expert' * (self.expert > 1)} of size "
                f"{self.batch_shards}"
            )
        for axes, dimensions in self._sharded().items():
            shards = math.prod(self.mesh.get(axis, 1) for axis in axes)
            for name, size in dimensions.items():
                if size % shards:
                    raise ConfigError(f"{name} {size} does not divide over mesh.{' x '.join(axes)} {shards}")
        context = self.mesh["context"]
        if context > 1 and self.seq_len % (2 * context):
            raise ConfigError(
                f"train.seq_len {self.seq_len} is not a multiple of twice mesh.context {context}"
            )
        if self.mesh["data"] % self.topology.slices:
            raise ConfigError(
                f"mesh.data is {self.mesh['data']}, which is not a multiple of {self.topology.slices} slices"
            )

    def _sharded(self) -> dict[tuple[str, ...], dict[str, int]]:
        """The dimensions that each axis divides, as in `sharding.check_mesh`."""
        names = ("vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        return {
            ("fsdp", *("expert",) * (self.expert > 1), "context"): {"hidden_size": self.model.hidden_size},
            ("tensor",): {name: getattr(self.model, name) for name in names},
        }

    @property
    def of_value_model(self) -> StepInputs | None:
        """The part of the step that trains the value model; None without one."""
        if self.value_model is None:
            return None
        return dataclasses.replace(
            self,
            model=self.value_model,
            trained=self.value_trained,
            reference=False,
            reference_bytes=0.0,
            value_model=None,
            beside=(),
        )

    @property
    def of_teacher(self) -> StepInputs | None:
        """A step that trains the teacher, whose forward pass is a part of this one; None without one."""
        if self.teacher is None:
            return None
        return dataclasses.replace(
            self,
            model=self.teacher,
            remat="full",
            trained=None,
            reference=False,
            reference_bytes=0.0,
            ema=False,
            teacher=None,
            beside=(),
        )

    @property
    def batch_shards(self) -> int:
        """The number of devices that have batch rows of their own."""
        return self.mesh["data"] * self.mesh["fsdp"] * self.expert

    @property
    def expert(self) -> int:
        """The size of the axis `expert`."""
        return self.mesh.get("expert", 1)

    @property
    def has_residual(self) -> bool:
        """Whether the state has what the sum of gradients over `data` left out."""
        return self.gradient_bytes < 2 and self.mesh["data"] > 1

    @property
    def gathered_bytes(self) -> float:
        """Of a weight of a layer, as `fsdp` and `context` gather it."""
        if self.quantization != "none":
            return 1.0
        return self.base_bytes if self.frozen else self.compute_bytes

    @property
    def frozen(self) -> bool:
        """Whether only an adapter is trained."""
        return self.trained is not None

    @property
    def micro_rows(self) -> int:
        """Sequences, or parts of them under `context`, of a device in a microbatch."""
        return self.global_batch_size // self.accumulation // self.batch_shards

    @property
    def micro_tokens(self) -> float:
        """Tokens of a device in a microbatch."""
        return self.micro_rows * self.seq_len / self.mesh["context"]

    @property
    def tokens(self) -> int:
        """Tokens of a step, of all devices."""
        return self.global_batch_size * self.seq_len
