"""One side of a comparison in a process of its own: reads requests as JSON lines, answers with seconds.

Two processes and not one, because torch's threads and XLA's would otherwise share a process, and each
library would be timed with the other's pool, allocator and caches beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


class Side(Protocol):
    """A library under test; both calls return when the result is on the host."""

    version: str

    def generate(self, tokens: np.ndarray, new_tokens: int, dtype: DType) -> np.ndarray:
        """int32 [B, T] prompts of one length -> int32 [B, new_tokens], greedy, never stopping early."""
        ...

    def prefill(self, tokens: np.ndarray, dtype: DType) -> np.ndarray:
        """int32 [B, T] -> int32 [B, 1], the likeliest next token, with the key/value cache filled."""
        ...


class HuggingFace:
    """transformers on torch: eval mode, inference mode, sdpa attention, the default cache."""

    def __init__(self, path: Path) -> None:
        import torch
        import transformers

        from llama_jax.config import SMOLLM2_135M
        from tests.parity import hf

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch = torch
        f32 = hf.load_gguf(path, SMOLLM2_135M)
        self._models = {"float32": f32, "bfloat16": hf.load_gguf(path, SMOLLM2_135M).to(torch.bfloat16)}
        attention = f32.config._attn_implementation
        self.version = f"transformers {transformers.__version__} ({attention}), torch {torch.__version__}"

    def generate(self, tokens: np.ndarray, new_tokens: int, dtype: DType) -> np.ndarray:
        torch = self._torch
        ids = torch.tensor(tokens, dtype=torch.int64)
        with torch.inference_mode():
            out = self._models[dtype].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].numpy()

    def prefill(self, tokens: np.ndarray, dtype: DType) -> np.ndarray:
        torch = self._torch
        ids = torch.tensor(tokens, dtype=torch.int64)
        with torch.inference_mode():
            return self._models[dtype](ids, logits_to_keep=1, use_cache=True).logits.argmax(-1).numpy()


class LlamaJax:
    """This library as its users get it: `lj.load` and `lj.generate`."""

    def __init__(self, path: Path) -> None:
        import jax

        import llama_jax as lj

        self._models = {dtype: lj.load(path, dtype=dtype, stacked=False) for dtype in DTYPES}
        self._lj, self._key = lj, jax.random.key(0)
        self._greedy = lj.Sampling(temperature=0.0)
        self.version = f"llama_jax, jax {jax.__version__}"

    def generate(self, tokens: np.ndarray, new_tokens: int, dtype: DType) -> np.ndarray:
        model, lengths = self._models[dtype], np.full(len(tokens), tokens.shape[1], np.int32)
        out = self._lj.generate(
            model.config, model.params, tokens, lengths, self._key, self._greedy, max_new_tokens=new_tokens
        )
        return np.asarray(out.tokens)

    def prefill(self, tokens: np.ndarray, dtype: DType) -> np.ndarray:
        # `lj.prefill` alone leaves the last token to the first step, and would be less work than the peer's.
        return self.generate(tokens, 1, dtype)


SIDES: dict[str, type[HuggingFace] | type[LlamaJax]] = {"hf": HuggingFace, "llama_jax": LlamaJax}


class Worker:
    """A side in its own process, warm between calls; a context manager that ends it."""

    def __init__(self, side: str, path: Path) -> None:
        self.side = side
        command = [sys.executable, "-m", "benchmarks.workers", side, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version: str = self._receive()["version"]

    def run(self, task: str, tokens: np.ndarray, *settings: Any) -> tuple[float, np.ndarray]:
        """Seconds of one call of `generate` or `prefill`, and the ids that it returned."""
        assert self._process.stdin is not None
        request = {"task": task, "tokens": tokens.tolist(), "settings": settings}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._receive()
        return answer["seconds"], np.array(answer["ids"], np.int32)

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the {self.side} worker ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _serve(side: str, path: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not look like an answer
    library: Side = SIDES[side](Path(path))
    print(json.dumps({"version": library.version}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        tokens = np.array(request["tokens"], np.int32)
        call = getattr(library, request["task"])
        start = time.perf_counter()
        ids = call(tokens, *request["settings"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "ids": ids.tolist()}), file=answers, flush=True)


def pin(cores: int) -> Sequence[int]:
    """Keeps this process, and every one that it starts, on the first `cores` cores it may use."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, chosen)
    return chosen


if __name__ == "__main__":
    _serve(*sys.argv[1:])
