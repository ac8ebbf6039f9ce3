"""`python -m llama_jax.cli` is `llama-jax`."""

import sys

from llama_jax.cli import main

sys.exit(main())
