"""Arguments shared by several subcommands."""

from __future__ import annotations

import sys

from llama_jax.console.parser import Parser, parse_int
from llama_jax.errors import InputError

MODEL_HELP = """\
MODEL is a known name (see: llama-jax models) or a path: a .gguf file, a Hugging Face directory
(config.json and safetensors), a Meta directory (params.json and consolidated.*.pth), the directory of a
training run (its latest checkpoint) or of one of its checkpoints, or a llama2.c .bin file with its tok*.bin
in the same directory; or, with the hub extra, OWNER/NAME[@REVISION][:FILE.gguf] on the Hugging Face Hub.
"""


DTYPE_ABBREVIATIONS = {
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
}


class ModelParser(Parser):
    """Argument parser of a subcommand that takes a MODEL."""

    def add_model(self) -> None:
        """Adds the MODEL argument, and describes the accepted forms in the epilog."""
        self.add_argument("model", metavar="MODEL", help="a known name or a path, see below")
        self.epilog = f"{MODEL_HELP}\n{self.epilog}"

    def add_adapter(self) -> None:
        """Adds --adapter."""
        self.add_argument(
            "--adapter",
            metavar="PATH",
            help="apply an adapter to the model: its directory, that of its training run, or OWNER/NAME",
        )

    def add_tokenizer(self) -> None:
        """Adds --tokenizer."""
        self.add_argument(
            "--tokenizer",
            metavar="PATH",
            help="read the tokenizer from this file, directory or known model (default: MODEL's own)",
        )

    def add_dtype(self) -> None:
        """Adds --dtype and --bits."""
        self.add_argument(
            "--dtype",
            type=full_dtype,
            choices=("float32", "bfloat16", "float16"),
            default="float32",
            help="dtype of the weights and of the computation (default: float32)",
        )
        self.add_argument(
            "--bits",
            type=parse_int,
            choices=(4, 8),
            help="quantize the weight matrices to 8 or 4 bits (8 is faster on a CPU)",
        )

    def add_cache_dtype(self) -> None:
        """Adds --cache-dtype."""
        self.add_argument(
            "--cache-dtype",
            type=full_dtype,
            choices=("float32", "bfloat16", "float16", "int8", "float8_e4m3fn"),
            help="dtype of the key/value cache; fp8 is float8_e4m3fn (default: --dtype)",
        )

    def add_mesh(self) -> None:
        """Adds --mesh."""
        self.add_argument(
            "--mesh",
            metavar="AXIS=N,...",
            help="shard the model over all devices, as in tensor=8, or context=8 for long prompts",
        )


def full_dtype(name: str) -> str:
    """Returns the full name of a dtype that is abbreviated, as in `bf16` (an argparse `type`)."""
    return DTYPE_ABBREVIATIONS.get(name, name)


def read_stdin() -> str:
    """Reads a text from stdin.

    Raises:
      InputError: if stdin is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise InputError("stdin is closed; give the text as an argument")
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        location = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise InputError(f"stdin is not UTF-8 text: {location}; convert it first") from None


def read_text(name: str, max_bytes: int | None = None) -> str:
    """Reads a text file, or its first `max_bytes`.

    Raises:
      InputError: if it cannot be read, or is not UTF-8.
    """
    from llama_jax.storage import as_path

    try:
        with as_path(name).expanduser().open("rb") as file:
            data = file.read(-1 if max_bytes is None else max_bytes)
            truncated = max_bytes is not None and bool(file.read(1))
    except (OSError, RuntimeError, ValueError) as error:  # the last two: unknown ~user, NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot be read: {reason}; check the path") from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if truncated and error.start >= len(data) - 3:  # truncated within a character
            return data[: error.start].decode()
        location = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise InputError(f"{name}: is not UTF-8 text: {location}; convert it first") from None
