"""Settings of runs on NVIDIA GPUs: the user's win, unknown ones are left out, and what is missing is said."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from llama_jax import presets
from llama_jax.console import compilation_cache, loading
from llama_jax.errors import InputError
from llama_jax.ops import gpu_flags
from llama_jax.train import gpu
from llama_jax.train.xla_flags import check_xla_flags

SEVEN_B = presets.LLAMA2_7B


def test_the_environment_of_the_user_wins():
    both = {"XLA_CLIENT_MEM_FRACTION": "0.9", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert gpu_flags.environment({}) == both
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in gpu_flags.environment({}, blackwell=True)
    assert gpu_flags.environment({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}) == {"XLA_CLIENT_MEM_FRACTION": "0.9"}
    # JAX refuses both names of the fraction together.
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        assert "XLA_CLIENT_MEM_FRACTION" not in gpu_flags.environment({name: "0.5"})


def test_options_depend_on_devices_generation_and_layers():
    assert gpu_flags.compiler_options(SEVEN_B, devices=1, compute_capability="9.0") == {}
    alone = gpu_flags.compiler_options(SEVEN_B, devices=1, compute_capability="10.0")
    assert alone == {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL"}
    eight = gpu_flags.compiler_options(SEVEN_B, devices=8, compute_capability="9.0")
    # JAX-Toolbox counts 218M weights in a layer of the same model, 436 MB.
    layer = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert layer <= eight["xla_gpu_all_gather_combine_threshold_bytes"] < layer + (1 << 20)
    given = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp"
    fewer = gpu_flags.compiler_options(SEVEN_B, devices=8, compute_capability="9.0", xla_flags=given)
    assert set(eight) - set(fewer) == {"xla_gpu_enable_latency_hiding_scheduler"}


def test_this_xla_takes_every_option_that_it_knows():
    """Each is parsed by the compiler; JAX 0.12 has no pipelined collectives, which its level O1 brings."""
    options = gpu_flags.compiler_options(SEVEN_B, devices=8, compute_capability="10.0")
    lowered = jax.jit(lambda x: x).lower(1.0)
    unknown, messages = [], []
    for name, value in options.items():
        try:
            lowered.compile(compiler_options={name: value})
        except RuntimeError as error:
            unknown.append(name)
            messages.append(str(error))
    assert all(
        f"No such compile option: {name!r}" in text for name, text in zip(unknown, messages, strict=True)
    )
    assert len(options) >= 9
    pipelined = sorted(name for name in options if "pipelined" in name)
    assert sorted(unknown) == (pipelined if hasattr(jax, "CompilerEffortLevel") else [])


def test_unknown_options_are_left_out_and_wrong_ones_are_not_hidden():
    lowered = jax.jit(lambda x: x).lower(1.0)
    known = {"xla_gpu_enable_latency_hiding_scheduler": True}
    compiled = gpu.compile_with_known(lowered, {"xla_no_such": 1, **known, "xla_nor_this": 2})
    assert compiled(1.0) == 1.0
    with pytest.raises(RuntimeError, match="not a valid bool"):
        gpu.compile_with_known(lowered, {"xla_gpu_enable_latency_hiding_scheduler": "maybe"})


def test_only_nvidia_gpus_get_options(monkeypatch):
    asked: list[Any] = []
    lowered = SimpleNamespace(compile=lambda compiler_options=None: asked.append(compiler_options))
    gpu.compile_step(lowered, SEVEN_B)
    amd = SimpleNamespace(platform="gpu", compute_capability="gfx942")
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    for device in (amd, hopper):
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        gpu.compile_step(lowered, SEVEN_B)
    assert asked[:2] == [None, None]
    assert asked[2] == gpu_flags.compiler_options(SEVEN_B, devices=8, compute_capability="9.0")


@pytest.mark.parametrize(
    ("platforms", "model", "names"),
    [
        ("", "Model: 	 NVIDIA H100 80GB HBM3", ["CUDA_DEVICE_MAX_CONNECTIONS", "XLA_CLIENT_MEM_FRACTION"]),
        ("cuda", "Model: NVIDIA B200", ["XLA_CLIENT_MEM_FRACTION"]),
        ("cpu", "Model: NVIDIA H100 80GB HBM3", []),
    ],
)
def test_the_environment_is_set_where_jax_may_use_a_gpu(monkeypatch, tmp_path, platforms, model, names):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "information").write_text(model)
    environ = {"JAX_PLATFORMS": platforms}
    monkeypatch.setattr(gpu.os, "environ", environ)
    monkeypatch.setattr(gpu, "_GPU_FILES", (str(tmp_path),))
    monkeypatch.setattr(gpu, "_GPU_MODELS", tmp_path)
    gpu.prepare_environment()
    assert sorted(environ) == sorted(["JAX_PLATFORMS", *names])
    monkeypatch.setattr(gpu, "_GPU_FILES", ("/nowhere",))
    environ.clear()
    gpu.prepare_environment()
    assert environ == {}


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Only these packages, of which jaxlib is one, are installed."""
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    packages = [SimpleNamespace(metadata={"Name": name}, version=v) for name, v in names.items()]
    monkeypatch.setattr(gpu.importlib.metadata, "distributions", lambda: packages)
    monkeypatch.setattr(gpu.importlib.metadata, "version", names.__getitem__)


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({}, "JAX has no CUDA plugin; pip install 'llama-jax[cuda]'"),
        (
            {"jax_cuda13_plugin": "0.10.1", "jax_cuda13_pjrt": "0.10.1"},
            "jax-cuda13-pjrt is 0.10.1 and jaxlib 0.10.2; pip install 'jax-cuda13-pjrt==0.10.2'",
        ),
        (
            {"jax_cuda13_plugin": "0.10.2", "jax_cuda13_pjrt": "0.10.2"},
            "JAX's CUDA plugin does not start; JAX_PLATFORMS=cuda shows its error",
        ),
    ],
)
def test_a_gpu_that_is_not_used_is_said(monkeypatch, tmp_path, versions, words):
    lines: list[str] = []
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    gpu.note_unused_gpu(lines.append)
    assert lines == []
    monkeypatch.setattr(gpu, "_GPU_FILES", (str(tmp_path),))
    installed(monkeypatch, jaxlib="0.10.2", **versions)
    gpu.note_unused_gpu(lines.append)
    note = f"this run uses the CPU, beside an NVIDIA GPU: {words}; JAX_PLATFORMS=cpu silences this"
    assert lines == [note]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    gpu.note_unused_gpu(lines.append)
    assert len(lines) == 1


def test_a_plugin_that_does_not_start_is_one_line(monkeypatch, capsys):
    """JAX logs its traceback and goes on, or fails without a word where the platform was asked for."""
    logger = logging.getLogger("jax._src.xla_bridge")

    def devices(error: Exception | None = None) -> list[Any]:
        try:
            raise RuntimeError("Unable to load cuDNN.\nIs it installed?")
        except RuntimeError:
            logger.exception("Jax plugin configuration error: Exception when calling initialize()")
        if error is not None:
            raise error
        return []

    monkeypatch.setattr(compilation_cache, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    loading.init_jax()
    warning = "warning: a plugin of JAX does not start: Unable to load cuDNN. Is it installed?\n"
    assert capsys.readouterr().err == warning
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", lambda: devices(AssertionError()))
    with pytest.raises(InputError, match=r"platform 'cuda': Unable to load cuDNN. Is it installed; set"):
        loading.init_jax()
    assert capsys.readouterr().err == "" and not logger.filters


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--xla_gpu_a=1 --xla_gpu_b --xla_gpu_a=2", "sets --xla_gpu_a to 1 and to 2; keep one of them"),
        ("--xla_tpu_no_such=1", "Unknown flag in XLA_FLAGS: --xla_tpu_no_such=1; .* go to LIBTPU_INIT_ARGS"),
    ],
)
def test_flags_that_xla_would_abort_for_are_one_line(flags, words):
    with pytest.raises(InputError, match=words):
        check_xla_flags(flags)


def test_flags_that_xla_parses_pass(monkeypatch):
    check_xla_flags("--xla_gpu_autotune_level=1")
    monkeypatch.setattr("subprocess.run", None)  # no process for what every XLA has
    check_xla_flags("--xla_cpu_multi_thread_eigen=false  --xla_force_host_platform_device_count=4")
    check_xla_flags("")


def test_flags_are_checked_before_jax_is_imported():
    """Importing JAX's modules parses them already: the check must not."""
    text = Path(gpu.__file__).with_name("xla_flags.py").read_text()
    assert "import jax\n" not in text and "from jax" not in text.replace('"from jaxlib', "")
