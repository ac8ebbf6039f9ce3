"""Whether a store has refused for good, by what libraries above its clients have made of its answer."""

from __future__ import annotations

from pathlib import Path

from llama_jax.errors import StoreError
from llama_jax.storage import client
from llama_jax.storage.store_path import StorePath
from llama_jax.storage.tensorstore_spec import raise_for_tensorstore


def refusal(path: Path, error: BaseException) -> StoreError | None:
    """Returns what a store has refused for good: access, or a bucket that is not there.

    Args:
      path: what was to be written.
      error: of gcsfs, s3fs, TensorStore or Orbax, which raise it from one another's.

    Returns:
      An error with its line; None if the same request may succeed later, or no store is why it failed.
    """
    if not isinstance(path, StorePath):
        return None
    cause: BaseException | None = error
    while cause is not None:
        found = _store_error(path, cause)
        if found is not None:
            return None if found.transient else found
        cause = cause.__cause__ or cause.__context__
    return None


def _store_error(path: StorePath, error: BaseException) -> StoreError | None:
    """The error as a store's: one that refuses or fails; None where it is none of a store's."""
    try:
        raise_for_tensorstore(path, "written", error)
        if str(error).startswith("NOT_FOUND"):  # TensorStore's, which wrote
            error = FileNotFoundError(str(error))
        if client.is_answer(error):
            client.forget_bucket(path)
            client.raise_for(path, "written", error)
    except StoreError as found:
        return found
    except OSError:  # an object that is not there, or is: the bucket exists
        pass
    return None
