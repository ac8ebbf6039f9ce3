"""From a batch to a loss: pretraining, SFT, preferences, reward models, heads."""
