"""`llama-jax chat`: a conversation with a model, interactive or with one message per line of stdin."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser
from llama_jax.cli.sampling_flags import add_sampling_flags, check_sampling_flags, sampling_kwargs
from llama_jax.console import loading, terminal
from llama_jax.console.exit_status import report_error
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
    "/help": "show this list",
    "/reset": "clear the conversation",
    "/undo": "remove the last message and its answer",
    "/system TEXT": "set the system prompt from the next turn on; without TEXT, remove it",
    "/quit": "quit, like /exit and Ctrl-D",
}
HELP_NOTES = """\
Each line is a message. Ctrl-C stops an answer, or clears a line that is being typed; on an empty line Ctrl-C
and Ctrl-D quit. To send a message that begins with /, put a space before it. If stdin is not a terminal, each
of its lines is answered in turn.
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    args = _parser().parse(argv)
    if sys.stdin is None:
        raise InputError("stdin is closed; give the messages there, one per line")

    from llama_jax.text.conversation import Conversation

    check_sampling_flags(args)
    model = loading.load(args.model, args.dtype, args.bits, args.adapter, args.tokenizer, args.mesh)
    conversation = Conversation(model, args.system, args.template, cache_dtype=args.cache_dtype)
    _Chat(conversation, args).run()


class _Chat:
    """The read-eval-print loop of the command."""

    def __init__(self, conversation: Conversation, args: argparse.Namespace):
        self.conversation = conversation
        self.args = args
        self.interactive = sys.stdin.isatty()
        self.num_answers = 0

    def run(self) -> None:
        """Processes lines until end of input or `/quit`."""
        if self.interactive:
            # Shells start background jobs with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            terminal.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D quits")
        for line in self.read_terminal() if self.interactive else _read_pipe():
            try:
                if line.startswith("/"):
                    if not self.run_command(line):
                        return
                elif message := line.strip():
                    self.answer(message)
            except LlamaJaxError as error:
                if not self.interactive:
                    raise
                report_error(str(error))

    def answer(self, message: str) -> None:
        """Sends a message to the model and prints the answer as it is generated; Ctrl-C stops it."""
        args, conversation = self.args, self.conversation
        num_messages = len(conversation.messages)
        pieces: list[str] = []
        settings = sampling_kwargs(args)
        settings["seed"] ^= self.num_answers  # so that a repeated question gets a new sample
        self.num_answers += 1
        try:
            for piece in terminal.spin_until_first(
                lambda: conversation.say(
                    message, max_new_tokens=args.max_new_tokens, stop_strings=args.stop_string, **settings
                )
            ):
                pieces.append(piece)
                if not args.json:
                    terminal.write(piece)
        except KeyboardInterrupt:
            conversation.stop()
            if not self.interactive:
                raise
        if args.json:
            output.print_json(
                {
                    "user": message,
                    "assistant": "".join(pieces),
                    "finish_reason": conversation.finish_reason or "interrupted",
                    "prompt_tokens": conversation.prompt_tokens,
                    "reused_tokens": conversation.session.reused,
                }
            )
            sys.stdout.flush()
        else:
            print()
        if len(conversation.messages) == num_messages:
            terminal.note("(stopped before the first token; the message is removed)")

    def run_command(self, line: str) -> bool:
        """Runs a slash command and says what it did; returns False if it is `/quit`."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            commands = "\n".join(f"  {name:<14}{summary}" for name, summary in COMMANDS.items())
            terminal.note(f"{commands}\n{HELP_NOTES}")
        elif command == "/reset":
            self.conversation.reset()
            kept = "" if self.conversation.system is None else "; the system prompt is kept"
            terminal.note(f"(the conversation is cleared{kept})")
        elif command == "/undo":
            self.conversation.undo()
            turns = sum(message["role"] == "user" for message in self.conversation.messages)
            terminal.note(f"(the last message and its answer are removed; {turns} before them are kept)")
        elif command == "/system":
            self.conversation.system = rest.strip() or None
            terminal.note(f"(the system prompt is {'set' if self.conversation.system else 'removed'})")
        else:
            known = [name.split()[0] for name in COMMANDS]
            hint = suggestion(command, known) or f"; the commands are {', '.join(known)}"
            raise UsageError(f"unknown command {command[:40]!r}{hint}")
        return True

    def read_terminal(self) -> Iterator[str]:
        """Yields the lines typed at the terminal, until Ctrl-C or Ctrl-D on an empty line."""
        typed: Callable[[], str] = str
        with contextlib.suppress(ImportError):
            import readline  # gives `input` history and line editing

            typed = readline.get_line_buffer
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        prompt_is_output = sys.stdout.isatty() and not self.args.json
        while True:
            try:
                if prompt_is_output:
                    line = input("> ") + "\n"
                else:
                    print("> ", end="", file=sys.stderr, flush=True)
                    line = sys.stdin.readline()
            except EOFError:
                line = ""
            except KeyboardInterrupt:
                line = ""
                if prompt_is_output and typed():
                    print()  # the half-typed line is dropped, not the conversation
                    continue
            if not line:
                print(file=sys.stdout if prompt_is_output else sys.stderr)
                return
            yield line


def _read_pipe() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            location = f"line {number}, byte {line[error.start]:#04x} at offset {error.start}"
            raise InputError(f"stdin is not UTF-8 text: {location}; convert it first") from None


def _parser() -> ModelParser:
    summary = "Chat with a model; the key/value cache is kept between turns. Type /help to list commands."
    parser = ModelParser("llama-jax chat", summary, EXAMPLES)
    parser.add_model()
    option = parser.add_argument
    option("--system", metavar="TEXT", help="system prompt")
    templates = "llama-2, llama-3, mistral, chatml, or a Jinja file"
    option("--template", metavar="T", help=f"{templates} (default: the model's own)")
    add_sampling_flags(parser, max_new_tokens=512)
    parser.add_adapter()
    parser.add_tokenizer()
    parser.add_dtype()
    parser.add_cache_dtype()
    parser.add_mesh()
    option("--json", action="store_true", help="print one JSON object per turn on stdout, nothing else")
    return parser
