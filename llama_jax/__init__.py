"""Llama 2 in JAX and Flax: pure functions of arrays.

Dimension letters in every einsum, partition spec and docstring:

    B batch            N query heads               D model width (hidden_size)
    T query length     K key/value heads           F feed-forward width (intermediate_size)
    S key length       G = N / K                   V vocabulary
    L layers           H head dimension            E experts
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.config import LlamaConfig, RopeScaling
    from llama_jax.decoding.beam_hypotheses import BeamSearchOutput
    from llama_jax.decoding.beam_search import beam_search
    from llama_jax.decoding.constraints import Constraint, Grammar
    from llama_jax.decoding.drafts import DraftModel, PromptLookup
    from llama_jax.decoding.generation import generate, stream, warm_up
    from llama_jax.decoding.sampling import Sampling
    from llama_jax.decoding.session import Session
    from llama_jax.decoding.speculative import SpeculativeOutput, speculative_generate
    from llama_jax.decoding.state import DecodeState, GenerateOutput, decode_step, prefill
    from llama_jax.errors import LlamaJaxError
    from llama_jax.forward_options import ForwardOptions
    from llama_jax.inspection.captures import capture
    from llama_jax.loss import next_token_loss, token_logprobs
    from llama_jax.meshes import make_mesh
    from llama_jax.model import forward, init, unstack
    from llama_jax.model_sizes import presets
    from llama_jax.ops.quantization import quantize
    from llama_jax.serving.batcher import Batcher
    from llama_jax.serving.requests import Request
    from llama_jax.sharding import shard_params
    from llama_jax.structured_output.build import grammar
    from llama_jax.taps import sites, with_edit
    from llama_jax.text.conversation import Conversation
    from llama_jax.text.convert import save
    from llama_jax.text.export import export
    from llama_jax.text.model import Model
    from llama_jax.text.pretrained import load, load_params

# Imported lazily: `llama-jax --help` and its error messages do not import JAX.
_PUBLIC_NAMES = {
    "decoding.beam_hypotheses": ("BeamSearchOutput",),
    "decoding.beam_search": ("beam_search",),
    "decoding.constraints": ("Constraint", "Grammar"),
    "structured_output.build": ("grammar",),
    "config": ("LlamaConfig", "RopeScaling"),
    "model_sizes": ("presets",),
    "text.conversation": ("Conversation",),
    "text.convert": ("save",),
    "text.export": ("export",),
    "decoding.state": ("DecodeState", "GenerateOutput", "decode_step", "prefill"),
    "decoding.drafts": ("DraftModel", "PromptLookup"),
    "errors": ("LlamaJaxError",),
    "decoding.generation": ("generate", "stream", "warm_up"),
    "loss": ("next_token_loss", "token_logprobs"),
    "forward_options": ("ForwardOptions",),
    "model": ("forward", "init", "unstack"),
    "text.pretrained": ("load", "load_params"),
    "ops.quantization": ("quantize",),
    "decoding.sampling": ("Sampling",),
    "decoding.session": ("Session",),
    "meshes": ("make_mesh",),
    "serving.batcher": ("Batcher",),
    "serving.requests": ("Request",),
    "sharding": ("shard_params",),
    "taps": ("sites", "with_edit"),
    "inspection.captures": ("capture",),
    "decoding.speculative": ("SpeculativeOutput", "speculative_generate"),
    "text.model": ("Model",),
}
_SUBPACKAGES = (
    "adapters",
    "attention",
    "chat",
    "config",
    "decoding",
    "inspection",
    "eval",
    "hub",
    "kv_cache",
    "layers",
    "loss",
    "model",
    "ops",
    "rope",
    "serving",
    "sharding",
    "structured_output",
    "text",
    "tokenizer",
    "train",
    "weights",
)
_MODULE_OF = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}

__all__ = [
    "Batcher",
    "BeamSearchOutput",
    "Constraint",
    "Conversation",
    "DecodeState",
    "DraftModel",
    "ForwardOptions",
    "GenerateOutput",
    "Grammar",
    "LlamaConfig",
    "LlamaJaxError",
    "Model",
    "PromptLookup",
    "Request",
    "RopeScaling",
    "Sampling",
    "Session",
    "SpeculativeOutput",
    "beam_search",
    "capture",
    "decode_step",
    "export",
    "forward",
    "generate",
    "grammar",
    "init",
    "load",
    "load_params",
    "make_mesh",
    "next_token_loss",
    "prefill",
    "presets",
    "quantize",
    "save",
    "shard_params",
    "sites",
    "speculative_generate",
    "stream",
    "token_logprobs",
    "unstack",
    "warm_up",
    "with_edit",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # slow to import

        return metadata.version("llama-jax")
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES, "__version__"])
