"""Checkpoints as other programs write them, read here and by the program that they are for."""
