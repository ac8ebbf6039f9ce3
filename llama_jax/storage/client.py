"""The stores' clients, gcsfs and s3fs: made when first used, each call with a deadline, errors in one line.

Both retry requests that fail with 429, 5xx or a broken connection, with backoff, 5 or 6 times; what is left
after that is raised from here as a `StoreError` that says so.
"""

from __future__ import annotations

import errno
import functools
import importlib
import logging
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol

from llama_jax.errors import StoreError

DEADLINE_SECONDS = 120.0  # for one call with all its retries, and
BYTES_PER_SECOND = 1 << 20  # for each byte that it transfers
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_EXTRAS = {"gs": "gcs", "s3": "s3"}
_CREDENTIALS = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_MISSING = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
_REFUSED = {"RefreshError", "TokenRetrievalError", "UnauthorizedSSOTokenError", "CredentialRetrievalError"}
# Of aiohttp, requests, urllib3, botocore, google-auth and gcsfs; botocore's ClientError has a status.
_NETWORK = {"ClientError", "RequestException", "HTTPError", "HTTPClientError", "ConnectionError"}
_NETWORK |= {
    "IncompleteRead",
    "IncompleteReadError",
    "TransportError",
    "ChecksumError",
    "ResponseStreamingError",
}
_TRANSIENT_ERRNO = {errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO), errno.EAGAIN}
_TRANSIENT_ERRNO |= {errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EPIPE, errno.EHOSTUNREACH}


class Address(Protocol):
    """What an object is called: a `StorePath`, of which only this is needed here."""

    @property
    def scheme(self) -> str: ...

    @property
    def bucket(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def address(self) -> str: ...


class Info(NamedTuple):
    """An object as the store describes it.

    Attributes:
      size: in bytes.
      version: changes with every write: the generation in gs://, the ETag in s3://.
      modified: when it was written by the store's clock, in seconds since 1970.
      digest: of its content, as in crc32c:... or etag:...
    """

    size: int
    version: str
    modified: float
    digest: str


@functools.lru_cache(maxsize=8)
def _make(scheme: str, process: int) -> Any:
    """The client of a process: its connections must not be used by a fork."""
    package = _PACKAGES[scheme]
    try:
        module = importlib.import_module(f"{package}.core")
    except ImportError as error:
        raise StoreError(
            f"{scheme}:// needs the package {error.name or package}: pip install "
            f"'llama-jax[{_EXTRAS[scheme]}]'"
        ) from None
    # Listings are never cached: other processes, and TensorStore in this one, write to the same folders.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "gs":
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of what it raises
        return module.GCSFileSystem(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "-"), **options)
    options["config_kwargs"] = {"connect_timeout": 20, "read_timeout": 60, "max_pool_connections": 64}
    return module.S3FileSystem(**options)


def client(scheme: str) -> Any:
    """Returns the fsspec file system of a scheme.

    Raises:
      StoreError: if its package is not installed, naming the extra.
    """
    return _make(scheme, os.getpid())


def _sync() -> Callable[..., Any]:
    """fsspec's function that waits for a coroutine."""
    return importlib.import_module("fsspec.asyn").sync


def call(
    path: Address, doing: str, method: str | Callable[..., Any], *args: Any, nbytes: int = 0, **kwargs: Any
) -> Any:
    """Calls a coroutine of a path's client, and waits for its result.

    Args:
      path: what the call is about, for errors.
      doing: for errors, as in "cannot be DOING": read, written, listed, deleted.
      method: the name of a method of fsspec's asynchronous interface, or a function of the client.
      args, kwargs: its arguments.
      nbytes: how many bytes it transfers, which its deadline allows for.

    Raises:
      FileNotFoundError: if the object does not exist, and its bucket does.
      FileExistsError: if a condition on an object's version does not hold.
      StoreError: for anything else.
    """
    store = client(path.scheme)
    function = getattr(store, method) if isinstance(method, str) else functools.partial(method, store)
    seconds = DEADLINE_SECONDS + nbytes / BYTES_PER_SECOND
    try:
        return _sync()(store.loop, function, *args, timeout=seconds, **kwargs)
    except Exception as error:  # of two libraries, and the libraries under them
        raise_for(path, doing, error, seconds)


def raise_for(path: Address, doing: str, error: BaseException, seconds: float = DEADLINE_SECONDS) -> NoReturn:
    """Raises what `call` says for an error of a client, or of a library that it is built on."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = _status(error)
    if isinstance(error, StoreError):
        raise error
    if isinstance(error, FileExistsError) or status == 412:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
    if isinstance(error, FileNotFoundError) or status == 404:
        _check_bucket(path, error)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    if kinds & _MISSING or status == 401 or "Anonymous caller" in str(error):
        raise StoreError(
            f"{path}: there are no credentials for {path.scheme}://; {_CREDENTIALS[path.scheme]}"
        ) from error
    if isinstance(error, PermissionError) or status == 403 or kinds & _REFUSED:
        raise StoreError(
            f"{path}: the store refuses access ({_reason(error)}): it cannot be {doing}; give this account a "
            f"role that may, or use other credentials: {_CREDENTIALS[path.scheme]}"
        ) from error
    if isinstance(error, TimeoutError) or "FSTimeoutError" in kinds:
        raise StoreError(
            f"{path}: cannot be {doing}: no answer within {seconds:.0f} s; check the network, and run the "
            "same command again",
            transient=True,
        ) from error
    if _is_transient(error, status, kinds):
        raise StoreError(
            f"{path}: cannot be {doing}: the store still fails after several tries ({_reason(error)}); run "
            "the same command again",
            transient=True,
        ) from error
    raise StoreError(f"{path}: cannot be {doing}: {_reason(error)}; check the address") from error


def is_answer(error: BaseException) -> bool:
    """Whether an error is one that the clients raise for what a store, or the network, has answered."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    known = isinstance(error, StoreError | PermissionError | FileNotFoundError | TimeoutError)
    return known or _status(error) is not None or bool(kinds & (_MISSING | _REFUSED | _NETWORK))


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, if it has one."""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):  # botocore's
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        code = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs's
        return 403
    return int(code) if str(code).isdigit() else None


def _is_transient(error: BaseException, status: int | None, kinds: set[str]) -> bool:
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return bool(kinds & _NETWORK)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"^Forbidden: \S+ ", "", text)
    return f"{text[:200] or type(error).__name__}"


def _check_bucket(path: Address, error: BaseException) -> None:
    """Raises a StoreError if the bucket of an object that was not found does not exist."""
    if path.key and not _bucket_exists(path.scheme, path.bucket):
        _raise_no_bucket(path, error)
    if not path.key:
        _raise_no_bucket(path, error)


def _raise_no_bucket(path: Address, error: BaseException) -> NoReturn:
    raise StoreError(
        f"{path}: there is no bucket {path.bucket!r}, or this account may not see it; check the name, or "
        "create it first"
    ) from error


_known_buckets: set[tuple[str, str]] = set()


def forget_bucket(path: Address) -> None:
    """Looks for a bucket again when something is not found there: it may have been deleted."""
    _known_buckets.discard((path.scheme, path.bucket))


def _bucket_exists(scheme: str, bucket: str) -> bool:
    """Whether a bucket exists; True if that cannot be found out."""
    if (scheme, bucket) in _known_buckets:
        return True
    store = client(scheme)
    try:
        _sync()(store.loop, store._info, bucket, timeout=DEADLINE_SECONDS)
    except FileNotFoundError:
        return False
    except Exception as error:  # not what was asked: the caller's own error tells
        if _status(error) == 404:
            return False
    _known_buckets.add((scheme, bucket))
    return True
