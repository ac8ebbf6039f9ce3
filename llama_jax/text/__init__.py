"""Models with tokenizers: `load`, `Model`, `Conversation`, and conversion between checkpoint formats."""
