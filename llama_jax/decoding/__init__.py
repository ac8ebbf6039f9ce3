"""Decoding: sampling, logits processors, generate and stream, beam search, speculative decoding."""
