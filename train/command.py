"""The command `llama-jax train`, which is also `python -m llama_jax.train`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from llama_jax.console.parser import UsageError

HELP = """\
usage: llama-jax train CONFIG [--show-batch] [--section.key VALUE ...]

Train a Llama: text to tokenizer, to packed batches, to checkpoints, to text; or finetune one. CONFIG is a
TOML file (see configs/); every key of it can be given on the command line. The same command again resumes
the run, bit for bit, from its newest whole checkpoint.

examples:
  llama-jax train configs/tiny_cpu.toml
  llama-jax train configs/tiny_cpu.toml --train.steps 100 --train.run_dir runs/short
  llama-jax train configs/llama2_7b.toml --data.files 'corpus/*.jsonl' --tokenizer.path tokenizer.model
  llama-jax generate runs/tiny_cpu --prompt "def main("
  llama-jax train configs/sft_smollm2.toml --show-batch

--show-batch prints the first batch instead of training: what is learned, token by token.

RUN_DIR then holds config.toml, metrics.jsonl (a line every log.every steps), evaluations.jsonl, checkpoints/,
the tokenizer, tensorboard/, and loss.png at the end.

exit status: 0 done; 2 bad input, or a checkpoint that cannot be written; 3 the loss was not finite for
train.max_bad_steps steps in a row; 130 after Ctrl-C and 143 after SIGTERM, with everything saved (a second
Ctrl-C stops at once). SIGUSR1 takes a profiler trace of the next train.profile_steps steps.
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command; exits with its status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        if importlib.util.find_spec("optax") is not None:
            _print_keys()
        return
    if argv[0].startswith("-"):
        raise UsageError(f"missing CONFIG before {argv[0]}; see: llama-jax train --help")
    for needed in ("optax", "grain", "tensorboardX", "tomli_w"):
        if importlib.util.find_spec(needed) is None:
            raise UsageError(f"training needs {needed}: pip install 'llama-jax[train]'")

    from .config.read import load_config
    from .launch import first_batch, train
    from .loop import Diverged

    words = [word for word in argv[1:] if word != "--show-batch"]
    config = load_config(argv[0], words)
    if len(words) < len(argv) - 1:
        first_batch(config)
        return
    try:
        stopped = train(config)
    except Diverged as error:
        print("error:", error, file=sys.stderr)
        sys.exit(3)
    if stopped:
        sys.exit(128 + stopped)


def _print_keys() -> None:
    from .config.read import keys

    print("\nsettings and their defaults:")
    for section, entries in keys().items():
        print(f"  [{section}]  " + "  ".join(f"{name}={default}" for name, default in entries))
