"""The reference implementation: a Hugging Face directory run by transformers, if it is installed."""

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
from llama_jax.weights.source import format_list


@dataclasses.dataclass(frozen=True)
class TransformersModel:
    """A model loaded by transformers, with the interface of `weights.tensors.Tensors`.

    Attributes:
      config: the configuration in config.json.
      model: the transformers model.
      state: its state dict.
    """

    config: LlamaConfig
    model: Any
    state: Mapping[str, Any]
    stacked: bool = False

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        return np.dtype(str(self._stored(leaf, layer).dtype).removeprefix("torch."))

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        tensor = self._stored(leaf, layer).float().numpy()  # torch cannot convert bfloat16 to numpy
        return np.asarray(tensor.astype(self.dtype(leaf, layer), copy=False))

    def _stored(self, leaf: Leaf, layer: int | None) -> Any:
        """A tensor of the state dict, which has the experts of a layer in one, gate and up together."""
        if not self.config.num_experts or "feed_forward" not in leaf.path:
            return self.state[leaf.name("hf", layer)]
        prefix = f"model.layers.{layer}.mlp."
        if leaf.expert is None:
            return self.state[f"{prefix}gate.weight"]
        if leaf.path[-1] == "w_down":
            return self.state[f"{prefix}experts.down_proj"][leaf.expert]
        return self.state[f"{prefix}experts.gate_up_proj"][leaf.expert].chunk(2)[leaf.path[-1] == "w_up"]

    def read_rows(self, leaf: Leaf, layer: int | None, begin: int, end: int) -> np.ndarray:
        return self.read(leaf, layer)[begin:end]

    def run(self, tokens: np.ndarray) -> RecordedRun:
        """Runs the model on tokens int [T] and records the residual stream after each layer."""
        torch = importlib.import_module("torch")
        states: list[np.ndarray] = []

        def record(_: Any, __: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            states.append(hidden[0].float().numpy())

        decoder = self.model.model
        # Not output_hidden_states: there the last layer's state is after the final norm.
        hooks = [decoder.embed_tokens.register_forward_hook(record)]
        hooks += [layer.register_forward_hook(record) for layer in decoder.layers]
        try:
            with torch.inference_mode():
                logits = self.model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return RecordedRun(states, logits[0].float().numpy())


class RecordedRun:
    """Replays a recorded run through the interface of `stream.Run`, ignoring the tensors."""

    def __init__(self, states: list[np.ndarray], logits: np.ndarray) -> None:
        self._states, self._logits = iter(states), logits

    def embed(self, table: np.ndarray) -> np.ndarray:
        return next(self._states)

    def layer(self, tensors: Mapping[Leaf, np.ndarray]) -> np.ndarray:
        return next(self._states)

    def logits(self, norm: np.ndarray, output: np.ndarray) -> np.ndarray:
        return self._logits


def check_installed() -> None:
    """Checks that torch and transformers are installed.

    Raises:
      InputError: if not.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{package} is not installed and the comparison needs it; pip install torch transformers"
            )


def load_transformers(path: Path, dtype: str) -> TransformersModel:
    """Loads a Hugging Face directory with transformers, from local files only.

    Args:
      path: the directory.
      dtype: dtype of the parameters and of the computation: float32, bfloat16 or float16.

    Raises:
      InputError: if transformers is not installed.
      CheckpointError: if transformers cannot load the directory, or a tensor is missing.
    """
    check_installed()
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: transformers reads Hugging Face directories; convert it first with llama-jax convert"
        )
    config = read_config(path / "config.json")
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    with _quiet(transformers):
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # of many types without a common base
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(f"{path}: transformers cannot load it: {reason}") from error
    # transformers initializes these randomly.
    if invalid := sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}):
        names = format_list(invalid, 5)
        raise CheckpointError(f"{path}: tensors are missing or of another shape for transformers: {names}")
    return TransformersModel(config, model.eval(), model.state_dict())


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Turns off transformers' warnings and progress bars during the block."""
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
