"""Coverage-guided fuzzing of the readers, and regression cases from its findings."""
