"""Where files are: `as_path` gives a local `Path`, or a `StorePath` for gs://BUCKET/KEY and s3://BUCKET/KEY.

Both have `pathlib`'s methods, so that code which takes a `Path` takes either. What stores cannot do as a disk
does has a function here: ranged reads (`read_range`), versions, conditional and multi-part writes.
"""

from llama_jax.storage.address import as_path, is_address, local_file, read_range, status
from llama_jax.storage.store_path import StorePath
from llama_jax.storage.upload import local_folder, upload

__all__ = [
    "StorePath",
    "as_path",
    "is_address",
    "local_file",
    "local_folder",
    "read_range",
    "status",
    "upload",
]
