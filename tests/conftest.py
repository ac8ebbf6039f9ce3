"""What every test may ask for: 8 simulated devices, processes, the shared data, real SmolLM2 weights."""

import gc
import importlib.metadata
import os

# The suite compiles thousands of small programs and runs each a few times: LLVM's effort would be most of it.
# JAX 0.10 compiles in half the time without XLA's fusion emitters, which newer versions always use;
# `make test-jax` tests with those, and `optimized.py` compiles with them.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    + "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    * importlib.metadata.version("jax").startswith("0.10.")
    + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import pytest

import llama_jax as lj
from tests.durations import (  # noqa: F401  # hooks of pytest
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_sessionfinish,
)

if TYPE_CHECKING:
    from tests.train.fork_server import ForkServer


def _absent(reason: str) -> None:
    """Skips the test by name and reason, except in CI, where nothing may be absent."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data: `$LLAMA_JAX_TEST_DATA`, or `../shared/data` beside the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("LLAMA_JAX_TEST_DATA", default))
    if not path.is_dir():
        _absent(f"test data is not at {path}; set LLAMA_JAX_TEST_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M GGUF file, fetched once into the cache folder."""
    from llama_jax.errors import LlamaJaxError
    from llama_jax.hub import known

    try:
        return known.fetch("smollm2-135m")
    except LlamaJaxError as error:
        _absent(f"smollm2-135m cannot be had: {error}")
        raise


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> "lj.Model":
    """SmolLM2-135M loaded in f32."""
    return lj.load(smollm2_path)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ForkServer"]:
    """Starts processes that have imported JAX and this project."""
    from tests.train.fork_server import ForkServer
    from tests.train.processes import environment

    cache = tmp_path_factory.getbasetemp() / "compiled"
    server = ForkServer(environment(cache), tmp_path_factory.mktemp("output"))
    yield server
    server.close()


@pytest.fixture(autouse=True, scope="session")
def _no_kept_programs() -> None:
    """Tests that run the command line in this process must not read programs that another run kept.

    JAX 0.10 crashes when it reads a kept program of several CPU devices.
    """
    jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(autouse=True, scope="module")
def _few_programs() -> Iterator[None]:
    """Drops compiled programs once there are many.

    Each is a few maps of memory, of which Linux gives a process 65,530: with the whole suite's programs XLA
    crashes in the middle of compiling, and they take 6 GB.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


# Tracing makes many objects and few cycles: collections over all that is imported took a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)
