"""Detection of multi-process launchers: those that JAX supports, and none for a single process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest
from jax._src import clusters  # private: tests/test_private_seams.py
from jax._src.clusters import cloud_tpu_cluster

from llama_jax.errors import InputError
from llama_jax.train import devices
from llama_jax.train.config.run import DistributedConfig
from tests.train.processes import finish

ROOT = Path(__file__).parents[2]
PREFIXES = ("SLURM_", "OMPI_", "PMIX_", "TPU_", "MEGASCALE_", "JOB_COMPLETION_", "KUBERNETES_")

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
OPEN_MPI_4 = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:9"}
GKE = {"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
JOB = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.fixture
def launch(monkeypatch):
    """Sets a launcher's variables in an environment without any."""
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)

    def put(variables: dict[str, str], *, on_tpu: bool = False) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", on_tpu)
        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("0", 200))
        jax.config.update("jax_platforms", "tpu,cpu" if on_tpu else "cpu")

    yield put
    jax.config.update("jax_platforms", "cpu")


def cluster_detected_by_jax() -> str | None:
    kinds = (kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method)
    return next((kind.__name__ for kind in kinds if kind.is_env_present()), None)


@pytest.mark.parametrize(
    ("variables", "on_tpu", "cluster"),
    [
        (SLURM, False, "SlurmCluster"),
        (OPEN_MPI_4, False, "OmpiCluster"),
        (GKE | {"TPU_WORKER_HOSTNAMES": "a,b"}, True, "GkeTpuCluster"),
        (GKE | {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True, "GkeTpuCluster"),
        (GKE | {"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True, "GkeTpuCluster"),
        ({}, True, "GceTpuCluster"),
    ],
)
def test_clusters_of_jax_are_detected(launch, variables, on_tpu, cluster):
    launch(variables, on_tpu=on_tpu)
    assert cluster_detected_by_jax() == cluster
    assert devices._is_multi_process()


def test_pod_of_an_indexed_job_is_detected(launch):
    launch(JOB)  # without the package `kubernetes` JAX does not detect it
    assert devices._is_multi_process()


@pytest.mark.parametrize(
    ("variables", "on_tpu"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # the batch script itself, without srun
        (OPEN_MPI_4 | {"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # not an indexed job
        (GKE, True),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True),
    ],
)
def test_single_process_does_not_initialize_distributed(launch, monkeypatch, variables, on_tpu):
    launch(variables, on_tpu=on_tpu)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("initialized"))
    devices.join_processes(DistributedConfig())


@pytest.mark.parametrize(("variables", "method"), [(OPEN_MPI_4, None), (OPEN_MPI, "mpi4py"), (SLURM, None)])
def test_open_mpi_5_is_detected_through_mpi4py(launch, monkeypatch, variables, method):
    launch(variables)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
    devices.join_processes(DistributedConfig(heartbeat_seconds=7))
    timeouts = {"initialization_timeout": 360, "heartbeat_timeout_seconds": 7}
    assert calls == [{"cluster_detection_method": method, **timeouts}]


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'mpi4py'"), ConnectionError("no route")]
)
def test_failed_detection_is_a_one_line_error(launch, monkeypatch, error):
    def fail(**_: object) -> None:
        raise error

    launch(OPEN_MPI)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError) as raised:
        devices.join_processes(DistributedConfig())
    message = str(raised.value)
    assert message.startswith(f"cannot join the other processes at the launcher's coordinator: {error}; ")
    assert "check or set distributed.coordinator" in message and "\n" not in message


def join(arguments: Sequence[str]) -> int:
    """Joins as the launcher says whose variables are given in JSON; prints which process this is."""
    os.environ |= json.loads(arguments[0])
    devices.join_processes(DistributedConfig())
    print(jax.process_index(), jax.process_count())
    return 0


def test_two_processes_under_slurm_find_each_other(fork_server):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = []
    for i in range(2):
        variables = SLURM | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "JAX_COORDINATOR_PORT": port}
        arguments = [json.dumps(variables)]
        started.append(fork_server.start(f"{__name__}:join", arguments, devices=1, cwd=ROOT))
    done = [finish(process) for process in started]
    assert [each.out.split() for each in done] == [["0", "2"], ["1", "2"]], done
