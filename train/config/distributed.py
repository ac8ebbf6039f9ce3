"""`[distributed]`: multi-process initialization."""

from __future__ import annotations

import dataclasses

from llama_jax.errors import ConfigError

from .checks import check_at_least


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Arguments of `jax.distributed.initialize`; Cloud TPU, Slurm, Open MPI and Kubernetes need none of them.

    Attributes:
      coordinator: host:port of process 0; empty to detect it.
      num_processes: total number of processes.
      process_id: index of this process, from 0.
      heartbeat_seconds: seconds without a heartbeat after which a process counts as failed.

    Raises:
      ConfigError: if only some of the first three are set, or the index is out of range.
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
                "set all three, or none to detect them"
            )
        if self.num_processes and self.process_id >= self.num_processes:
            raise ConfigError(
                f"distributed.process_id is {self.process_id}; with {self.num_processes} processes it must "
                f"be at most {self.num_processes - 1}"
            )
        check_at_least("distributed", self, heartbeat_seconds=1)
