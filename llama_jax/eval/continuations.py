"""Log-probabilities of continuations of contexts: a context that several continuations share is run once.

The continuations of a context are a tree of tokens behind it, of which one row of the cache holds all: each
token attends to the context and to its own ancestors (tree attention, as in SpecInfer, arXiv 2305.09781).
What all contexts of a batch begin with (an instruction, the few-shot examples of a task) is run once too, and
kept for the next batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding.arguments import cache_capacity
from llama_jax.decoding.generation import unstack_jit
from llama_jax.decoding.processes import fetch
from llama_jax.decoding.session import common_prefix_length
from llama_jax.decoding.state import prefill_cache, repeat_rows
from llama_jax.errors import InputError
from llama_jax.eval.windows import Progress, TokenScores, Window, batch_rows, score_windows
from llama_jax.model import Params, compute_dtype, forward_cached
from llama_jax.text.model import Model

_NODES = 256  # tokens of a tree; a longer continuation has a row of its own, without a cache
_TARGETS = 512  # predictions of a tree
_CHUNK = 32  # tokens of a row that are run at once
_LEAST_SHARED = 64  # tokens that a batch must share for them to be run apart

Request = tuple[Sequence[int], Sequence[int]]  # context and continuation, one token or more each


@dataclasses.dataclass
class _Tree:
    """A context with some of its continuations.

    Attributes:
      context: its ids.
      tokens, parents, depths: of each node; node 0 is the context's last token.
      targets: (node, token after it), each once.
      requests: for each request that is scored here, the indices of its targets.
    """

    context: tuple[int, ...]
    tokens: list[int]
    parents: list[int] = dataclasses.field(default_factory=lambda: [0])
    depths: list[int] = dataclasses.field(default_factory=lambda: [0])
    targets: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    children: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    requests: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def start(self) -> int:
        """The position of node 0."""
        return len(self.context) - 1

    @property
    def slots(self) -> int:
        """Slots of the cache that the row needs."""
        return self.start + -(-len(self.tokens) // _CHUNK) * _CHUNK

    def has_room(self, continuation: Sequence[int]) -> bool:
        nodes, targets = len(self.tokens) + len(continuation) - 1, len(self.targets) + len(continuation)
        return nodes <= _NODES and targets <= _TARGETS

    def add(self, number: int, continuation: Sequence[int]) -> None:
        node, found = 0, []
        for place, token in enumerate(continuation):
            edge = (node, token)
            found.append(self.targets.setdefault(edge, len(self.targets)))
            if place + 1 < len(continuation):
                if edge not in self.children:
                    self.children[edge] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(self.depths[node] + 1)
                node = self.children[edge]
        self.requests[number] = found


class _Rows(NamedTuple):
    """The arrays of a batch; M is `_NODES`, E `_TARGETS`.

    Attributes:
      contexts: int32 [B, S].
      starts: int32 [B], the positions of the nodes 0.
      tokens, depths: int32 [B, M].
      ancestors: bool [B, M, M], the nodes that each attends to, itself included.
      target_nodes, target_tokens: int32 [B, E].
      most_nodes: int32 [], of a row.
    """

    contexts: Any
    starts: Any
    tokens: Any
    depths: Any
    ancestors: Any
    target_nodes: Any
    target_tokens: Any
    most_nodes: Any


class ContinuationScorer:
    """Scores continuations with programs of few shapes.

    For each cache size (a power of two, at least 128, of context and continuations) there are two programs:
    one for a batch, one for what its rows share. Continuations of more than 256 tokens are scored as windows
    (`score_windows`). Scores do not depend on the batch, to rounding; the bits of a row are the same with any
    other rows that share nothing with it, or share the same.
    """

    def __init__(self, model: Model, *, batch_size: int = 8) -> None:
        """Keeps the model; its layers are unstacked once, which copies stacked ones.

        Args:
          model: the model.
          batch_size: contexts in a batch.
        """
        self._model = model
        self._batch_size = batch_size
        with model.on_mesh():
            self._params = unstack_jit(model.params)
        self._shared: tuple[int, ...] = ()  # the ids in the cache of the last batch's common prefix
        self._cache: kv.KVCache | None = None

    def score(
        self, requests: Sequence[Request], *, progress: Progress = lambda *_: None
    ) -> list[TokenScores]:
        """Scores of the continuation of each request, in their order.

        Args:
          requests: (context, continuation), both with at least one token, together at most one token longer
            than the model's context: the last is not read.
          progress: is called after each batch.

        Raises:
          InputError: for a request that is empty or too long, by its number.
        """
        self._check(requests)
        found: dict[int, TokenScores] = {}
        long = [number for number, (_, rest) in enumerate(requests) if len(rest) > _NODES]
        windows = [Window([*requests[n][0], *requests[n][1][:-1]], requests[n][1]) for n in long]
        scored = score_windows(
            self._model,
            windows,
            batch_size=self._batch_size,
            progress=lambda done, _: progress(done, len(requests)),
        )
        found |= dict(zip(long, scored, strict=True))
        for batch in self._batches(_trees(requests)):
            logprobs, greedy = self._run(batch)
            for row, tree in enumerate(batch):
                for number, targets in tree.requests.items():
                    found[number] = TokenScores(logprobs[row, targets], greedy[row, targets])
            progress(len(found), len(requests))
        return [found[number] for number in range(len(requests))]

    def _check(self, requests: Sequence[Request]) -> None:
        longest = self._model.config.max_position_embeddings
        for number, (context, continuation) in enumerate(requests):
            if not context or not continuation:
                empty = "continuation" if context else "context"
                raise InputError(f"request {number} has no token in its {empty}; both need at least one")
            if len(context) + len(continuation) - 1 > longest:
                raise InputError(
                    f"request {number} has a context of {len(context)} tokens and a continuation of "
                    f"{len(continuation)}; the model's context has {longest} positions"
                )

    def _batches(self, trees: list[_Tree]) -> Iterator[list[_Tree]]:
        """Rows of like length; those with a common beginning together, where they fill a batch."""
        size = self._batch_size
        begins = Counter(tree.context[:_LEAST_SHARED] for tree in trees)

        def key(tree: _Tree) -> tuple[Any, ...]:
            begin = tree.context[:_LEAST_SHARED]
            return cache_capacity(tree.slots), begin if begins[begin] >= size else (), tree.start, tree.slots

        ordered = sorted(trees, key=key)
        for first in range(0, len(ordered), size):
            yield ordered[first : first + size]

    def _run(self, trees: list[_Tree]) -> tuple[np.ndarray, np.ndarray]:
        count = max(len(tree.tokens) for tree in trees)
        slots = max(tree.start for tree in trees) + -(-count // _CHUNK) * _CHUNK
        filled = trees + [trees[-1]] * (batch_rows(self._model, self._batch_size) - len(trees))
        rows = _rows(filled, cache_capacity(slots), count)
        config = self._model.config
        with self._model.on_mesh():
            cache, shared = self._shared_prefix(trees, rows.contexts.shape[1])
            return fetch(_score_trees(config, self._params, cache, np.int32(shared), rows))

    def _shared_prefix(self, trees: list[_Tree], slots: int) -> tuple[kv.KVCache, int]:
        """A cache of one row that holds what the contexts begin with, and how many tokens of it."""
        before = [tree.context[:-1] for tree in trees]
        common = before[0][: common_prefix_length(min(before), max(before))]  # of all, by their order
        if self._cache is None or self._cache.length != slots:
            self._cache, self._shared = _empty_cache(self._model.config, self._params, slots=slots), ()
        if len(common) < _LEAST_SHARED:
            return self._cache, 0
        kept = common_prefix_length(common, self._shared)
        if kept < len(common):
            tokens = np.zeros((1, slots), np.int32)
            tokens[0, : len(common)] = common
            cache, self._cache = self._cache, None  # it is donated
            self._cache = _extend(
                self._model.config, self._params, cache, tokens, np.int32(kept), np.int32(len(common))
            )
            self._shared = common
        return self._cache, len(common)


def _trees(requests: Sequence[Request]) -> list[_Tree]:
    """The trees of the requests whose continuations are not too long for one."""
    trees: dict[tuple[int, ...], list[_Tree]] = {}
    for number, (context, continuation) in enumerate(requests):
        if len(continuation) > _NODES:
            continue
        own = trees.setdefault(tuple(context), [])
        if not own or not own[-1].has_room(continuation):
            own.append(_Tree(tuple(context), [context[-1]]))
        own[-1].add(number, continuation)
    return [tree for own in trees.values() for tree in own]


def _rows(trees: list[_Tree], slots: int, count: int) -> _Rows:
    batch = len(trees)
    contexts = np.zeros((batch, slots), np.int32)
    tokens, depths = np.zeros((2, batch, _NODES), np.int32)
    ancestors = np.broadcast_to(np.eye(_NODES, dtype=bool), (batch, _NODES, _NODES)).copy()
    target_nodes, target_tokens = np.zeros((2, batch, _TARGETS), np.int32)
    for row, tree in enumerate(trees):
        nodes = len(tree.tokens)
        contexts[row, : len(tree.context)] = tree.context
        tokens[row, :nodes], depths[row, :nodes] = tree.tokens, tree.depths
        for node in range(1, nodes):  # parents come first
            ancestors[row, node] |= ancestors[row, tree.parents[node]]
        for (node, token), target in tree.targets.items():
            target_nodes[row, target], target_tokens[row, target] = node, token
    starts = np.array([tree.start for tree in trees], np.int32)
    return _Rows(contexts, starts, tokens, depths, ancestors, target_nodes, target_tokens, np.int32(count))


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _empty_cache(config: LlamaConfig, params: Params, *, slots: int) -> kv.KVCache:
    # Without rings: the slots of a tree are not positions.
    return kv.init_cache(config, 1, slots, compute_dtype(params), run_length=None)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _extend(
    config: LlamaConfig,
    params: Params,
    cache: kv.KVCache,
    tokens: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> kv.KVCache:
    return prefill_cache(config, params, cache, tokens, start, stop)


@functools.partial(jax.jit, static_argnames="config")
def _score_trees(
    config: LlamaConfig, params: Params, prefix: kv.KVCache, shared: jax.Array, rows: _Rows
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32 [B, E] of the targets of each row, and whether each is the most likely one.

    Args:
      config: the model.
      params: its parameters, unstacked.
      prefix: a cache of one row with S slots, of which all rows share the first `shared` ones.
      shared: int [].
      rows: the batch.
    """
    batch, slots = rows.contexts.shape
    rows = jax.tree.map(lambda x: sharding.over_batch(jnp.asarray(x)) if x.ndim else x, rows)
    cache = jax.tree.map(lambda x: repeat_rows(x, batch), prefix)
    # Rows together are many tokens already: larger chunks would only run more padding.
    stop = rows.starts.max()
    cache = prefill_cache(config, params, cache, rows.contexts, shared, stop, chunks=(_CHUNK, _CHUNK))
    place = jnp.arange(slots) - rows.starts[:, None]  # [B, S]: negative in the context, then a node
    is_node = (place >= 0) & (place < _NODES)
    node_at = jnp.clip(place, 0, _NODES - 1)

    def run_chunk(index: jax.Array, carry: Any) -> Any:
        cache, logprobs, greedy = carry
        first = index * _CHUNK
        chunk = lambda x: jax.lax.dynamic_slice_in_dim(x, first, _CHUNK, axis=1)  # noqa: E731
        attended = jnp.take_along_axis(chunk(rows.ancestors), node_at[:, None], axis=2)
        logits, cache = forward_cached(
            config,
            params,
            chunk(rows.tokens),
            rows.starts + first,
            cache,
            used=stop + first + _CHUNK,
            positions=rows.starts[:, None] + chunk(rows.depths),
            allowed=jnp.where(is_node[:, None], attended, (place < 0)[:, None]),
        )
        logits = sharding.over_batch(logits)
        at = rows.target_nodes - first
        here, at = (at >= 0) & (at < _CHUNK), jnp.clip(at, 0, _CHUNK - 1)
        pick = lambda x: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
        chosen = jax.vmap(lambda x, node, token: x[node, token])(logits, at, rows.target_tokens)
        logprobs = jnp.where(here, chosen - pick(jax.nn.logsumexp(logits, axis=-1)), logprobs)
        return cache, logprobs, jnp.where(here, chosen >= pick(logits.max(-1)), greedy)

    empty = jnp.zeros_like(rows.target_nodes, jnp.float32), jnp.zeros_like(rows.target_nodes, bool)
    return jax.lax.fori_loop(0, -(-rows.most_nodes // _CHUNK), run_chunk, (cache, *empty))[1:]
