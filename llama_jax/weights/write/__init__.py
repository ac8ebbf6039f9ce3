"""Writing checkpoints: one file a format plans what is written where, and one runner writes any plan."""
