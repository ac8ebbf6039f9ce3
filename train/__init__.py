"""The trainer: a program over `llama_jax`, made to be read and forked."""
