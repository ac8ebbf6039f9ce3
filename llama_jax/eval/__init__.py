"""Evaluation: comparison of two checkpoints, and throughput benchmarks."""
