"""Helpers of command-line programs: argument parsing, notes, progress bars, one-line errors, loading."""
