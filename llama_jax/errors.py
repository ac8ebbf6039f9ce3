"""The errors that a user can cause: each message is one line with what was wrong, where, and what to do.

The command line prints any `LlamaJaxError` as `error: ...` and exits with its status, 2 for bad input.
Library callers can catch the base class, or `ValueError`, its base.
"""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """The exit statuses beside 0, 1 (a traceback), and 128 + a signal's number; see docs/launch.md.

    Launchers restart a run by them. The last three are none of a signal's, nor of those that systemd gives a
    service that it cannot start (200 to 243), and in the range that xpk restarts on.
    """

    BAD_INPUT = 2  # would fail again
    NOT_FINITE = 3  # would fail again
    STORAGE = 195  # a disk, a mounted file system or an object store
    HUNG = 196  # no step for too long
    LOST = 197  # a device, or the connection to another process

    @property
    def restart(self) -> bool:
        """Whether a launcher should start the run again."""
        return self >= ExitStatus.STORAGE


class LlamaJaxError(ValueError):
    """Base class of all errors that invalid input causes; `exit_status` is the command line's."""

    exit_status = ExitStatus.BAD_INPUT


class ConfigError(LlamaJaxError):
    """An invalid model, mesh or sharding configuration."""


class CheckpointError(LlamaJaxError):
    """A checkpoint that is missing, malformed, or of another model."""


class StorageError(LlamaJaxError):
    """Files that could not be written or read: no space, a lost file system, a store that refuses or fails.

    Attributes:
      transient: whether the reason may pass. The exit status is then one that launchers restart a run on.
    """

    def __init__(self, message: str, *, transient: bool = True) -> None:
        super().__init__(message)
        self.transient = transient
        self.exit_status = ExitStatus.STORAGE if transient else ExitStatus.BAD_INPUT


class CheckpointSaveError(CheckpointError, StorageError):
    """A checkpoint of a run that could not be written."""


class TokenizerError(LlamaJaxError):
    """A vocabulary that cannot be read, or text or ids that it cannot represent."""


class InputError(LlamaJaxError):
    """A prompt, token array or sampling setting that is out of range."""


class DataError(LlamaJaxError):
    """Training data that is missing, unreadable, malformed, or has changed since the run started."""


class MissingTokenizerError(TokenizerError):
    """A path without a vocabulary."""


class StoreError(StorageError):
    """An object store that refuses or is not there; `transient` where it fails, or the network does."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message, transient=transient)


class GrammarError(InputError):
    """A grammar that cannot be built: malformed, not supported, too large, or that no token can spell."""


class QueueFullError(LlamaJaxError):
    """A `Batcher` whose queue is full; `retry_after` is in how many seconds to try again."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
