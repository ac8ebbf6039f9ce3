"""Writes checkpoints: one module per format plans the file layout, and `run` writes any plan."""
