"""`python -m llama_jax.train CONFIG`, which is `llama-jax train CONFIG`."""

import sys

from llama_jax.console.exit_status import exit_status

from . import command

sys.exit(exit_status(lambda: command.run(sys.argv[1:])))
