"""A session continues a prompt as `generate` does, whatever is in its cache."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import meshes
from llama_jax.decoding import session as sessions
from llama_jax.decoding.session import Session
from llama_jax.errors import InputError
from tests.random_models import random_model

CONFIG, PARAMS = random_model(1, lj.presets.TINY.replace(max_position_embeddings=400))
WEIGHTS = lj.unstack(PARAMS)
KEY = jax.random.key(0)
GREEDY = lj.Sampling(temperature=0.0)
RANDOM = lj.Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2)
PROMPT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 150).tolist()


def alone(prompt, sampling=GREEDY, count=8, **settings):
    tokens, lengths = np.array([prompt]), np.array([len(prompt)])
    out = lj.generate(CONFIG, WEIGHTS, tokens, lengths, KEY, sampling, max_new_tokens=count, **settings)
    return np.asarray(out.tokens[0, : int(out.lengths[0])]).tolist()


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_each_turn_equals_generate_and_runs_only_new_tokens(sampling):
    """Turns that extend the last, shorten it, grow the cache, and share no prefix with it."""
    session = Session(CONFIG, WEIGHTS)
    first = list(session.stream(PROMPT[:20], KEY, sampling, max_new_tokens=8))
    assert first == alone(PROMPT[:20], sampling) and session.reused == 0
    assert session.tokens == PROMPT[:20] + first[:-1]
    longer = PROMPT[:20] + first + PROMPT[20:30]
    turns = [
        (longer, 27),  # the last token was sampled but never run
        (longer, 37),  # the same again: only the last id is run
        (longer[:10], 9),
        (longer[:10] + PROMPT[40:45], 10),
        (longer[:10] + PROMPT[40:150], 15),  # a larger cache
        (PROMPT[50:60], 0),
    ]
    for prompt, reused in turns:
        assert list(session.stream(prompt, KEY, sampling, max_new_tokens=8)) == alone(prompt, sampling)
        assert session.reused == reused


def test_an_fp8_cache_is_that_of_generate():
    session = Session(CONFIG, WEIGHTS, cache_dtype="fp8")
    first = list(session.stream(PROMPT[:20], KEY, RANDOM, max_new_tokens=8))
    assert first == alone(PROMPT[:20], RANDOM, cache_dtype="fp8")
    longer = PROMPT[:20] + first + PROMPT[20:30]
    assert list(session.stream(longer, KEY, GREEDY, max_new_tokens=8)) == alone(longer, cache_dtype="fp8")
    assert session.reused == 27


def test_a_mesh_gives_the_same_tokens():
    """The one row of a session divides no batch axis: it is replicated. Its cache is divided, and grows."""
    mesh = meshes.make_mesh("fsdp=2,context=2,tensor=2")
    with jax.set_mesh(mesh):
        session = Session(CONFIG, lj.shard_params(jax.device_get(WEIGHTS), mesh, CONFIG))
        first = list(session.stream(PROMPT[:20], KEY, RANDOM, max_new_tokens=8))
        longer = PROMPT[:20] + first + PROMPT[20:120]
        second = list(session.stream(longer, KEY, RANDOM, max_new_tokens=8))
    assert first == alone(PROMPT[:20], RANDOM) and second == alone(longer, RANDOM)
    assert session.reused == 27


def test_an_end_token_ends_a_turn():
    free = alone(PROMPT[:9])
    session = Session(CONFIG, WEIGHTS)
    out = list(session.stream(PROMPT[:9], KEY, GREEDY, max_new_tokens=8, eos_id=free[2]))
    assert out == free[: free.index(free[2]) + 1]


def test_a_turn_may_be_closed_at_any_time():
    session = Session(CONFIG, WEIGHTS)
    for taken in range(4):
        stream = session.stream(PROMPT[:12], KEY, GREEDY, max_new_tokens=8)
        first_tokens = list(itertools.islice(stream, taken))
        stream.close()
        assert first_tokens == alone(PROMPT[:12])[:taken]
        prompt = PROMPT[:12] + first_tokens + [7]
        assert list(session.stream(prompt, KEY, GREEDY, max_new_tokens=8)) == alone(prompt)


def test_a_session_works_after_an_interrupted_step(monkeypatch):
    session = Session(CONFIG, WEIGHTS)
    stream = session.stream(PROMPT[:12], KEY, GREEDY, max_new_tokens=8)
    first_tokens = [next(stream), next(stream)]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "decode_loop_jit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert session.tokens == []
    assert list(session.stream(PROMPT[:12] + first_tokens, KEY, GREEDY, max_new_tokens=8)) == alone(
        PROMPT[:12] + first_tokens
    )
    assert session.reused == 0


def test_a_new_turn_ends_the_one_before():
    session = Session(CONFIG, WEIGHTS)
    old = session.stream(PROMPT[:12], KEY, GREEDY, max_new_tokens=8)
    next(old)
    new = list(session.stream(PROMPT[:15], KEY, GREEDY, max_new_tokens=8))
    assert new == alone(PROMPT[:15]) and list(old) == []


@pytest.mark.parametrize(
    ("tokens", "count", "message"),
    [
        ([], 4, "a prompt needs at least one token"),
        ([1, 256], 4, "token id 256 in row 0, position 1 is outside the vocabulary of 256"),
        (PROMPT, 251, "need 401 positions; the model's context has 400"),
    ],
)
def test_an_invalid_prompt_keeps_the_cache(tokens, count, message):
    session = Session(CONFIG, WEIGHTS)
    list(session.stream(PROMPT[:12], KEY, GREEDY, max_new_tokens=3))
    cached = list(session.tokens)
    with pytest.raises(InputError, match=message):
        session.stream(tokens, KEY, GREEDY, max_new_tokens=count)
    assert session.tokens == cached
    list(session.stream(PROMPT[:12], KEY, GREEDY, max_new_tokens=3))
    assert session.reused == 11
    with pytest.raises(InputError, match="cache_dtype is 'int3'"):
        Session(CONFIG, WEIGHTS, cache_dtype="int3")
