"""What every test may ask for: 8 simulated devices, the shared data, real SmolLM2 weights."""

import os

# The suite compiles a thousand small programs and runs each a few times: LLVM's effort would be most of it.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true " + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import pytest

import llama_jax as lj


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
    from llama_jax import known
    from llama_jax.errors import LlamaJaxError

    try:
        return known.fetch("smollm2-135m")
    except LlamaJaxError as error:
        _absent(f"smollm2-135m cannot be had: {error}")
        raise


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> "lj.Model":
    """SmolLM2-135M loaded in f32."""
    return lj.load(smollm2_path)


@pytest.fixture(autouse=True)
def _no_kept_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, run in this process, must not turn JAX's persistent cache on for the tests after it.

    JAX 0.10 crashes when it reads a kept program of several CPU devices.
    """
    if request.path.name != "test_compiled.py":
        monkeypatch.setattr("llama_jax.cli.compiled.keep_compiled_programs", lambda: None)
