"""Models by name: known models, and repositories on the Hugging Face Hub."""
