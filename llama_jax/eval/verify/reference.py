"""A Hugging Face directory run by transformers itself, where it is installed: what to compare with."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, InputError
from llama_jax.weights.hf import read_config
from llama_jax.weights.names import Leaf
from llama_jax.weights.source import brief


@dataclasses.dataclass(frozen=True)
class TransformersModel:
    """A model that transformers holds: its tensors, as `weights.Tensors` has them, and its runs.

    Attributes:
      config: the model, as its config.json has it.
      model: transformers' own.
      state: its tensors by Hugging Face's names.
    """

    config: LlamaConfig
    model: Any
    state: Mapping[str, Any]
    stacked: bool = False

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        return np.dtype(str(self.state[leaf.name("hf", layer)].dtype).removeprefix("torch."))

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        tensor = self.state[leaf.name("hf", layer)].float().numpy()  # numpy has no bfloat16 to take it as
        return np.asarray(tensor.astype(self.dtype(leaf, layer), copy=False))

    def run(self, tokens: np.ndarray) -> Recorded:
        """Runs it over tokens int [T] and keeps what its layers gave."""
        torch = importlib.import_module("torch")
        states: list[np.ndarray] = []

        def keep(stream: Any) -> None:
            states.append(stream[0].float().numpy())

        def after(_: Any, __: Any, out: Any) -> None:
            keep(out[0] if isinstance(out, tuple) else out)

        decoder = self.model.model
        # Its own output_hidden_states has the last layer's after the final norm.
        hooks = [decoder.embed_tokens.register_forward_hook(after)]
        hooks += [layer.register_forward_hook(after) for layer in decoder.layers]
        try:
            with torch.inference_mode():
                logits = self.model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return Recorded(states, logits[0].float().numpy())


class Recorded:
    """A run that is over: gives what was recorded, whatever tensors it is fed (see `stream.Run`)."""

    def __init__(self, states: list[np.ndarray], logits: np.ndarray) -> None:
        self._states, self._logits = iter(states), logits

    def embed(self, table: np.ndarray) -> np.ndarray:
        return next(self._states)

    def layer(self, tensors: Mapping[Leaf, np.ndarray]) -> np.ndarray:
        return next(self._states)

    def logits(self, norm: np.ndarray, output: np.ndarray) -> np.ndarray:
        return self._logits


def check_installed() -> None:
    """Checks that transformers can be had.

    Raises:
      InputError: saying how to install it.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{package} is not installed, and the comparison is with it: pip install torch transformers"
            )


def load_transformers(path: Path, dtype: str) -> TransformersModel:
    """Loads a Hugging Face directory with transformers, and nothing from anywhere else.

    Args:
      path: the directory.
      dtype: to hold the weights in and compute in: float32, bfloat16 or float16.

    Raises:
      InputError: if transformers is not installed.
      CheckpointError: if it cannot load the directory, or finds a tensor missing.
    """
    check_installed()
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: transformers reads Hugging Face directories; convert it first: llama-jax convert"
        )
    config = read_config(path / "config.json")
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    with _quiet(transformers):
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # of many kinds, with no common base
            what = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(f"{path}: transformers cannot load it: {what}") from error
    if wrong := sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}):
        # which it would fill with random numbers
        raise CheckpointError(
            f"{path}: transformers finds these tensors missing or misshapen: {brief(wrong, 5)}"
        )
    return TransformersModel(config, model.eval(), model.state_dict())


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps its warnings and progress bars from stderr, for the block."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
