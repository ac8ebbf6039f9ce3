"""Measures of a model: whether two checkpoints hold the same one, and how fast it runs here."""
