"""Reinforcement learning: prompts -> rollouts -> rewards -> advantages -> batches for the trainer's own step.

prompts.py reads the prompts, in an order that is a function of the seed alone; sampler.py samples completions
with the library's decoding on the training arrays; exact.py makes their log-probabilities those of the
trainer (scoring.py), bit for bit; judge.py rewards them, by functions in worker processes (rewards.py,
worker.py; builtin_rewards.py has some) and by models (reward_models.py); advantages.py is arithmetic,
critic.py has PPO's values; rollouts.py puts them together for the loop, as rows of packing.py, which
rolled.py keeps in checkpoints, and student.py does for on-policy distillation; samples.py writes and prints
what was sampled. The losses are in `objectives/`.
"""
