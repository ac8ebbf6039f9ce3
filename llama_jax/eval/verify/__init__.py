"""Comparison of two checkpoints: tensors, predictions, and the layer at which they diverge."""

from llama_jax.eval.verify.report import Outputs, Report, Side, StreamDifference
from llama_jax.eval.verify.run import compare
from llama_jax.eval.verify.text import Text

__all__ = ["Outputs", "Report", "Side", "StreamDifference", "Text", "compare"]
