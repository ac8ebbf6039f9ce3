"""`python -m train CONFIG`, which is `llama-jax train CONFIG`."""

import sys

from llama_jax.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
