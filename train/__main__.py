"""`python -m llama_jax.train CONFIG`, which is `llama-jax train CONFIG`."""

import sys

from llama_jax.console.exit_status import exit_status


def run() -> None:
    """Runs the command."""
    from . import command  # Ctrl-C is handled by now

    command.run(sys.argv[1:])


sys.exit(exit_status(run, ends_process=True))
