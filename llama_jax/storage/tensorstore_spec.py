"""Paths as TensorStore's key-value stores: its own drivers for files, gs:// and s3://."""

from __future__ import annotations

import os
import urllib.parse
from pathlib import Path
from typing import Any

from llama_jax.errors import StoreError
from llama_jax.storage.store_path import StorePath

# About a minute, as the other clients; TensorStore's own default is a quarter of an hour.
_RETRIES = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "16s"}


_TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "INTERNAL")
_REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED")


def kvstore(folder: Path) -> dict[str, Any] | str:
    """Returns TensorStore's spec of a folder.

    The endpoint and region of s3:// are those of the AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION and
    AWS_DEFAULT_REGION that s3fs follows too; of gs:// TensorStore itself reads TENSORSTORE_GCS_HTTP_URL.
    """
    if not isinstance(folder, StorePath):
        return f"file://{urllib.parse.quote(str(folder.absolute()))}/"
    spec: dict[str, Any] = {"bucket": folder.bucket, "path": f"{folder.key}/"}
    if folder.scheme == "gs":
        return {"driver": "gcs", **spec, "gcs_request_retries": _RETRIES}
    spec |= {"driver": "s3", "s3_request_retries": _RETRIES}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec["endpoint"] = endpoint.rstrip("/")
    if region:
        spec["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # or it looks for files, and says on stderr that there are none
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def raise_for_tensorstore(folder: Path, doing: str, error: BaseException) -> None:
    """Raises a StoreError for an error of TensorStore, or of Orbax above it, if a store is why.

    Args:
      folder: what was read or written; nothing is raised for one on a disk.
      doing: for the message, as in "cannot be DOING": read, written.
      error: what TensorStore raised: a ValueError whose text begins with the name of its status.
    """
    if not isinstance(folder, StorePath):
        return
    text = " ".join(str(error).split()).partition(" [")[0]  # without the request and the answer
    status = next((name for name in (*_TRANSIENT, *_REFUSED) if name in text), None)
    if status in _TRANSIENT:
        raise StoreError(
            f"{folder}: cannot be {doing}: the store still fails after several tries ({text[:200]}); run the "
            "same command again",
            transient=True,
        ) from error
    if status in _REFUSED:
        raise StoreError(
            f"{folder}: the store refuses access ({text[:200]}): it cannot be {doing}; give this account a "
            "role that may, or use other credentials"
        ) from error
