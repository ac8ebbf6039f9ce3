"""Writes the Meta goldens with torch: `python -m tests.golden.make_meta`.

Run by hand in an environment with the `parity` extra, and commit what it wrote. That in one part is saved as
Llama 1's files are: views of one storage, where one matrix lies transposed; the others are modules' states.
"""

from __future__ import annotations

import json
from collections import OrderedDict

import numpy as np
import torch

from tests.golden import meta
from tests.weights.writers import random_params


def views(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in one storage."""
    transposed = "layers.0.attention.wo.weight"
    flat = torch.cat([(t.t() if name == transposed else t).reshape(-1) for name, t in tensors.items()])
    out, begin = {}, 0
    for name, tensor in tensors.items():
        part = flat[begin : begin + tensor.numel()]
        shape = tensor.shape
        out[name] = part.view(shape[1], shape[0]).t() if name == transposed else part.view(shape)
        begin += tensor.numel()
    return out


def state(tensors: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """The same as a module's state_dict, with parameters and the note of versions that modules leave."""
    out = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items())
    out._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return out


def main() -> None:
    print(f"torch {torch.__version__}")
    for count, config in meta.CONFIGS.items():
        folder = meta.folder(count)
        folder.mkdir(exist_ok=True)
        (folder / "params.json").write_text(json.dumps(meta.PARAMS[count]) + "\n")
        parts = meta.split(config, random_params(config), count, llama3=count == 8)
        for number, part in enumerate(parts):
            dtype = getattr(torch, meta.DTYPES[count])
            tensors = {name: torch.from_numpy(np.copy(array)).to(dtype) for name, array in part.items()}
            path = folder / f"consolidated.{number:02}.pth"
            torch.save(views(tensors) if count == 1 else state(tensors), path)
            print(f"{path.relative_to(meta.FOLDER)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
