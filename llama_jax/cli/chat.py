"""`llama-jax chat`: a conversation with a model, at a terminal or line by line from stdin."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser
from llama_jax.cli.settings import add_settings, check_settings, settings_of
from llama_jax.console import loading, terminal
from llama_jax.console.exit_status import report
from llama_jax.console.parser import UsageError, suggestion
from llama_jax.errors import InputError, LlamaJaxError

if TYPE_CHECKING:
    from llama_jax.text.conversation import Conversation

EXAMPLES = """
llama-jax chat smollm2-135m
llama-jax chat smollm2-135m --system "Answer in one sentence." --temperature 0.7 --top-p 0.9
printf 'What is the capital of France?\\nAnd of Italy?\\n' | llama-jax chat smollm2-135m
llama-jax chat smollm2-135m --json < questions.txt
"""

COMMANDS = {
    "/help": "this list",
    "/reset": "forget what was said",
    "/undo": "take back the last question and its answer",
    "/system TEXT": "set the system prompt for the turns to come; without TEXT, none",
    "/quit": "leave, as Ctrl-D does",
}
NOTES = """\
Each line is a message. Ctrl-C stops an answer; at the prompt it leaves, and so does Ctrl-D. A space before a
line that begins with / makes it a message. Where stdin is no terminal its lines are taken one after another.
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    args = _parser().parse(argv)
    if sys.stdin is None:
        raise InputError("stdin is closed; give the messages there, one a line")

    from llama_jax.text.conversation import Conversation

    check_settings(args)
    model = loading.load(args.model, args.dtype, args.bits, args.adapter)
    conversation = Conversation(model, args.system, args.template, cache_dtype=args.cache_dtype)
    _Chat(conversation, args).run()


class _Chat:
    """One run of the command."""

    def __init__(self, conversation: Conversation, args: argparse.Namespace):
        self.conversation = conversation
        self.args = args
        self.at_terminal = sys.stdin.isatty()
        self.asked = 0

    def run(self) -> None:
        """Takes lines until there are no more, or one says to leave."""
        if self.at_terminal:
            # A shell that starts a program in the background has it ignore Ctrl-C from then on.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            terminal.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        for line in self.typed_lines() if self.at_terminal else _piped_lines():
            try:
                if line.startswith("/"):
                    if not self.obey(line):
                        return
                elif message := line.strip():
                    self.ask(message)
            except LlamaJaxError as error:
                if not self.at_terminal:
                    raise
                report(str(error))

    def ask(self, message: str) -> None:
        """Says something to the model and prints its answer, whole or until Ctrl-C."""
        args, conversation = self.args, self.conversation
        before = len(conversation.messages)
        said: list[str] = []
        settings = settings_of(args)
        settings["seed"] ^= self.asked  # a question that is asked again is answered anew
        self.asked += 1
        try:
            for piece in conversation.say(
                message, max_new_tokens=args.max_new_tokens, stop_strings=args.stop_string, **settings
            ):
                said.append(piece)
                if not args.json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            conversation.stop()
            if not self.at_terminal:
                raise
        if args.json:
            output.print_json(
                {
                    "user": message,
                    "assistant": "".join(said),
                    "finish_reason": conversation.finish_reason or "interrupted",
                    "prompt_tokens": conversation.prompt_tokens,
                    "reused_tokens": conversation.session.reused,
                }
            )
            sys.stdout.flush()
        else:
            print()
        if len(conversation.messages) == before:
            terminal.note("(stopped before the answer began; the question is taken back)")

    def obey(self, line: str) -> bool:
        """Does what a command says; returns whether to go on."""
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            terminal.note("\n".join(f"  {name:<14}{does}" for name, does in COMMANDS.items()) + "\n" + NOTES)
        elif command == "/reset":
            self.conversation.reset()
        elif command == "/undo":
            self.conversation.undo()
        elif command == "/system":
            self.conversation.system = rest.strip() or None
        else:
            known = [name.split()[0] for name in COMMANDS]
            meant = suggestion(command, known) or f"; the commands are {', '.join(known)}"
            raise UsageError(f"unknown command {command[:40]!r}{meant}")
        return True

    def typed_lines(self) -> Iterator[str]:
        """Yields what is typed at the terminal, until Ctrl-C or Ctrl-D at the prompt."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # history and editing for `input`
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        prompt_is_output = sys.stdout.isatty() and not self.args.json
        while True:
            try:
                if prompt_is_output:
                    line = input("> ") + "\n"
                else:
                    print("> ", end="", file=sys.stderr, flush=True)
                    line = sys.stdin.readline()
            except (EOFError, KeyboardInterrupt):
                line = ""
            if not line:
                print(file=sys.stdout if prompt_is_output else sys.stderr)
                return
            yield line


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            where = f"line {number}, byte {line[error.start]:#04x} at offset {error.start}"
            raise InputError(f"stdin is not UTF-8 text: {where}; convert it first") from None


def _parser() -> ModelParser:
    summary = "Talk with a model; each turn runs only what is new. /help at the prompt lists the commands."
    parser = ModelParser("llama-jax chat", summary, EXAMPLES)
    parser.add_model()
    option = parser.add_argument
    option("--system", metavar="TEXT", help="a system prompt")
    option("--template", metavar="T", help="llama-2, chatml, or a file in Jinja (default: the model's own)")
    add_settings(parser, max_new_tokens=512)
    parser.add_adapter()
    parser.add_dtype()
    parser.add_cache_dtype()
    option("--json", action="store_true", help="print one JSON object a turn on stdout, nothing else")
    return parser
