"""What a training step costs: the result of every way to plan one, compiled or by arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Source = Literal["compiled", "arithmetic"]
Bound = Literal["mxu", "hbm", "ici", "dcn", "latency"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one chip, in bytes. The parts need not add up to the peak: not all exist when it is reached.

    Attributes:
      parameters: this chip's shards of the parameters.
      optimizer: the optimizer's state, and counters.
      gradients: accumulated gradients.
      activations: what the backward pass keeps from the forward pass.
      logits: logits of one chunk of the loss, and their gradient.
      temporaries: everything else at the peak: gathered weights, working memory.
      peak: the most that is in use at one time.
      capacity: what the compiler may use.
    """

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    temporaries: float
    peak: float
    capacity: float

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step's computation, on one chip.

    Attributes:
      name: such as `feed-forward products` or `attention kernels`.
      seconds: a step.
      flops: computed in a step, recomputation included; 0 where it is not counted.
      hbm_bytes: read and written; 0 where it is not counted.
      bound: the roofline that its time comes from.
    """

    name: str
    seconds: float
    flops: float = 0.0
    hbm_bytes: float = 0.0
    bound: Bound = "mxu"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of a step over some mesh axes, on one chip.

    Attributes:
      kind: such as `all-gather`.
      axes: the mesh axes, such as `fsdp` or `data,fsdp`.
      network: `ici` within a slice, `dcn` between slices.
      bytes: received by each chip in a step.
      seconds: for which the links of these axes are busy.
      exposed_seconds: for which computation waits.
    """

    kind: str
    axes: str
    network: Literal["ici", "dcn"]
    bytes: float
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The cost of one training step.

    Attributes:
      source: `compiled`: read from the program that the TPU compiler made; `arithmetic`: from formulas.
      topology: its name, such as `v5p:4x4x4`.
      chips: of all slices.
      mesh: axis sizes by name.
      tokens_per_step: global batch size times sequence length.
      steps: of the whole run.
      memory: of one chip.
      parts: of the computation; their seconds add up to its time.
      traffic: of the collectives.
      launch_seconds: overhead of starting programs and kernels, not hidden behind computation.
      peak_flops: bf16 FLOP/s of one chip.
      model_flops: of a step, attention counted causally.
      model_flops_full_attention: of a step, attention's masked half counted too.
      notes: what a reader must know, a sentence each, such as what is not modelled.
      details: further numbers of this source, for `--json`.
    """

    source: Source
    topology: str
    chips: int
    mesh: Mapping[str, int]
    tokens_per_step: int
    steps: int
    memory: Memory
    parts: tuple[Part, ...]
    traffic: tuple[Traffic, ...]
    launch_seconds: float
    peak_flops: float
    model_flops: float
    model_flops_full_attention: float
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def chip(self) -> str:
        """The kind of chip, such as `v5p`."""
        return self.topology.rpartition(" ")[2].partition(":")[0]

    @property
    def compute_seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def exposed_seconds(self) -> float:
        """Waiting for collectives."""
        return sum(one.exposed_seconds for one in self.traffic)

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.launch_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization, causal attention."""
        return self.model_flops / (self.step_seconds * self.chips * self.peak_flops)

    @property
    def mfu_full_attention(self) -> float:
        """As many publications count it."""
        return self.model_flops_full_attention / (self.step_seconds * self.chips * self.peak_flops)

    @property
    def mfu_without_waiting(self) -> float:
        """As if every collective were hidden behind computation."""
        return self.model_flops / (self.compute_seconds * self.chips * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def run_seconds(self) -> float:
        """Of all steps, without evaluation, checkpoints and restarts."""
        return self.steps * self.step_seconds

    @property
    def chip_hours(self) -> float:
        return self.run_seconds * self.chips / 3600
