"""One side of a comparison in its own process: reads requests as JSON lines, and answers with seconds.

In one process, torch and XLA would disturb each other's thread pools, allocators and caches.
"""

from __future__ import annotations

import argparse
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
    """A library under test; every call returns when the result is on the host.

    Besides `generate` some have `prefill` (int32 [B, T] -> int32 [B, 1], the argmax of the next token, with
    the KV cache filled), `beams` (the best of 4) and `lookup` (with prompt-lookup drafts).
    """

    version: str

    def generate(self, tokens: np.ndarray, new_tokens: int, weights: str) -> np.ndarray:
        """int32 [B, T] prompts of one length -> int32 [B, new_tokens], greedy, without an end token."""
        ...


class HuggingFace:
    """transformers on torch: eval mode, inference mode, sdpa attention, the default cache."""

    def __init__(self, path: Path) -> None:
        import torch
        import transformers

        from llama_jax.model_sizes import SMOLLM2_135M
        from tests.parity import hf

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch = torch
        f32 = hf.load_gguf(path, SMOLLM2_135M)
        self._models = {"float32": f32, "bfloat16": hf.load_gguf(path, SMOLLM2_135M).to(torch.bfloat16)}
        attention = f32.config._attn_implementation
        self.version = f"transformers {transformers.__version__} ({attention}), torch {torch.__version__}"

    def generate(self, tokens: np.ndarray, new_tokens: int, weights: str, **settings: Any) -> np.ndarray:
        torch = self._torch
        ids = torch.tensor(tokens, dtype=torch.int64)
        with torch.inference_mode():
            out = self._models[weights].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **settings,
            )
        return out[:, ids.shape[1] :].numpy()

    def beams(self, tokens: np.ndarray, new_tokens: int, weights: str) -> np.ndarray:
        return self.generate(tokens, new_tokens, weights, num_beams=4)

    def prefill(self, tokens: np.ndarray, dtype: DType) -> np.ndarray:
        torch = self._torch
        ids = torch.tensor(tokens, dtype=torch.int64)
        with torch.inference_mode():
            return self._models[dtype](ids, logits_to_keep=1, use_cache=True).logits.argmax(-1).numpy()


class LlamaJax:
    """This library: `lj.load` and the functions on arrays."""

    def __init__(self, path: Path) -> None:
        import jax

        import llama_jax as lj

        self._lj, self._path, self._key = lj, path, jax.random.key(0)
        self._models: dict[str, lj.Model] = {}
        self.version = f"llama_jax, jax {jax.__version__}, Python {sys.version.split()[0]}"

    def _request(self, tokens: np.ndarray, weights: str) -> tuple[Any, ...]:
        if weights not in self._models:
            form: Any = {"bits": int(weights[3:])} if weights.startswith("int") else {"dtype": weights}
            self._models[weights] = self._lj.load(self._path, scan_layers=False, **form)
        model = self._models[weights]
        return model.config, model.params, tokens, np.full(len(tokens), tokens.shape[1], np.int32)

    def generate(self, tokens: np.ndarray, new_tokens: int, weights: str) -> np.ndarray:
        greedy = self._lj.Sampling(temperature=0.0)
        request = self._request(tokens, weights)
        return np.asarray(self._lj.generate(*request, self._key, greedy, max_new_tokens=new_tokens).tokens)

    def prefill(self, tokens: np.ndarray, weights: str) -> np.ndarray:
        # `lj.prefill` alone leaves the last prompt token to the first step: less work than the peer's.
        return self.generate(tokens, 1, weights)

    def beams(self, tokens: np.ndarray, new_tokens: int, weights: str) -> np.ndarray:
        found = self._lj.beam_search(*self._request(tokens, weights), 4, max_new_tokens=new_tokens)
        return np.asarray(found.tokens[:, 0])

    def lookup(self, tokens: np.ndarray, new_tokens: int, weights: str) -> np.ndarray:
        greedy = self._lj.Sampling(temperature=0.0)
        request = self._request(tokens, weights)
        out = self._lj.speculative_generate(*request, self._key, greedy, max_new_tokens=new_tokens)
        return np.asarray(out.output.tokens)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, which this process's Python must have; f32 weights, one row."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        cores = len(os.sched_getaffinity(0))
        self._model = llama_cpp.Llama(
            str(path), n_ctx=512, n_threads=cores, n_threads_batch=cores, verbose=False
        )
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def generate(self, tokens: np.ndarray, new_tokens: int, weights: str) -> np.ndarray:
        self._model.reset()
        steps = self._model.generate(tokens[0].tolist(), temp=0.0, top_k=1, repeat_penalty=1.0)
        return np.array([[next(steps) for _ in range(new_tokens)]], np.int32)


SIDES: dict[str, type[HuggingFace] | type[LlamaJax] | type[LlamaCpp]] = {
    "hf": HuggingFace,
    "llama_jax": LlamaJax,
    "llama_cpp": LlamaCpp,
}


class Worker:
    """A side in its own process, warm between calls; a context manager that ends it."""

    def __init__(self, side: str, path: Path, python: str = sys.executable) -> None:
        self.side = side
        command = [python, "-m", "benchmarks.workers", side, str(path)]
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
    answers, sys.stdout = sys.stdout, sys.stderr  # keep a library's output out of the answers
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
    """Pins this process and its children to the first `cores` available cores."""
    selected = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, selected)
    return selected


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("side", choices=SIDES, help="the library")
    parser.add_argument("path", help="the weights, a GGUF file")
    arguments = parser.parse_args()
    _serve(arguments.side, arguments.path)
