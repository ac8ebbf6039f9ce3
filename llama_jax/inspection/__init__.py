"""What flows inside the model: `capture` reads it, and ready-made edits replace it."""

from llama_jax.inspection.captures import capture
from llama_jax.inspection.edits import ablate, knock_out, patch, prune_heads, steer, together

__all__ = ["ablate", "capture", "knock_out", "patch", "prune_heads", "steer", "together"]
