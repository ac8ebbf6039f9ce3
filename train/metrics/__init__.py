"""What a run reports: metrics, evaluation, FLOPs, plots."""
