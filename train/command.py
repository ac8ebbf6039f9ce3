"""The command `llama-jax train`, which is also `python -m llama_jax.train`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from llama_jax.console.parser import UsageError

HELP = """\
usage: llama-jax train CONFIG [--show-batch] [--section.key VALUE ...]

Pretrain or finetune a Llama. CONFIG is a TOML file (see configs/); every key can also be set on the command
line. The same command again resumes the run, bit for bit, from its newest intact checkpoint.

examples:
  llama-jax train configs/tiny_cpu.toml
  llama-jax train configs/tiny_cpu.toml --train.steps 100 --train.run_dir runs/short
  llama-jax train configs/llama2_7b.toml --data.files 'corpus/*.jsonl' --tokenizer.path tokenizer.model
  llama-jax generate runs/tiny_cpu --prompt "def main("
  llama-jax train configs/sft_smollm2.toml --show-batch

--show-batch prints the first batch instead of training, and marks the tokens in the loss.

The run directory contains config.toml, metrics.jsonl (a line every log.every steps), evaluations.jsonl,
checkpoints/, the tokenizer, tensorboard/, and loss.png at the end.

exit status: 0 done; 2 bad input, or a checkpoint that cannot be written; 3 the loss was not finite for
train.max_bad_steps consecutive steps; 130 after Ctrl-C and 143 after SIGTERM, with the state saved (a second
Ctrl-C exits immediately). SIGUSR1 takes a profiler trace of the next train.profile_steps steps.
"""


_PACKAGES = ("optax", "grain", "tensorboardX", "tomli_w", "absl", "pyarrow", "array_record")


def run(argv: Sequence[str]) -> None:
    """Runs the command; exits with its status."""
    missing = next((name for name in _PACKAGES if importlib.util.find_spec(name) is None), None)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        if missing is None:
            _print_keys()
        return
    if argv[0].startswith("-"):
        raise UsageError(f"missing CONFIG before {argv[0]}; see: llama-jax train --help")
    if missing is not None:
        raise UsageError(
            f"training needs {missing}: pip install 'llama-jax[train]', or in a clone -e '.[train]'"
        )

    from .config.read import load_config
    from .launch import print_first_batch, train
    from .loop import Diverged

    overrides = [argument for argument in argv[1:] if argument != "--show-batch"]
    config = load_config(argv[0], overrides)
    if "--show-batch" in argv[1:]:
        print_first_batch(config)
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
