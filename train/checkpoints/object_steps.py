"""The steps of a run in an object store, where a step is committed by its manifest.

On a disk Orbax renames a step when it is complete, and renames those that are no longer retained before it
deletes them. A store cannot rename: there the manifest is written after everything else and deleted before
it, so that a kill at any time leaves steps that are complete and rests that are none.
"""

from __future__ import annotations

import contextlib

from llama_jax.errors import CheckpointError
from llama_jax.storage import StorePath
from llama_jax.weights import manifest
from llama_jax.weights.runs import read_step_metadata, retention_reasons, step_folders


def remove_uncommitted(folder: StorePath) -> None:
    """Deletes what interrupted saves and deletions have left in the directory of a run's steps."""
    committed = set(step_folders(folder.parent).values())
    with contextlib.suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            if path.name.isdigit() and path not in committed:
                path.remove_tree()


def remove_unretained(folder: StorePath) -> None:
    """Deletes the steps that no retention policy keeps, by the settings of the newest."""
    records = []
    for step in step_folders(folder.parent).values():
        with contextlib.suppress(CheckpointError):  # reported when it is restored
            records.append(read_step_metadata(step))
    for record, kept_by in zip(records, retention_reasons(records), strict=True):
        if not kept_by:
            step = folder / str(record.step)
            (step / manifest.NAME).unlink(missing_ok=True)
            step.remove_tree()
