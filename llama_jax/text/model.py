"""Text in, text out: a `Model` is a Llama with its vocabulary, and what it can be asked to write."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments
from llama_jax.decoding.arguments import pad_right, random_key
from llama_jax.decoding.beam_search import EarlyStopping, beam_search
from llama_jax.decoding.drafts import Draft, DraftModel
from llama_jax.decoding.generation import generate, stream
from llama_jax.decoding.sampling import Sampling
from llama_jax.decoding.speculative import SpeculativeOutput, speculative_generate
from llama_jax.errors import InputError
from llama_jax.text.stop_strings import StopStrings
from llama_jax.tokenizer import StreamDecoder, Tokenizer


class Settings(TypedDict, total=False):
    """How to choose each token: the fields of `Sampling`, which describes them, and the seed.

    The temperature is 0 if it is not given: the likeliest token every time.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    min_new_tokens: int
    suppress_tokens: Sequence[int]
    forced_tokens: Sequence[int]
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
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        stop_strings: str | Sequence[str] = ...,
        num_beams: int = ...,
        length_penalty: float = ...,
        early_stopping: EarlyStopping = ...,
        draft: Draft | Model | None = ...,
        num_draft_tokens: int = ...,
        cache_dtype: str | None = ...,
        **settings: Unpack[Settings],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        *,
        max_new_tokens: int = ...,
        stop_strings: str | Sequence[str] = ...,
        num_beams: int = ...,
        length_penalty: float = ...,
        early_stopping: EarlyStopping = ...,
        draft: Draft | Model | None = ...,
        num_draft_tokens: int = ...,
        cache_dtype: str | None = ...,
        **settings: Unpack[Settings],
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompt: str | list[str], *, num_return_sequences: int, **settings: Any
    ) -> list[str] | list[list[str]]: ...
    def generate(
        self,
        prompt: str | list[str],
        *,
        max_new_tokens: int = 64,
        stop_strings: str | Sequence[str] = (),
        num_return_sequences: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        draft: Draft | Model | None = None,
        num_draft_tokens: int = 8,
        cache_dtype: str | None = None,
        **settings: Any,
    ) -> Any:
        """Continues a text, or several at once.

        Args:
          prompt: the text; several are decoded as one batch, and each comes out as it would alone.
          max_new_tokens: stop after this many tokens, if no end of text comes sooner.
          stop_strings: end a text before the first of these.
          num_return_sequences: give a list of so many continuations of each prompt.
          num_beams: follow so many texts and give the best: beam search, which leaves nothing to chance.
          length_penalty: for beams, see `beam_search`; above 0 favours long texts.
          early_stopping: for beams, likewise.
          draft: judge several drafted tokens in each run of the model, see `speculate`: the same text
            sooner. `PromptLookup()` where the text repeats what it has said; or a smaller model.
          num_draft_tokens: how many at a time.
          cache_dtype: hold keys and values in float32, bfloat16, float16 or int8.
          **settings: how to choose each token, see `Settings`: `temperature=0.8, top_p=0.95, seed=1`.

        Returns:
          The continuation without the prompt; a list of them for a list of prompts; with
          `num_return_sequences` a list of so many in the place of each.

        Raises:
          InputError: for an empty prompt, one too long, or a setting out of range, unknown, or at odds
            with another.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts:
            raise InputError("there are no prompts: give a text, or a list of at least one")
        rows = [self.encode_prompt(text) for text in prompts]
        tokens, lengths = pad_right(rows)
        sampling, key = self.settings(**settings)
        stops = StopStrings(stop_strings)
        count = 1 if num_return_sequences is None else num_return_sequences
        owners = [row for row in rows for _ in range(arguments.whole_number("num_return_sequences", count))]
        shared: dict[str, Any] = {"max_new_tokens": max_new_tokens, "cache_dtype": cache_dtype}
        whole = {**shared, "eos_id": self.tokenizer.eos_ids, "num_return_sequences": count}
        prompts_b = (self.config, self.params, tokens, lengths)
        if num_beams != 1:
            for name, given in (("stop_strings", stops.any), ("draft", draft is not None)):
                if given:
                    raise InputError(f"{name} and num_beams do not go together; leave one of them out")
            with self.on_mesh():
                found = beam_search(
                    *prompts_b,
                    num_beams,
                    length_penalty=length_penalty,
                    early_stopping=early_stopping,
                    sampling=sampling,
                    **whole,
                )
            new, counts = (np.asarray(x).reshape(-1, *x.shape[2:]) for x in (found.tokens, found.lengths))
        elif draft is not None:
            out = self.speculate(
                owners, sampling, key, draft=draft, num_draft_tokens=num_draft_tokens, **shared
            ).generation
            new, counts = np.asarray(out.tokens), np.asarray(out.lengths)
        elif stops.any:
            texts = self._until_stopped(prompts_b, key, sampling, stop_strings, whole, owners)
            return _nested(texts, count, prompt, num_return_sequences)
        else:
            with self.on_mesh():
                out = generate(*prompts_b, key, sampling, **whole)
            new, counts = np.asarray(out.tokens), np.asarray(out.lengths)
        texts = [self.continuation(ids, new[at, : counts[at]], stop_strings) for at, ids in enumerate(owners)]
        return _nested(texts, count, prompt, num_return_sequences)

    def speculate(
        self,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        key: jax.Array | None = None,
        *,
        draft: Draft | Model,
        num_draft_tokens: int = 8,
        max_new_tokens: int,
        cache_dtype: str | None = None,
    ) -> SpeculativeOutput:
        """Continues rows of ids by `speculative_generate`, which says what comes out.

        Args:
          rows: the ids of each prompt.
          sampling: settings, as from `settings`.
          key: likewise; of seed 0 if None.
          draft: `PromptLookup`, `DraftModel`, or a smaller `Model` of the same vocabulary.
          num_draft_tokens: how many drafts a run of the model judges.
          max_new_tokens: at most so many a row.
          cache_dtype: as for `generate`.

        Raises:
          InputError: as `speculative_generate`; for a model whose ids stand for other texts.
        """
        if isinstance(draft, Model):
            self._check_vocabulary(draft)
            draft = DraftModel(draft.config, draft.params)
        tokens, lengths = pad_right(rows)
        with self.on_mesh():
            return speculative_generate(
                self.config,
                self.params,
                tokens,
                lengths,
                random_key(0) if key is None else key,
                sampling,
                draft=draft,
                num_draft_tokens=num_draft_tokens,
                max_new_tokens=max_new_tokens,
                eos_id=self.tokenizer.eos_ids,
                cache_dtype=cache_dtype,
            )

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        stop_strings: str | Sequence[str] = (),
        cache_dtype: str | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[str]:
        """Like `generate` for one text, yielding pieces of the continuation as they are produced."""
        ids = self.encode_prompt(prompt)
        sampling, key = self.settings(**settings)
        stops = StopStrings(stop_strings)
        steps = self.stream_tokens(ids, sampling, key, max_new_tokens=max_new_tokens, cache_dtype=cache_dtype)
        for _, text in steps:
            shown, stopped = stops.push(text)
            if shown:
                yield shown
            if stopped:
                return
        if rest := stops.flush():
            yield rest

    def stream_tokens(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        key: jax.Array | None = None,
        *,
        max_new_tokens: int,
        cache_dtype: str | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Continues one row of ids, token by token.

        Yields:
          Each new token's id, and the text that it completes: empty within a character.
        """
        tokens, lengths = pad_right([ids])
        with self.on_mesh():
            steps = stream(
                self.config,
                self.params,
                tokens,
                lengths,
                random_key(0) if key is None else key,
                sampling,
                max_new_tokens=max_new_tokens,
                eos_id=self.tokenizer.eos_ids,
                cache_dtype=cache_dtype,
            )
        text = self._decoder_after(ids)
        for count in range(1, max_new_tokens + 1):
            with self.on_mesh():
                token_b, _ = next(steps)
            token = int(token_b[0])
            last = count == max_new_tokens or token in self.tokenizer.eos_ids
            yield token, text.push(token) + (text.flush() if last else "")
            if last:
                return

    def settings(self, **settings: Unpack[Settings]) -> tuple[Sampling, jax.Array]:
        """Settings as `generate` takes them, for the functions on arrays: a `Sampling` and a key.

        Raises:
          InputError: for a setting that there is not, with the nearest there is, or one out of range.
        """
        for name in settings:
            if name not in Settings.__annotations__:
                close = difflib.get_close_matches(name, Settings.__annotations__, n=1)
                hint = (
                    f"did you mean {close[0]}?"
                    if close
                    else f"there are {', '.join(Settings.__annotations__)}"
                )
                raise InputError(f"setting {name!r} is unknown; {hint}")
        seed = settings.pop("seed", 0)
        values: Any = {"temperature": 0.0, **settings}
        sampling = Sampling(**values)
        sampling.check(1, self.config.vocab_size)
        return sampling, random_key(seed)

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

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which functions on this model's parameters run: its mesh, if it has one."""
        return sharding.use_mesh(self.mesh)

    def _until_stopped(
        self,
        prompts: tuple[LlamaConfig, Any, jax.Array, jax.Array],
        key: jax.Array,
        sampling: Sampling,
        stop_strings: str | Sequence[str],
        shared: dict[str, Any],
        owners: list[list[int]],
    ) -> list[str]:
        """`generate` a token at a time, each text until its first stop string."""
        decoders = [self._decoder_after(ids) for ids in owners]
        stops = [StopStrings(stop_strings) for _ in owners]
        texts: list[list[str]] = [[] for _ in owners]
        with self.on_mesh():
            for tokens, live in stream(*prompts, key, sampling, **shared):
                for at in np.flatnonzero(live):
                    texts[at].append(stops[at].push(decoders[at].push(int(tokens[at])))[0])
                if all(stop.stopped for stop in stops):
                    break
        for text, decoder, stop in zip(texts, decoders, stops, strict=True):
            text.append(stop.push(decoder.flush())[0] + stop.flush())
        return ["".join(text) for text in texts]

    def continuation(
        self, prompt: Sequence[int], new: Iterable[int], stop_strings: str | Sequence[str] = ()
    ) -> str:
        """The text of new ids after a prompt's, as far as the first of the stop strings."""
        text, stop = self._decoder_after(prompt), StopStrings(stop_strings)
        return stop.push(text.extend(new) + text.flush())[0] + stop.flush()

    def _check_vocabulary(self, draft: Model) -> None:
        ours, theirs = self.tokenizer, draft.tokenizer
        for id in range(min(ours.vocab_size, theirs.vocab_size)):
            if ours.piece(id) != theirs.piece(id):
                raise InputError(
                    f"the draft model {draft.path} has another vocabulary: its token {id} is "
                    f"{theirs.piece(id)!r}, and {ours.piece(id)!r} in {self.path}"
                )

    def _decoder_after(self, prompt: Sequence[int]) -> StreamDecoder:
        # SentencePiece drops the space before a text's first piece; a continuation's first piece keeps it.
        text = self.tokenizer.stream()
        text.extend(prompt)
        return text


def _nested(texts: list[str], count: int, prompt: str | list[str], asked: int | None) -> Any:
    """Texts, `count` of each prompt, in the form that the prompts came in."""
    groups: list[Any] = [texts[at : at + count] for at in range(0, len(texts), count)]
    if asked is None:
        groups = texts
    return groups[0] if isinstance(prompt, str) else groups
