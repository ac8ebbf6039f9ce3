"""The command `llama-jax train`, which is also `python -m llama_jax.train`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from llama_jax.console.parser import UsageError, suggestion

from .xla_flags import check_xla_flags

HELP = """\
usage: llama-jax train CONFIG [--show-batch] [--section.key VALUE ...]

Pretrain or finetune a Llama. CONFIG is a TOML file, or the name of a configuration that is shipped
(--list-configs); every key can also be set on the command line. The same command again resumes the run, bit
for bit, from its newest intact checkpoint.

  --show-batch      print the first batch instead of training, and mark the tokens in the loss
  --list-configs    list the configurations that are shipped
  --help SECTION    print the meanings of a section's settings; of one, as in --help train.steps; or of all

examples:
  llama-jax train tiny_cpu
  llama-jax train configs/tiny_cpu.toml --train.steps 100 --train.run_dir runs/short
  llama-jax train llama2_7b --data.files 'corpus/*.jsonl' --tokenizer.path tokenizer.model
  llama-jax train sft_smollm2 --show-batch
  llama-jax generate runs/tiny_cpu --prompt "def main("

The run directory contains config.toml, metrics.jsonl (a line every log.every steps), evaluations.jsonl,
checkpoints/, the tokenizer, tensorboard/, and loss.png at the end.

exit status: 0 done; 2 bad input; 3 the loss was not finite for train.max_bad_steps consecutive steps; 195 a
checkpoint or the metrics could not be written, or a disk failed; 196 no step for too long; 197 a device, or
the connection to another process, failed; 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, with the
state saved (a second Ctrl-C exits immediately). 195 to 197 are worth another start, 2 and 3 are not. SIGUSR1
profiles the next train.profile_steps steps.

settings, by section (--help SECTION prints their meanings and defaults):
"""

CONFIGS = Path(__file__).parent / "configs"
_PACKAGES = ("optax", "grain", "tensorboardX", "tomli_w", "absl", "pyarrow", "array_record")
_FLAGS = ("--show-batch", "--list-configs")


def run(argv: Sequence[str]) -> None:
    """Runs the command; exits with its status."""
    overrides, others = split_settings(argv)
    asked = [option for option in others if option in ("-h", "--help")]
    if asked or not argv:
        after = argv[argv.index(asked[0]) + 1 :][:1] if asked else ()
        _print_help("".join(word for word in after if not word.endswith(".toml")))
        return
    if "--list-configs" in others:
        _list_configs()
        return
    _check_options(others)
    config_names = [argument for argument in others if argument not in _FLAGS]
    if not config_names:
        shipped = ", ".join(_shipped())
        raise UsageError(f"missing CONFIG: a TOML file, or {shipped}; see: llama-jax train --help")
    check_packages()
    check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    from .config.read import load_config
    from .launch import train
    from .peers import crash_status
    from .show_batch import print_first_batch

    if len(config_names) > 1:
        raise UsageError(f"unexpected argument {config_names[1]!r}; settings are --section.key VALUE")
    config = load_config(find_config(config_names[0]), overrides)
    if "--show-batch" in others:
        print_first_batch(config)
        return
    try:
        stopped = train(config)
    except (RuntimeError, ValueError) as error:
        if (status := crash_status(error)) is None:
            raise
        traceback.print_exc()
        sys.exit(status)
    if stopped:
        sys.exit(128 + stopped)


def check_packages() -> None:
    """Raises a `UsageError` if the extra `train` is not installed."""
    missing = next((package for package in _PACKAGES if importlib.util.find_spec(package) is None), None)
    if missing is not None:
        raise UsageError(
            f"training needs {missing}: pip install 'llama-jax[train]', or in a clone -e '.[train]'"
        )


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates settings, `--section.key VALUE` or `--section.key=VALUE`, from the other arguments."""
    settings: list[str] = []
    others: list[str] = []
    pending = list(argv)
    while pending:
        argument = pending.pop(0)
        option, equals, _ = argument.partition("=")
        if not option.startswith("--") or "." not in option:
            others.append(argument)
            continue
        settings.append(argument)
        if not equals and pending:
            settings.append(pending.pop(0))
    return settings, others


def _check_options(others: Sequence[str]) -> None:
    """Raises a `UsageError` for an option that is neither a flag nor a setting with its section."""
    from .config.help import names

    for option in others:
        if option.startswith("-") and option not in _FLAGS:
            option = option.partition("=")[0]
            hint = suggestion(option, [*names(), *_FLAGS]) or "; see: llama-jax train --help"
            raise UsageError(f"unknown setting {option}{hint}")


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(CONFIGS.glob("*.toml"))}


def find_config(name: str) -> Path:
    """Returns the path of a configuration file; a shipped one may be given by its name, or as in a clone."""
    from llama_jax.storage import as_path

    path, shipped = as_path(name), _shipped()
    if path.exists() and not path.is_dir():
        return path
    if path.stem in shipped and str(path.parent) in (".", "configs"):
        return shipped[path.stem]
    problem = "is a folder" if path.is_dir() else "no such file"
    hint = suggestion(path.stem, shipped) or f"; give a TOML file, or one of {', '.join(shipped)}"
    raise UsageError(f"{name}: {problem}{hint}")


def _list_configs() -> None:
    for name, path in _shipped().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name}\n  {first.strip('# :')}\n  {path}")


def _print_help(topic: str) -> None:
    from .config.help import describe, overview

    width = min(shutil.get_terminal_size((110, 24)).columns, 110)
    print(describe(topic, width) if topic else HELP + overview(width))
