"""`Model`: a configuration, parameters and a tokenizer, with text generation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding.arguments import check_int, pad_right, random_key
from llama_jax.decoding.beam_search import EarlyStopping, beam_search
from llama_jax.decoding.constraints import Grammar, GrammarLike
from llama_jax.decoding.drafts import Draft, DraftModel
from llama_jax.decoding.finite import checked_tokens
from llama_jax.decoding.generation import generate, stream
from llama_jax.decoding.sampling import Sampling
from llama_jax.decoding.speculative import SpeculativeOutput, speculative_generate
from llama_jax.errors import InputError
from llama_jax.taps import Edit, with_edit
from llama_jax.text.scoring import TextScoring
from llama_jax.text.settings import SamplingSettings, TextSettings, check_names, take_grammar
from llama_jax.text.stop_strings import StopStrings, split_stop_strings
from llama_jax.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Model(TextScoring):
    """A Llama with its parameters and tokenizer.

    On a mesh over several processes each makes the same calls, and each gets the whole result.

    Attributes:
      config: the model's configuration.
      params: the parameters, as `forward` and `generate` take them.
      tokenizer: the tokenizer.
      path: the path it was loaded from.
      mesh: the mesh that the parameters are sharded over, or None.
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
        parse_special: bool = ...,
        num_beams: int = ...,
        length_penalty: float = ...,
        early_stopping: EarlyStopping = ...,
        draft: Draft | Model | None = ...,
        num_draft_tokens: int = ...,
        cache_dtype: str | None = ...,
        **settings: Unpack[TextSettings],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        *,
        max_new_tokens: int = ...,
        stop_strings: str | Sequence[str] = ...,
        parse_special: bool = ...,
        num_beams: int = ...,
        length_penalty: float = ...,
        early_stopping: EarlyStopping = ...,
        draft: Draft | Model | None = ...,
        num_draft_tokens: int = ...,
        cache_dtype: str | None = ...,
        **settings: Unpack[TextSettings],
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
        parse_special: bool = True,
        num_return_sequences: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        draft: Draft | Model | None = None,
        num_draft_tokens: int = 8,
        cache_dtype: str | None = None,
        **settings: Any,
    ) -> Any:
        """Generates a continuation of a prompt, or of a batch of prompts.

        Args:
          prompt: one prompt, or a list that is decoded as one batch; each row's result equals that of the
            prompt alone.
          max_new_tokens: maximum number of new tokens; an EOS token ends a text earlier.
          stop_strings: end a text before the first of these; a control token may be one.
          parse_special: whether control tokens in a prompt, such as `<|im_start|>`, become their ids. Turn it
            off for text from strangers.
          num_return_sequences: return a list of this many continuations per prompt.
          num_beams: beam search with this many beams, if above 1; temperature, top_k, top_p and min_p must be
            off.
          length_penalty: for beam search, see `beam_search`; above 0 favors long texts.
          early_stopping: for beam search, see `beam_search`.
          draft: speculative decoding, see `speculate`: the same output with fewer runs of the model.
            `PromptLookup()` for texts that repeat themselves, or a smaller model.
          num_draft_tokens: number of draft tokens per run of the model.
          cache_dtype: dtype of the key/value cache: float32, bfloat16, float16, int8 or fp8.
          **settings: see `SamplingSettings`: `temperature=0.8, top_p=0.95, seed=1`; and what the text may be:
            `json_schema`, `regex`, `choices`, or `grammar`, one or a list with one or None for each prompt.

        Returns:
          The continuation without the prompt, or a list for a list of prompts; with `num_return_sequences` a
          list of continuations in place of each.

        Raises:
          InputError: for an empty prompt, one that is too long, or a setting that is out of range, unknown,
            or incompatible with another.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts:
            raise InputError("there are no prompts; give a string, or a list with at least one")
        rows = [self.encode_prompt(text, parse_special=parse_special) for text in prompts]
        tokens, lengths = pad_right(rows)
        grammar, settings = take_grammar(self.tokenizer, settings)
        sampling, key = self.sampling(**settings)
        end_ids, stop_strings = split_stop_strings(self.tokenizer, stop_strings)
        count = 1 if num_return_sequences is None else num_return_sequences
        grammars = grammar if isinstance(grammar, list | tuple) else [grammar] * len(rows)
        copies = range(check_int("num_return_sequences", count))
        repeated = [row for row in rows for _ in copies]
        # A text under a grammar is decoded by itself: with SentencePiece a space before it is none of it.
        before = [
            row if one is None else [] for row, one in zip(rows, grammars, strict=False) for _ in copies
        ]
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "cache_dtype": cache_dtype}
        options = {**limits, "eos_id": end_ids, "num_return_sequences": count, "grammar": grammar}
        inputs = (self.config, self.params, tokens, lengths)
        if num_beams != 1:
            for name, is_set in (("stop_strings", bool(stop_strings)), ("draft", draft is not None)):
                if is_set:
                    raise InputError(f"{name} and num_beams cannot be combined; leave one of them out")
            with self.on_mesh():
                beams = beam_search(
                    *inputs,
                    num_beams,
                    length_penalty=length_penalty,
                    early_stopping=early_stopping,
                    sampling=sampling,
                    **options,
                )
            new, counts = (np.asarray(x).reshape(-1, *x.shape[2:]) for x in (beams.tokens, beams.lengths))
        elif draft is not None:
            out = self.speculate(
                repeated,
                sampling,
                key,
                draft=draft,
                num_draft_tokens=num_draft_tokens,
                end_ids=end_ids,
                grammar=[one for one in grammars for _ in copies],
                **limits,
            ).output
            new, counts = checked_tokens(self.params, out)
        elif stop_strings:
            texts = self._generate_until_stop(inputs, key, sampling, stop_strings, options, before)
            return _group(texts, prompt, num_return_sequences)
        else:
            with self.on_mesh():
                out = generate(*inputs, key, sampling, **options)
            new, counts = checked_tokens(self.params, out)
        texts = [
            self.continuation(ids, new[row, : counts[row]], stop_strings) for row, ids in enumerate(before)
        ]
        return _group(texts, prompt, num_return_sequences)

    def speculate(
        self,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        key: jax.Array | None = None,
        *,
        draft: Draft | Model,
        num_draft_tokens: int = 8,
        max_new_tokens: int,
        end_ids: Sequence[int] | None = None,
        cache_dtype: str | None = None,
        grammar: GrammarLike = None,
    ) -> SpeculativeOutput:
        """Generates from prompts of token ids by speculative decoding, see `speculative_generate`.

        Args:
          rows: the token ids of each prompt.
          sampling: sampling settings, as from `sampling`.
          key: a random key, as from `sampling`; None is seed 0.
          draft: `PromptLookup`, `DraftModel`, or a smaller `Model` with the same vocabulary.
          num_draft_tokens: number of draft tokens verified per run of the model.
          max_new_tokens: maximum number of new tokens per row.
          end_ids: tokens that end a row; by default the tokenizer's.
          cache_dtype: as for `generate`.
          grammar: what the continuations may be, see `llama_jax.grammar`.

        Raises:
          InputError: as `speculative_generate`, or if the draft model has another vocabulary.
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
                eos_id=self.tokenizer.eos_ids if end_ids is None else tuple(end_ids),
                cache_dtype=cache_dtype,
                grammar=grammar,
            )

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        stop_strings: str | Sequence[str] = (),
        parse_special: bool = True,
        cache_dtype: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> Iterator[str]:
        """Like `generate` for one prompt, yielding pieces of the continuation as they are produced."""
        ids = self.encode_prompt(prompt, parse_special=parse_special)
        grammar, rest = take_grammar(self.tokenizer, settings)
        sampling, key = self.sampling(**rest)
        end_ids, stop_strings = split_stop_strings(self.tokenizer, stop_strings)
        stops = StopStrings(stop_strings)
        limits: Any = {"max_new_tokens": max_new_tokens, "end_ids": end_ids, "cache_dtype": cache_dtype}
        steps = self.stream_tokens(ids, sampling, key, grammar=grammar, **limits)
        for _, text in steps:
            piece, stopped = stops.push(text)
            if piece:
                yield piece
            if stopped:
                return
        if piece := stops.flush():
            yield piece

    def stream_tokens(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        key: jax.Array | None = None,
        *,
        max_new_tokens: int,
        end_ids: Sequence[int] | None = None,
        cache_dtype: str | None = None,
        grammar: Grammar | Sequence[Grammar | None] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Generates from one prompt of token ids, token by token.

        Args:
          ids, sampling, key, max_new_tokens, end_ids, cache_dtype, grammar: as for `speculate`, for one row.

        Yields:
          Each new token id and the text that it completes, which is empty within a multi-byte character.
        """
        tokens, lengths = pad_right([ids])
        end_ids = self.tokenizer.eos_ids if end_ids is None else tuple(end_ids)
        with self.on_mesh():
            steps = stream(
                self.config,
                self.params,
                tokens,
                lengths,
                random_key(0) if key is None else key,
                sampling,
                max_new_tokens=max_new_tokens,
                eos_id=end_ids,
                cache_dtype=cache_dtype,
                grammar=grammar,
            )
        decoder = self._decoder_after(ids if grammar is None else [])
        for count in range(1, max_new_tokens + 1):
            with self.on_mesh():
                token_b, _ = next(steps)
            token = int(token_b[0])
            last = count == max_new_tokens or token in end_ids
            yield token, decoder.push(token) + (decoder.flush() if last else "")
            if last:
                return

    def sampling(self, **settings: Unpack[SamplingSettings]) -> tuple[Sampling, jax.Array]:
        """Converts the settings of `generate` to a `Sampling` and a random key, for the functions on arrays.

        Raises:
          InputError: for an unknown setting, naming the closest known one, or one out of range.
        """
        check_names(settings)
        seed = settings.pop("seed", 0)
        values: Any = {"temperature": 0.0, **settings}
        if unused := getattr(self.tokenizer, "unused_ids", ()):
            values["suppress_tokens"] = [*values.get("suppress_tokens", ()), *unused]
        sampling = Sampling(**values)
        sampling.check(1, self.config.vocab_size)
        return sampling, random_key(seed)

    def encode_prompt(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Tokenizes a prompt, with BOS where the tokenizer adds one; `parse_special` is `generate`'s.

        Raises:
          InputError: if the prompt has no tokens.
        """
        ids = self.tokenizer.encode(text, parse_special=parse_special)
        if not ids:
            raise InputError(
                "the prompt is empty, and this tokenizer adds no BOS token; give at least one word"
            )
        return ids

    def with_edit(self, edit: Edit | None) -> Model:
        """The model with an edit of what flows inside it, in every method (`llama_jax.with_edit`)."""
        return dataclasses.replace(self, params=with_edit(self.params, edit))

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context manager that sets this model's mesh, if it has one."""
        return sharding.use_mesh(self.mesh)

    def _generate_until_stop(
        self,
        inputs: tuple[LlamaConfig, Any, jax.Array, jax.Array],
        key: jax.Array,
        sampling: Sampling,
        stop_strings: str | Sequence[str],
        options: dict[str, Any],
        rows: list[list[int]],
    ) -> list[str]:
        """`generate` one token per step, so that decoding ends when every row has a stop string."""
        decoders = [self._decoder_after(ids) for ids in rows]
        stops = [StopStrings(stop_strings) for _ in rows]
        texts: list[list[str]] = [[] for _ in rows]
        with self.on_mesh():
            for tokens, live in stream(*inputs, key, sampling, **options):
                for row in np.flatnonzero(live):
                    texts[row].append(stops[row].push(decoders[row].push(int(tokens[row])))[0])
                if all(stop.stopped for stop in stops):
                    break
        for text, decoder, stop in zip(texts, decoders, stops, strict=True):
            text.append(stop.push(decoder.flush())[0] + stop.flush())
        return ["".join(text) for text in texts]

    def continuation(
        self, prompt: Sequence[int], new: Iterable[int], stop_strings: str | Sequence[str] = ()
    ) -> str:
        """Detokenizes new token ids that follow a prompt, up to the first stop string."""
        decoder, stop = self._decoder_after(prompt), StopStrings(stop_strings)
        return stop.push(decoder.extend(new) + decoder.flush())[0] + stop.flush()

    def _check_vocabulary(self, draft: Model) -> None:
        ours, theirs = self.tokenizer, draft.tokenizer
        ids = range(min(ours.vocab_size, theirs.vocab_size))
        if (id := next((id for id in ids if ours.piece(id) != theirs.piece(id)), None)) is not None:
            raise InputError(
                f"the draft model {draft.path} has another vocabulary: token {id} is {theirs.piece(id)!r}, "
                f"and {ours.piece(id)!r} in {self.path}; use a draft model with the same tokenizer"
            )

    def _decoder_after(self, prompt: Sequence[int]) -> StreamDecoder:
        # SentencePiece drops the space before the first piece of a text; after a prompt it is kept.
        decoder = self.tokenizer.stream()
        decoder.extend(prompt)
        return decoder


def _group(texts: list[str], prompt: str | list[str], num_return_sequences: int | None) -> Any:
    """Nests the texts as the prompts are: a text, or `num_return_sequences` of them, per prompt."""
    groups: list[Any] = texts
    if (count := num_return_sequences) is not None:
        groups = [texts[start : start + count] for start in range(0, len(texts), count)]
    return groups[0] if isinstance(prompt, str) else groups
