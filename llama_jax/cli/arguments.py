"""Arguments that several verbs share."""

from __future__ import annotations

from llama_jax.console.parser import Parser, whole

MODEL_HELP = """\
MODEL is a known name (see: llama-jax models) or a path: a .gguf file, a Hugging Face directory
(config.json and safetensors), a Meta directory (params.json and consolidated.*.pth), the directory of a
training run (its newest checkpoint) or of one of its checkpoints, or a llama2.c .bin file with its tok*.bin
beside it; or, with the hub extra, OWNER/NAME[@REVISION][:FILE.gguf] on the Hugging Face hub.
"""


class ModelParser(Parser):
    """The arguments of a verb that takes a MODEL."""

    def add_model(self) -> None:
        """Adds the MODEL argument, and says below what it may be."""
        self.add_argument("model", metavar="MODEL", help="a known name or a path, see below")
        self.epilog = f"{MODEL_HELP}\n{self.epilog}"

    def add_adapter(self) -> None:
        """Adds --adapter."""
        self.add_argument(
            "--adapter",
            metavar="PATH",
            help="put an adapter on the model: its directory, or that of the run that made it",
        )

    def add_dtype(self) -> None:
        """Adds --dtype and --bits."""
        self.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            default="float32",
            help="hold the weights and compute in this type (default: float32)",
        )
        self.add_argument(
            "--bits",
            type=whole,
            choices=(4, 8),
            help="hold the matrices in 8 or 4 bits (8 is faster on a CPU)",
        )

    def add_cache_dtype(self) -> None:
        """Adds --cache-dtype."""
        self.add_argument(
            "--cache-dtype",
            choices=("float32", "bfloat16", "float16", "int8"),
            help="hold keys and values in this type (default: --dtype)",
        )
