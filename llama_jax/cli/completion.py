"""`llama-jax completion`: a script that completes commands, options and settings in a shell."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence

from llama_jax import cli
from llama_jax.console.parser import Parser
from llama_jax.hub.known import KNOWN

EXAMPLES = """
source <(llama-jax completion bash)     # in ~/.bashrc
source <(llama-jax completion zsh)      # in ~/.zshrc
llama-jax completion fish | source      # in ~/.config/fish/config.fish
"""

_BASH = """\
_llama_jax() {{
  local words="{verbs}" verb="${{COMP_WORDS[1]}}"
  if [[ " {groups} " == *" $verb "* ]] && (( COMP_CWORD > 2 )); then verb="$verb ${{COMP_WORDS[2]}}"; fi
  if (( COMP_CWORD > 1 )); then
    case "$verb" in
{cases}
      *) words="" ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _llama_jax llama-jax"""
_GROUPS = {"tokenizer": ("encode", "decode", "train"), "data": ("prepare",)}
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    summary = "Print a script that completes the arguments of llama-jax."
    parser = Parser("llama-jax completion", summary, EXAMPLES)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    args = parser.parse(argv)
    words = {verb: _words(verb) for verb in cli.SUBCOMMANDS}
    for group, verbs in _GROUPS.items():
        words[group] = list(verbs)
        words |= {f"{group} {verb}": _words(f"{group} {verb}") for verb in verbs}
    words["completion"] += ["bash", "zsh", "fish"]
    if args.shell == "fish":
        print(_fish(words))
    else:
        print((_ZSH if args.shell == "zsh" else "") + _bash(words))


def _words(verb: str) -> list[str]:
    """What may follow a command: the options and settings that its help names, and the known models."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        cli.main([*verb.split(), "--help"])
        if verb in ("train", "data prepare"):
            cli.main(["train", "--help", "all"])
    options = re.findall(r"(?<![\w'-])--[a-z][a-z0-9_-]*(?:\.[a-z_0-9]+)?(?![\w.-])", shown.getvalue())
    models = KNOWN if "MODEL" in shown.getvalue() and verb != "train" else ()
    return sorted({*options, *models} - {"--section.key"})


def _bash(words: dict[str, list[str]]) -> str:
    cases = [f'      "{verb}") words="{" ".join(names)}" ;;' for verb, names in words.items()]
    return _BASH.format(groups=" ".join(_GROUPS), verbs=" ".join(cli.SUBCOMMANDS), cases="\n".join(cases))


def _fish(words: dict[str, list[str]]) -> str:
    lines = [f"complete -c llama-jax -n __fish_use_subcommand -f -a '{verb}'" for verb in cli.SUBCOMMANDS]
    for verb, names in words.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in verb.split())
        lines.append(f"complete -c llama-jax -n '{seen}' -a '{' '.join(names)}'")
    return "\n".join(lines)
