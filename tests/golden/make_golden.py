"""Writes the golden files with Hugging Face transformers: `python -m tests.golden.make_golden MODEL.gguf`.

Run by hand in an environment with the `parity` extra when a case changes, and commit what it wrote.
The argument is SmolLM2-135M's GGUF file, which `llama-jax models` tells the place of.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from llama_jax.model_sizes import SMOLLM2_135M
from tests.golden import cases, text
from tests.parity import hf

NEW_TOKENS = 128
PROSE_TOKENS = 512
POSITIONS = np.arange(31, PROSE_TOKENS, 32)
COLUMNS = np.arange(0, SMOLLM2_135M.vocab_size, 96)
# Every greedy choice must win by a margin that no order of summation can overturn.
MARGIN = 1e-3


def small_models() -> dict[str, np.ndarray]:
    """The logits of every small case, padding set to zero."""
    out = {}
    for seed in cases.SEEDS:
        case = cases.random_case(seed)
        with torch.inference_mode():
            logits = hf.case_logits(hf.case_model(case), case).numpy()
        out[f"logits_{seed}"] = np.where(case.valid[..., None], logits, 0)
    return out


def smollm2(path: Path) -> dict[str, np.ndarray]:
    """Greedy continuations of the prompts, and a sample of the logits over a page of prose."""
    model = hf.load_gguf(path, SMOLLM2_135M)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def encode(prompt: str) -> list[int]:
        return tokenizer(prompt, add_special_tokens=False).input_ids

    out: dict[str, np.ndarray] = {}
    for i, prompt in enumerate(text.PROMPTS):
        ids = encode(prompt)
        greedy = hf.generate(model, ids, NEW_TOKENS)
        margin = _smallest_margin(model, ids, greedy)
        print(f"prompt {i}: {len(ids)} tokens, smallest margin {margin:.4f}, {tokenizer.decode(greedy)!r}")
        if margin < MARGIN:
            raise SystemExit(f"prompt {i} meets a tie: margin {margin:.2e}; choose another prompt")
        out[f"prompt_{i}"] = np.array(ids, np.uint16)
        out[f"greedy_{i}"] = np.array(greedy, np.uint16)
    prose = encode(text.PROSE)[:PROSE_TOKENS]
    if len(prose) < PROSE_TOKENS:
        raise SystemExit(f"the prose has {len(prose)} tokens; write {PROSE_TOKENS - len(prose)} more")
    with torch.inference_mode():
        logits = model(torch.tensor([prose])).logits[0]
        out["logsumexp"] = torch.logsumexp(logits, -1).numpy()
    values = logits.numpy()
    best = np.sort(values, -1)[:, -2:]
    sample: dict[str, np.ndarray] = {
        "prose": np.array(prose, np.uint16),
        "positions": POSITIONS.astype(np.uint16),
        "columns": COLUMNS.astype(np.uint16),
        "logits": values[np.ix_(POSITIONS, COLUMNS)],
        "scale": np.asarray(np.abs(values).max()),
        "top1": values.argmax(-1).astype(np.uint16),
        "top1_margin": best[:, 1] - best[:, 0],
    }
    return out | sample


def _smallest_margin(model: transformers.LlamaForCausalLM, prompt: list[int], greedy: list[int]) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + greedy[:-1]])).logits[0, len(prompt) - 1 :]
    best = logits.topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def main() -> None:
    path = Path(sys.argv[1])
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for golden, arrays in ((cases.SMALL_MODELS, small_models()), (cases.SMOLLM2, smollm2(path))):
        np.savez_compressed(golden, allow_pickle=False, **arrays)
        print(f"{golden.name}: {golden.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
