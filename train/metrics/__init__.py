"""A run's metrics: logging, evaluation, FLOPs, plots."""
