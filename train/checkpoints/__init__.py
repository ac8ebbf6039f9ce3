"""Checkpoints: Orbax behind one class, with checksums for every file; atomic writes; the run's lock."""
