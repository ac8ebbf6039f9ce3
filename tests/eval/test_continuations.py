"""Continuations that share a context score as each does alone, with two programs for each cache size."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import InputError
from llama_jax.eval import continuations
from llama_jax.eval.continuations import ContinuationScorer, Request
from llama_jax.eval.windows import TokenScores, Window, score_windows
from llama_jax.meshes import make_mesh
from llama_jax.sharding import shard_params
from tests.random_models import SMALL

CONFIG = SMALL


def make_model(config: lj.LlamaConfig = CONFIG, mesh: jax.sharding.Mesh | None = None) -> lj.Model:
    params = jax.tree.map(lambda x: 4 * x, lj.init(config, jax.random.key(0)))
    params = params if mesh is None else shard_params(params, mesh, config)
    return lj.Model(config, params, None, Path("random"), mesh)


@pytest.fixture(scope="module")
def model() -> lj.Model:
    return make_model()


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count).tolist()


def alone(model: lj.Model, requests: list[Request]) -> list[TokenScores]:
    """Each request by the forward pass, without a cache."""
    return score_windows(model, [Window([*c, *rest[:-1]], rest) for c, rest in requests])


def assert_equal(found: list[TokenScores], expected: list[TokenScores]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)
        np.testing.assert_array_equal(ours.greedy, theirs.greedy)


def choices(context: list[int], seed: int) -> list[Request]:
    """Continuations that share beginnings, one within another, one twice, and single tokens."""
    long = ids(9, seed)
    rests = [long, long[:4], [*long[:4], *ids(3, seed + 1)], ids(40, seed + 2), [3], [5], long]
    return [(context, rest) for rest in rests]


def test_each_scores_as_it_does_alone(model):
    head = ids(80, 1)
    requests = [
        *choices([7], 10),
        *choices(ids(100, 2), 20),
        *choices([*head, *ids(5, 3)], 30),
        *choices([*head, *ids(33, 4)], 40),
        *choices(head, 50),
        (ids(50, 5), ids(300, 6)),  # longer than a tree
        (ids(213, 7), ids(300, 8)),  # the last token of both is beyond the context, and not read
    ]
    done = []
    found = ContinuationScorer(model, batch_size=3).score(requests, progress=lambda n, _: done.append(n))
    assert_equal(found, alone(model, requests))
    assert done[-1] == len(requests) and done == sorted(done)
    assert any(score.greedy.any() for score in found)


def test_more_continuations_than_a_tree_has_room_for(model):
    context = ids(90, 1)
    requests = [(context, ids(25, 100 + i)) for i in range(30)]
    assert_equal(ContinuationScorer(model, batch_size=3).score(requests), alone(model, requests))


def test_the_greedy_continuation_is_greedy(model):
    prompt = ids(20, 3)
    out = lj.generate(
        model.config,
        model.params,
        [prompt],
        [20],
        jax.random.key(0),
        lj.Sampling(temperature=0.0),
        max_new_tokens=6,
    )
    new = np.asarray(out.tokens[0]).tolist()
    other = [*new[:-1], (new[-1] + 1) % CONFIG.vocab_size]
    first, second = ContinuationScorer(model, batch_size=3).score([(prompt, new), (prompt, other)])
    assert first.greedy.all() and second.greedy.tolist() == [True] * 5 + [False]
    np.testing.assert_allclose(first.logprobs, out.logprobs[0], atol=1e-4)


def test_the_bits_of_a_row_do_not_depend_on_its_neighbors(model):
    scorer = ContinuationScorer(model, batch_size=3)
    a, *others = (choices(ids(90, 60 + i), 70 + i) for i in range(5))
    first, second = (scorer.score([*a, *x, *y])[: len(a)] for x, y in (others[:2], others[2:]))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.logprobs, two.logprobs)
    assert_equal(ContinuationScorer(model, batch_size=1).score(a), first)  # another batch: to rounding


def test_there_are_two_programs_for_each_cache_size(model):
    jax.clear_caches()
    scorer = ContinuationScorer(model, batch_size=3)
    head = ids(70, 1)
    requests = [
        ([*head, *ids(n, n)], ids(1 + n % 7, n)) for n in (0, 1, 5, 9, 20, 31, 60, 61, 90, 100, 150, 180)
    ]
    scorer.score(requests)
    scorer.score([(context[:-3], [*rest, 1]) for context, rest in requests])
    sizes = 3  # 128, 256 and 512 slots
    assert continuations._score_trees._cache_size() == sizes
    assert continuations._extend._cache_size() == sizes


def test_layers_with_a_window():
    model = make_model(CONFIG.replace(num_hidden_layers=2, sliding_window=8, window_layers=(True, False)))
    requests = [*choices(ids(70, 2), 20), *choices(ids(3, 3), 30)]
    assert_equal(ContinuationScorer(model, batch_size=2).score(requests), alone(model, requests))


def test_a_mesh_gives_the_same(model):
    config = CONFIG
    sharded = make_model(config, make_mesh("fsdp=2,tensor=2,data=2"))
    requests = [*choices(ids(70, 2), 20), *choices(ids(3, 3), 30)]
    found = ContinuationScorer(sharded, batch_size=2).score(requests)
    assert_equal(found, ContinuationScorer(model, batch_size=3).score(requests))
    assert_equal(alone(sharded, requests), found)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "request 1 has no token in its context"),
        (([1], []), "request 1 has no token in its continuation"),
        (
            ([1] * 500, [1] * 14),
            "a context of 500 tokens and a continuation of 14; the model's context has 512",
        ),
    ],
)
def test_bad_requests(model, request_, message):
    with pytest.raises(InputError, match=message):
        ContinuationScorer(model).score([([1], [2]), request_])
