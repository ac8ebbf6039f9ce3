"""The errors that a user can cause: each message is one line with what was wrong, where, and what to do.

The command line prints any `LlamaJaxError` as `error: ...` and exits with status 2. Library callers can catch
the base class, or `ValueError`, its base.
"""


class LlamaJaxError(ValueError):
    """Base class of all errors that invalid input causes."""


class ConfigError(LlamaJaxError):
    """An invalid model, mesh or sharding configuration."""


class CheckpointError(LlamaJaxError):
    """A checkpoint that is missing, malformed, or of another model."""


class TokenizerError(LlamaJaxError):
    """A vocabulary that cannot be read, or text or ids that it cannot represent."""


class InputError(LlamaJaxError):
    """A prompt, token array or sampling setting that is out of range."""


class DataError(LlamaJaxError):
    """Training data that is missing, unreadable, malformed, or has changed since the run started."""


class MissingTokenizerError(TokenizerError):
    """A path without a vocabulary."""
