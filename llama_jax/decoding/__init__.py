"""From a request to tokens: sampling, logits processors, generation, beam search, speculative decoding."""
