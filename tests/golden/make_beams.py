"""Writes the beam search golden with transformers: `python -m tests.golden.make_beams MODEL.gguf`.

Run by hand in an environment with the `parity` extra when a case changes, and commit what it wrote.
The argument is SmolLM2-135M's GGUF file, which `llama-jax models` tells the place of.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llama_jax.model_sizes import SMOLLM2_135M
from tests.golden import beams, cases
from tests.golden.beams import Setting
from tests.parity import hf

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens [R, max_new_tokens], lengths [R], scores [R]


def search(reference: Any, prompt: list[int], setting: Setting, max_new_tokens: int) -> Found:
    """What transformers finds for one prompt, all beams."""
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=setting.num_beams,
            num_return_sequences=setting.num_beams,
            length_penalty=setting.length_penalty,
            early_stopping=setting.early_stopping,
            eos_token_id=list(setting.eos_ids) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **{name: list(v) if isinstance(v, tuple) else v for name, v in setting.sampling.items()},
        )
    # Texts are filled up with an end token: their lengths are those of their beams' histories.
    lengths = (out.beam_indices >= 0).sum(-1).numpy()
    found = np.zeros((setting.num_beams, max_new_tokens), np.int64)
    new = out.sequences[:, len(prompt) :].numpy()
    found[:, : new.shape[1]] = np.where(np.arange(new.shape[1]) < lengths[:, None], new, 0)
    return found, lengths, out.sequences_scores.numpy()


def clear(reference: Any, prompt: list[int], setting: Setting, max_new_tokens: int) -> Found:
    """`search`, if double precision finds the same texts: no choice that another order of sums overturns."""
    found = search(reference.float(), prompt, setting, max_new_tokens)
    again = search(reference.double(), prompt, setting, max_new_tokens)
    reference.float()
    if not np.array_equal(found[0], again[0]):
        raise SystemExit(f"prompt {prompt} meets a tie under {setting}; choose another model")
    return found


def small_models() -> dict[str, np.ndarray]:
    """The end tokens that each model was given, and what came of each setting for both prompts."""
    out = {}
    for number in beams.MODELS:
        config, params, tokens = beams.small_model(number)
        reference = hf.model(config, params)
        prompts = [row[:n].tolist() for row, n in zip(tokens, beams.PROMPT_LENGTHS, strict=True)]
        free = beams.settings(number, (), ())[0]
        middle = [search(reference, prompt, free, beams.NEW_TOKENS)[0][:, 2:9] for prompt in prompts]
        ids, counts = np.unique(middle, return_counts=True)
        common = ids[np.argsort(-counts, kind="stable")]
        # A token that many texts hold ends them early, a rarer one some of them.
        ends = (common[1], common[4])[: 1 + number % 2]
        found = [
            [clear(reference, prompt, setting, beams.NEW_TOKENS) for prompt in prompts]
            for setting in beams.settings(number, tuple(map(int, ends)), tuple(map(int, common[2:4])))
        ]
        out |= {f"ends_{number}": np.array(ends, np.uint8), f"common_{number}": common[2:4].astype(np.uint8)}
        out |= _packed(number, found, np.uint8)
        lengths = out[f"lengths_{number}"]
        print(f"model {number}: ends {ends}, mean lengths {lengths.mean((1, 2)).round(1).tolist()}")
    return out


def smollm2(path: Path) -> dict[str, np.ndarray]:
    """The same for some of the prompts of the SmolLM2 golden."""
    reference = hf.load_gguf(path, SMOLLM2_135M)
    out = {}
    with np.load(cases.SMOLLM2) as golden:
        prompts = [golden[f"prompt_{i}"].tolist() for i in beams.SMOLLM2_PROMPTS]
    for number, setting in enumerate(beams.SMOLLM2_SETTINGS):
        found = [clear(reference, prompt, setting, beams.SMOLLM2_NEW_TOKENS) for prompt in prompts]
        out |= _packed(f"smollm2_{number}", [found], np.uint16)
        print(f"SmolLM2, {setting}: lengths {[f[1].tolist() for f in found]}")
    return out


def _packed(name: object, found: list[list[Found]], dtype: type) -> dict[str, np.ndarray]:
    """Arrays [settings, prompts, R, ...]."""
    tokens, lengths, scores = (np.stack([[f[i] for f in row] for row in found]) for i in range(3))
    return {
        f"tokens_{name}": tokens.astype(dtype),
        f"lengths_{name}": lengths.astype(np.uint8),
        f"scores_{name}": scores.astype(np.float32),
    }


def main() -> None:
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    np.savez_compressed(beams.BEAMS, allow_pickle=False, **small_models(), **smollm2(Path(sys.argv[1])))
    print(f"{beams.BEAMS.name}: {beams.BEAMS.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
