"""Models by name: the known ones, and repositories on the Hugging Face hub."""
