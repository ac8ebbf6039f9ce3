"""Samples completions with the library's decoding: on the arrays and in the mesh that are trained.

Decoding reads each layer's weights from arrays of their own, in the compute dtype: what has to be laid out
anew for that, after each update, is stated in bytes in the run's log.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import LlamaConfig, Sampling
from llama_jax.console import terminal
from llama_jax.decoding import arguments, processes
from llama_jax.decoding.generation import decode_loop_jit, prefill_jit
from llama_jax.decoding.sampling import sample, sample_gumbel
from llama_jax.decoding.state import DecodeState
from llama_jax.model import unstack
from llama_jax.ops.adapted import Adapted
from llama_jax.ops.quantization import Quantized
from llama_jax.text.stop_strings import split_stop_strings
from llama_jax.tokenizer import Tokenizer

from ..config.rl import RLConfig
from ..trainable import Frozen, TrainableSpec, cast

_STOP_EVERY = 16  # decoding steps between looks for stop strings


@dataclasses.dataclass
class Sampled:
    """Completions of R rows.

    Attributes:
      tokens: int32 [R, C], 0 after the end.
      lengths: int32 [R], the end token included.
      logprobs: f32 [R, C], log-probabilities at temperature 1 by the program that decodes.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray


class Sampler:
    """Samples completions.

    Attributes:
      sampling: settings of the rows.
    """

    def __init__(
        self,
        model: LlamaConfig,
        config: RLConfig,
        tokenizer: Tokenizer,
        dtype: jnp.dtype,
        trainable_spec: TrainableSpec,
        log: Callable[[str], None] = lambda _: None,
        *,
        exact: bool = False,
    ) -> None:
        """Makes a sampler of `model` in the compute dtype; `log` gets one line, at the first `params`.

        `exact` is for completions that `scoring` samples again: by noise, which agrees more often.
        """
        self._draw = sample_gumbel if exact else sample
        self._model, self._tokenizer, self._log = model, tokenizer, log
        self._eos_ids, self._stops = split_stop_strings(tokenizer, config.stop)
        unused = tuple(getattr(tokenizer, "unused_ids", ()))  # rows of a padded vocabulary
        self.sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            suppress_tokens=unused,
        )
        self._is_first = True

        @jax.jit
        def laid_out(trainable: Any, frozen: Frozen) -> Any:
            return as_computed(unstack(trainable_spec.language_model(trainable, frozen)), dtype)

        self._laid_out = laid_out

    def params(self, trainable: Any, frozen: Frozen) -> Any:
        """The parameters as decoding reads them; matrices in the compute dtype, as the trainer casts them."""
        params = self._laid_out(trainable, frozen)
        if self._is_first:
            shared = {pointer for tree in (trainable, frozen) for pointer in _buffers(tree)}
            new = sum(
                leaf.nbytes for leaf in jax.tree.leaves(params) if not shared.intersection(_buffers(leaf))
            )
            total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            self._log(
                f"rollouts: of {terminal.human_bytes(total)} of weights {terminal.human_bytes(new)} are laid "
                "out anew after each update, one array a layer in the compute dtype; the rest is shared"
            )
            self._is_first = False
        return params

    def sample(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        key: jax.Array,
        *,
        copies: int,
        max_new_tokens: int,
        temperature: float | None = None,
    ) -> Sampled:
        """Samples completions, each prompt read once.

        Args:
          params: from `params`.
          prompts: token ids.
          key: row b * copies + i, completion i of prompt b, uses `fold_in(key, row)`.
          copies: completions of each prompt.
          max_new_tokens: of each.
          temperature: instead of the settings'; 0 is greedy.
        """
        sampling = self.sampling
        if temperature is not None:
            sampling = Sampling(temperature=temperature, suppress_tokens=sampling.suppress_tokens)
        tokens, lengths = arguments.pad_right(prompts)
        request = self._request(tokens, lengths, sampling, max_new_tokens, key, copies)
        state = self._prefill(params, request, max_new_tokens, copies)
        return self._run(params, state, max_new_tokens, [prompt for prompt in prompts for _ in range(copies)])

    def resume(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        begun: Sequence[Sequence[int]],
        keys: jax.Array,
        *,
        max_new_tokens: int,
        most: int,
    ) -> Sampled:
        """Goes on from given beginnings: token t of row r's completion is sampled with `fold_in(keys[r], t)`.

        Rows are added up to a quarter of `most`, or to `most`: few programs are compiled.

        Args:
          params: from `params`.
          prompts: token ids, of each row.
          begun: the first tokens of each row's completion, fewer than max_new_tokens.
          keys: [R].
          max_new_tokens: of whole completions.
          most: the rows of the rollout, at least R.
        """
        count = len(prompts)
        rows = next(size for size in (-(-most // 4), most) if size >= count)
        place = np.minimum(np.arange(rows), count - 1)
        filled = [(list(prompts[r]), list(begun[r])) for r in place]
        tokens, lengths = arguments.pad_right([prompt + start for prompt, start in filled])
        left = max_new_tokens - min(len(start) for _, start in filled)
        request = self._request(tokens, lengths, self.sampling, left, keys[place], 1)
        state = self._prefill(params, request, left, 1)
        output = jax.tree.map(np.array, processes.fetch(state.output))
        for r, (_, start) in enumerate(filled):
            output.tokens[r, : len(start)], output.lengths[r] = start, len(start)
        done = np.arange(len(output.lengths)) >= count
        changed = (output.tokens, output.lengths, done, np.int32(max_new_tokens))
        old = (state.output.tokens, state.output.lengths, state.done, state.limit)
        new_tokens, new_lengths, is_done, limit = map(_put_like, changed, old)
        state = dataclasses.replace(
            state,
            output=dataclasses.replace(state.output, tokens=new_tokens, lengths=new_lengths),
            done=is_done,
            limit=limit,
        )
        sampled = self._run(params, state, max_new_tokens, [prompt for prompt, _ in filled], done)
        return Sampled(sampled.tokens[:count], sampled.lengths[:count], sampled.logprobs[:count])

    def end(self, prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
        """The length at which a completion ends, by an end token or a stop string; None if it does not."""
        decoder, text = self._tokenizer.stream(), ""
        if self._stops:
            decoder.extend(prompt)
        for length, token in enumerate(tokens, 1):
            if token in self._eos_ids:
                return length
            if self._stops:
                text += decoder.push(int(token))
                if any(stop in text for stop in self._stops):
                    return length
        return None

    def _request(
        self, tokens: Any, lengths: Any, sampling: Sampling, max_new_tokens: int, key: Any, copies: int
    ) -> arguments.Request:
        return arguments.prepare_request(
            self._model,
            tokens,
            lengths,
            sampling,
            self._eos_ids,
            max_new_tokens,
            key=key,
            num_return_sequences=copies,
            function="rollout",
        )

    def _prefill(
        self, params: Any, request: arguments.Request, max_new_tokens: int, copies: int
    ) -> DecodeState:
        static = {"num_return_sequences": copies, "top_logprobs": 0, "cache_dtype": None}
        return prefill_jit(self._model, params, request, max_new_tokens, **static)

    def _run(
        self,
        params: Any,
        state: DecodeState,
        max_new_tokens: int,
        prompts: Sequence[Sequence[int]],
        ignored: np.ndarray | None = None,
    ) -> Sampled:
        """Decodes to the end; with stop strings the host looks for them now and then."""
        steps = _STOP_EVERY if self._stops else max_new_tokens
        count = len(prompts)
        for _ in range(-(-max_new_tokens // steps)):
            state, _ = decode_loop_jit(self._model, params, state, np.int32(steps), self._draw)
            output, done = processes.fetch((state.output, state.done))
            if self._stops:
                done = np.array(done)
                for r in np.flatnonzero(~done[:count]).tolist():
                    done[r] = self.end(prompts[r], output.tokens[r, : output.lengths[r]]) is not None
                state = dataclasses.replace(state, done=_put_like(done, state.done))
            if done.all():
                break
        lengths = np.array(output.lengths[:count])
        if self._stops:
            for r in range(count):
                if ignored is None or not ignored[r]:
                    lengths[r] = self.end(prompts[r], output.tokens[r, : lengths[r]]) or lengths[r]
        there = np.arange(max_new_tokens) < lengths[:, None]
        return Sampled(
            tokens=np.where(there, output.tokens[:count, :max_new_tokens], 0),
            lengths=lengths,
            logprobs=np.where(there, output.logprobs[:count, :max_new_tokens], 0.0),
        )


def as_computed(params: Any, dtype: jnp.dtype) -> Any:
    """Parameters as a forward pass in `dtype` reads them: matrices are cast, norms and adapters are not."""

    def cast_leaf(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, Adapted):
            return dataclasses.replace(leaf, base=cast(leaf.base, dtype))
        return leaf if path[-1] == jax.tree_util.DictKey("scale") else cast(leaf, dtype)

    is_leaf = lambda leaf: isinstance(leaf, (Adapted, Quantized))  # noqa: E731
    return jax.tree_util.tree_map_with_path(cast_leaf, params, is_leaf=is_leaf)


def _put_like(values: np.ndarray, x: jax.Array) -> jax.Array:
    return processes.put_like(np.asarray(values), x)


def _buffers(tree: Any) -> list[int]:
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    ]
