"""Grammars from regular expressions, JSON schemas and choices: automata over the tokens of a vocabulary."""
