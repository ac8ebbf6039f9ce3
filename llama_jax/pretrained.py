"""A model ready to use: `load` takes a path or a known name; a `Model` turns text into text."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax import known
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, InputError, TokenizerError
from llama_jax.generation import generate, stream
from llama_jax.sampling import Sampling
from llama_jax.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from llama_jax.weights import load_params, open_source

DTYPES = ("float32", "bfloat16", "float16")
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being read


class Settings(TypedDict, total=False):
    """The keyword arguments of `Model.generate` and `Model.stream`, described there."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Model:
    """A Llama with its weights and vocabulary.

    Attributes:
      config: what the model is made of.
      params: its parameters, as `forward` and `generate` take them.
      tokenizer: its vocabulary.
      path: where it was loaded from.
      mesh: the mesh its parameters are laid out over, or None.
    """

    config: LlamaConfig
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    path: Path
    mesh: Mesh | None = None

    @overload
    def generate(self, prompt: str, **settings: Unpack[Settings]) -> str: ...
    @overload
    def generate(self, prompt: list[str], **settings: Unpack[Settings]) -> list[str]: ...
    def generate(
        self,
        prompt: str | list[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Continues a text, or several at once.

        Args:
          prompt: the text; several are decoded as one batch, and each comes out as it would alone.
          max_new_tokens: stop after this many tokens, if no end of text comes sooner.
          temperature: 0 takes the likeliest token every time.
          top_k: sample among the likeliest k alone; 0 is all.
          top_p: sample among the fewest tokens whose probabilities sum to p (arXiv 1904.09751).
          min_p: drop tokens less than this times as likely as the likeliest.
          repetition_penalty: above 1 makes tokens already in the text less likely.
          seed: of the random choices.

        Returns:
          The continuation without the prompt; a list of them for a list of prompts.

        Raises:
          InputError: for an empty prompt, one too long, or a setting out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts:
            raise InputError("there are no prompts: give a text, or a list of at least one")
        rows = [self.encode_prompt(text) for text in prompts]
        tokens, lengths = pad_right(rows)
        sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        with self._on_mesh():
            out = generate(
                self.config,
                self.params,
                tokens,
                lengths,
                _key(seed),
                sampling,
                max_new_tokens=max_new_tokens,
                eos_id=self.tokenizer.eos_ids,
            )
        new, counts = np.asarray(out.tokens), np.asarray(out.lengths)
        texts = [self._continuation(ids, new[row, : counts[row]]) for row, ids in enumerate(rows)]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Like `generate` for one text, yielding pieces of the continuation as they are produced."""
        ids = self.encode_prompt(prompt)
        sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        for _, text in self.stream_tokens(ids, sampling, max_new_tokens=max_new_tokens, seed=seed):
            if text:
                yield text

    def stream_tokens(
        self, ids: Sequence[int], sampling: Sampling, *, max_new_tokens: int, seed: int = 0
    ) -> Iterator[tuple[int, str]]:
        """Continues one row of ids, token by token.

        Yields:
          Each new token's id, and the text that it completes: empty within a character.
        """
        tokens, lengths = pad_right([ids])
        with self._on_mesh():
            steps = stream(
                self.config,
                self.params,
                tokens,
                lengths,
                _key(seed),
                sampling,
                max_new_tokens=max_new_tokens,
                eos_id=self.tokenizer.eos_ids,
            )
        text = self._decoder_after(ids)
        for count in range(1, max_new_tokens + 1):
            with self._on_mesh():
                token_b, _ = next(steps)
            token = int(token_b[0])
            last = count == max_new_tokens or token in self.tokenizer.eos_ids
            yield token, text.push(token) + (text.flush() if last else "")
            if last:
                return

    def encode_prompt(self, text: str) -> list[int]:
        """Returns a prompt's ids, with the vocabulary's own rule for the token that begins a text.

        Raises:
          InputError: if there are none.
        """
        ids = self.tokenizer.encode(text)
        if not ids:
            raise InputError(
                "the prompt is empty, and no token begins a text in this vocabulary; give at least a word"
            )
        return ids

    def _continuation(self, prompt: Sequence[int], new: np.ndarray) -> str:
        text = self._decoder_after(prompt)
        return text.extend(new) + text.flush()

    def _decoder_after(self, prompt: Sequence[int]) -> StreamDecoder:
        # SentencePiece drops the space before a text's first piece; a continuation's first piece keeps it.
        text = self.tokenizer.stream()
        text.extend(prompt)
        return text

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def load(
    name_or_path: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    stacked: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Loads a model: weights, configuration and vocabulary.

    Args:
      name_or_path: a known name (`llama_jax.known.KNOWN`), fetched on first use, or a path: a GGUF file,
        a Hugging Face directory, a training run's directory or one of its checkpoints, or a llama2.c `.bin`
        with its tokenizer beside it.
      dtype: the type to hold the weights in and to compute in: float32, bfloat16 or float16.
      mesh: lay the parameters out over these devices (`llama_jax.sharding.make_mesh`).
      stacked: hold each layer leaf as one [L, ...] array, as `init` does. Otherwise `params["layers"]` is a
        tuple with one tree a layer, which every function here takes as well, and which generation reads
        where it lies: with stacked leaves each call of `generate` makes a second copy of the weights.
      progress: called with (bytes done, bytes in all, what is being read) as data arrives.

    Returns:
      The model.

    Raises:
      CheckpointError: for a name that is not known, a path that is not there, or weights that do not fit.
      TokenizerError: for a vocabulary that is missing, unreadable, or of another size than the model's.
      InputError: for another dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    path = resolve(name_or_path, progress)
    source = open_source(path)
    tokenizer = load_tokenizer(source.home or path)
    if tokenizer.vocab_size != source.config.vocab_size:
        raise TokenizerError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {source.config.vocab_size}; "
            "put the tokenizer that the model was trained with beside it"
        )
    params = load_params(source, dtype=jnp.dtype(dtype), mesh=mesh, stacked=stacked, progress=progress)
    return Model(source.config, params, tokenizer, path, mesh)


def resolve(name_or_path: str | Path, progress: Progress | None = None) -> Path:
    """Returns the path of a checkpoint, fetching a known model that is not here yet.

    Raises:
      CheckpointError: for a name that is not known or a path that is not there, suggesting the closest name.
    """
    name = str(name_or_path)
    if name in known.KNOWN:
        return known.fetch(name, progress=progress)
    try:
        path = Path(name_or_path).expanduser()
        if name and path.exists():  # Path("") would be the current folder
            return path
    except PermissionError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}; check its permissions") from None
    except (OSError, RuntimeError):  # no such user's home, a name too long, ...
        pass
    if len(name) > 200:
        name = name[:197] + "..."
    if close := difflib.get_close_matches(name, known.KNOWN, n=1):
        raise CheckpointError(f"{name!r} is neither a file nor a known model; did you mean {close[0]}?")
    raise CheckpointError(
        f"{name!r} is neither a file nor a known model; give a path, or one of: {', '.join(known.KNOWN)}"
    )


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Lays ragged rows of ids side by side.

    Returns:
      tokens [B, T] int32, right-padded with 0, and their lengths [B] int32.

    Raises:
      InputError: for an id that no vocabulary has.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(lengths)), np.int32)
    for row, ids in enumerate(rows):
        try:
            tokens[row, : len(ids)] = ids
        except OverflowError:
            raise InputError(
                f"row {row} has the token id {max(ids, key=abs)}, beyond any vocabulary; ids are below 2^31"
            ) from None
    return jnp.asarray(tokens), jnp.asarray(lengths)


def _key(seed: int) -> jax.Array:
    try:
        return jax.random.key(np.int64(operator.index(seed)))
    except (TypeError, OverflowError):
        what = "a whole number of at most 64 bits"
        raise InputError(f"seed is {str(seed)[:40]}; it must be {what}") from None


def _sampling(
    temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float
) -> Sampling:
    return Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
