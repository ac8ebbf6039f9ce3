"""Text in, text out: `load`, `Model`, `Conversation`, and conversion between checkpoint formats."""
