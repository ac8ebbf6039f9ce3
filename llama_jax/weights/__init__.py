"""Reads checkpoints in the ecosystem's formats: open one, inspect its headers, load its parameters."""

from llama_jax.weights.gguf_split import read_gguf_metadata
from llama_jax.weights.load import load_params
from llama_jax.weights.open import open_source
from llama_jax.weights.source import Source, TensorInfo

__all__ = ["Source", "TensorInfo", "load_params", "open_source", "read_gguf_metadata"]
