"""Evaluation: perplexity, tasks, retrieval in long texts; comparison of two checkpoints; throughput."""
