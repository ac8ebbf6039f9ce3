"""Writes the golden of bottleneck adapters with AdapterHub: `python -m tests.golden.make_bottleneck`.

Run by hand, when a case changes, in an environment of its own with `pip install adapters==1.3.0 torch` (it
asks for an older transformers than the `parity` extra has), and commit what it wrote. With a directory as its
argument it reads the adapter there, which `save_adapter` wrote for the base in `tests/golden/bottleneck`, and
prints how far its logits are from those beside it in `logits.npy`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "bottleneck"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))
CASES = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "feed_forward": adapters.BnConfig(
        mh_adapter=False,
        output_adapter=True,
        reduction_factor=8,
        non_linearity="gelu",
        original_ln_before=False,
        scaling=2.0,
    ),
}
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(TOKENS)).logits.numpy()


def make() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).eval()
    FOLDER.mkdir(exist_ok=True)
    model.save_pretrained(FOLDER / "base")
    found = {"tokens": TOKENS, "plain": logits(model)}
    adapters.init(model)
    for name, config in CASES.items():
        model.add_adapter(name, config=config)
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if f".{name}." in path:
                    weight += 0.2 * torch.randn_like(weight)
        model.set_active_adapters(name)
        found[name] = logits(model)
        model.save_adapter(str(FOLDER / name), name, use_safetensors=True, with_head=False)
        for extra in FOLDER.glob("*/*head*"):
            extra.unlink()
    np.savez_compressed(FOLDER / "logits.npz", **found)


def check(folder: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(FOLDER / "base").eval()
    adapters.init(model)
    model.set_active_adapters(model.load_adapter(str(folder), use_safetensors=True))
    print(np.abs(logits(model) - np.load(folder / "logits.npy")).max())


if __name__ == "__main__":
    check(Path(sys.argv[1])) if len(sys.argv) > 1 else make()
