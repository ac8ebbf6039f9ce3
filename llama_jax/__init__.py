"""Llama 2 in JAX and Flax: arrays in, arrays out.

Letters, used in every einsum, sharding spec and docstring:

    B batch            N query heads               D model width (hidden_size)
    T query length     K key/value heads           F feed-forward width (intermediate_size)
    S key length       G = N / K                   V vocabulary
    L layers           H head dimension
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.beam import Beams, beam_search
    from llama_jax.config import LlamaConfig, RopeScaling, presets
    from llama_jax.conversation import Conversation
    from llama_jax.convert import save
    from llama_jax.decode import DecodeState, Generation, prefill, step
    from llama_jax.drafts import DraftModel, PromptLookup
    from llama_jax.errors import LlamaJaxError
    from llama_jax.generation import generate, stream, warm_up
    from llama_jax.loss import next_token_loss, token_logprobs
    from llama_jax.model import forward, init, unstack
    from llama_jax.pretrained import load
    from llama_jax.quantization import quantize
    from llama_jax.sampling import Sampling
    from llama_jax.session import Session
    from llama_jax.sharding import make_mesh, shard_params
    from llama_jax.speculative import Speculation, speculative_generate
    from llama_jax.text_model import Model

# Imported when first asked for: `llama-jax --help` and its error messages need no JAX.
_HOMES = {
    "beam": ("Beams", "beam_search"),
    "config": ("LlamaConfig", "RopeScaling", "presets"),
    "conversation": ("Conversation",),
    "convert": ("save",),
    "decode": ("DecodeState", "Generation", "prefill", "step"),
    "drafts": ("DraftModel", "PromptLookup"),
    "errors": ("LlamaJaxError",),
    "generation": ("generate", "stream", "warm_up"),
    "loss": ("next_token_loss", "token_logprobs"),
    "model": ("forward", "init", "unstack"),
    "pretrained": ("load",),
    "quantization": ("quantize",),
    "sampling": ("Sampling",),
    "session": ("Session",),
    "sharding": ("make_mesh", "shard_params"),
    "speculative": ("Speculation", "speculative_generate"),
    "text_model": ("Model",),
}
_ROOMS = (
    "adapters",
    "attention",
    "bottleneck",
    "cache",
    "known",
    "layers",
    "lora",
    "prefix",
    "rope",
    "tokenizer",
    "verify",
    "weights",
)
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Beams",
    "Conversation",
    "DecodeState",
    "DraftModel",
    "Generation",
    "LlamaConfig",
    "LlamaJaxError",
    "Model",
    "PromptLookup",
    "RopeScaling",
    "Sampling",
    "Session",
    "Speculation",
    "beam_search",
    "forward",
    "generate",
    "init",
    "load",
    "make_mesh",
    "next_token_loss",
    "prefill",
    "presets",
    "quantize",
    "save",
    "shard_params",
    "speculative_generate",
    "step",
    "stream",
    "token_logprobs",
    "unstack",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("llama-jax")
    if name in _HOMES or name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
