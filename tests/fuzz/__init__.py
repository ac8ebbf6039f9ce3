"""Coverage-guided fuzzing of the readers, and what it has found."""
