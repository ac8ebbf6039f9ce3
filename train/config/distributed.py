"""`[distributed]`: multi-process initialization."""

from __future__ import annotations

import dataclasses

from llama_jax.errors import ConfigError

from .checks import check_at_least


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How processes find each other, and when they give up; Cloud TPU, Slurm, Open MPI and Kubernetes find.

    Attributes:
      coordinator: host:port of process 0; empty to detect it.
      num_processes: total number of processes.
      process_id: index of this process, from 0.
      join_seconds: seconds within which all processes must have started.
      heartbeat_seconds: seconds without a heartbeat after which a process counts as failed.
      hang_steps: a run (also of one process) without a step for this many times the median step hangs, and
        ends with the stacks of all threads in `stacks/` and status 196; 0 is off.
      hang_seconds: and not earlier than after this many seconds.
      hang_other_seconds: seconds after which anything else hangs: starting, compiling, the first step, an
        evaluation, waiting for a checkpoint.

    Raises:
      ConfigError: if only some of the first three are set, the index is out of range, or a number is not
        positive.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    join_seconds: int = 300
    heartbeat_seconds: int = 100
    hang_steps: int = 20
    hang_seconds: int = 300
    hang_other_seconds: int = 7200

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.num_processes > 0, self.process_id >= 0)
        if any(given) and not all(given):
            raise ConfigError(
                "distributed.coordinator, distributed.num_processes and distributed.process_id go together; "
                "set all three, or none to detect them"
            )
        if self.num_processes and self.process_id >= self.num_processes:
            raise ConfigError(
                f"distributed.process_id is {self.process_id}; with {self.num_processes} processes it must "
                f"be at most {self.num_processes - 1}"
            )
        seconds = ("join_seconds", "heartbeat_seconds", "hang_seconds", "hang_other_seconds")
        check_at_least("distributed", self, hang_steps=0, **dict.fromkeys(seconds, 1))
