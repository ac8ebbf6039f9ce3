"""The errors a user can cause: each message is one line that says what, where, and what to do.

The command line prints any `LlamaJaxError` as `error: ...` and exits with status 2; library callers
can catch the base class, or `ValueError`, which they all are.
"""


class LlamaJaxError(ValueError):
    """Base of every error that a user's input can cause."""


class ConfigError(LlamaJaxError):
    """A model, mesh or sharding configuration that cannot work."""


class CheckpointError(LlamaJaxError):
    """A checkpoint that is missing, malformed, or does not hold the model it should."""


class TokenizerError(LlamaJaxError):
    """A vocabulary that cannot be read, or text or ids that it cannot represent."""


class InputError(LlamaJaxError):
    """A prompt, token array or sampling setting that is out of range."""


class DataError(LlamaJaxError):
    """Training data that is missing, unreadable, malformed, or not what the run began with."""


class MissingTokenizerError(TokenizerError):
    """A place that holds no vocabulary at all."""
