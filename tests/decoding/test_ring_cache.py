"""Decoding with sliding windows: rings give the tokens of a cache that keeps everything, in less memory."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import llama_jax as lj
from llama_jax import kv_cache as kv
from llama_jax import meshes
from llama_jax.decoding import arguments, generation
from llama_jax.decoding.session import Session
from llama_jax.errors import InputError
from llama_jax.model import forward_cached
from llama_jax.ops import ring_cache
from tests.decoding.compiled import loop_body
from tests.optimized import optimized
from tests.random_models import SMALL, random_model, random_prompts
from tests.uncached import logprobs_by_forward, pick

WINDOW, LONG = 8, 700
MIXED = SMALL.replace(
    num_hidden_layers=2, sliding_window=WINDOW, window_layers=(True, False), max_position_embeddings=1024
)
CONFIG, STACKED = random_model(0, MIXED)
PARAMS = lj.unstack(STACKED)
ALL_RINGS = MIXED.replace(window_layers=())
TOKENS, LENGTHS = random_prompts(0, CONFIG, [3, LONG, 290, 1])
KEYS = jax.random.split(jax.random.key(0), 4)
GREEDY = lj.Sampling(temperature=0.0)
RANDOM = lj.Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1)
RING = WINDOW + kv.RUN_LENGTH


def run(
    tokens=TOKENS, lengths=LENGTHS, keys=KEYS, sampling=GREEDY, *, config=CONFIG, params=PARAMS, **settings
):
    return lj.generate(config, params, tokens, lengths, keys, sampling, **{"max_new_tokens": 12} | settings)


def assert_by_forward(out, *, config=CONFIG, greedy=True, atol=2e-5):
    logprobs = logprobs_by_forward(config, STACKED, TOKENS, LENGTHS, out.tokens)
    if greedy:
        np.testing.assert_array_equal(out.tokens, logprobs.argmax(-1))
    np.testing.assert_allclose(out.logprobs, pick(logprobs, out.tokens), atol=atol)


@pytest.mark.parametrize("config", [CONFIG, ALL_RINGS], ids=["mixed", "rings"])
def test_greedy_is_argmax_of_forward(config):
    """Rows of other lengths, up to 87 windows, read in chunks of which the last overlaps the one before."""
    assert_by_forward(run(config=config), config=config)


def test_log_probabilities_of_sampled_tokens_are_those_of_forward():
    """Inside `jit`, where the last chunk ends with the cache."""
    go = functools.partial(run, sampling=RANDOM, max_new_tokens=9)
    out = jax.jit(go)(TOKENS, LENGTHS, KEYS)
    assert_by_forward(out, greedy=False)
    np.testing.assert_array_equal(out.tokens, go().tokens)


def test_a_row_in_a_ragged_batch_is_the_row_alone():
    together = run(sampling=RANDOM)
    for row, length in enumerate(LENGTHS):
        one = run(TOKENS[row : row + 1, :length], LENGTHS[row : row + 1], KEYS[row : row + 1], RANDOM)
        np.testing.assert_array_equal(together.tokens[row], one.tokens[0])


def test_several_continuations_of_a_prompt():
    twice = run(np.repeat(TOKENS, 2, 0), np.repeat(LENGTHS, 2), KEYS[np.repeat(np.arange(4), 2)], RANDOM)
    once = run(keys=jax.random.key(0), sampling=RANDOM, num_return_sequences=2)
    assert once.tokens.shape == twice.tokens.shape
    assert_by_forward(
        lj.GenerateOutput(once.tokens[::2], once.lengths[::2], once.logprobs[::2]), greedy=False
    )
    assert_by_forward(
        lj.GenerateOutput(once.tokens[1::2], once.lengths[1::2], once.logprobs[1::2]), greedy=False
    )


def test_an_int8_ring_is_close():
    forced = lj.Sampling(forced_tokens=np.asarray(run().tokens))
    full, small = run(sampling=forced), run(sampling=forced, cache_dtype="int8")
    np.testing.assert_allclose(small.logprobs, full.logprobs, atol=0.2)
    assert not np.array_equal(small.logprobs, full.logprobs)


def test_memory_does_not_grow_with_the_text():
    def sizes(length, config, dtype=jnp.bfloat16, **settings):
        cache = jax.eval_shape(lambda: kv.init_cache(config, 2, length, dtype, **settings))
        return [kv.slots(layer) for layer in cache.k], cache.length

    assert sizes(4096, ALL_RINGS) == sizes(1 << 20, ALL_RINGS, jnp.int8) == ([RING] * 2, RING)
    assert sizes(4096, CONFIG) == ([RING, 4096], 4096)
    assert sizes(100, CONFIG) == ([100, 100], 100)
    assert sizes(4096, CONFIG, run_length=None) == ([4096, 4096], 4096)
    assert sizes(4096, CONFIG, run_length=300) == ([WINDOW + 300, 4096], 4096)


@pytest.mark.parametrize("slots", [16, 19, 64])
def test_a_ring_is_a_full_cache_with_the_window_s_mask(slots):
    """Tokens run 1, 5 and 8 at a time, with up to 3 taken back, in rows that end at other positions."""
    full = kv.init_cache(ALL_RINGS, 2, 128, jnp.float32, run_length=None)
    short = jax.tree.map(lambda x: x[:, :, :slots], full)
    step = jax.jit(functools.partial(forward_cached, ALL_RINGS))
    rng, start, at = np.random.default_rng(0), 0, np.array([0, 4])
    end = np.array([70, 50], np.int32)
    while start < 60:
        count = int(rng.choice([1, 5, 8]))
        tokens, starts = rng.integers(0, ALL_RINGS.vocab_size, (2, count)), (at + start).astype(np.int32)
        wanted, full = step(PARAMS, tokens, starts, full)
        found, short = step(PARAMS, tokens, starts, short, end=end)
        valid = (starts[:, None] + np.arange(count) < end[:, None])[..., None]
        np.testing.assert_allclose(np.where(valid, found, 0), np.where(valid, wanted, 0), atol=2e-5)
        start += max(count - int(rng.integers(0, 4)), 1)


def test_slots_hold_the_last_positions_and_empty_ones_none():
    empty = ring_cache.EMPTY
    held = ring_cache.positions(np.array([0, 3, 4, 10]), np.arange(4))
    assert held.tolist() == [[empty] * 4, [0, 1, 2, empty], [0, 1, 2, 3], [8, 9, 6, 7]]


DRAFTS = {
    "lookup": lj.PromptLookup(),
    "model": lj.DraftModel(
        ALL_RINGS.replace(num_hidden_layers=1), random_model(5, ALL_RINGS.replace(num_hidden_layers=1))[1]
    ),
}


@pytest.mark.parametrize("source", DRAFTS)
def test_speculation_gives_the_same_tokens(source):
    """Drafts are rejected and taken back."""
    tokens = (
        np.tile(np.random.default_rng(2).integers(0, 72, 7), 100)[None, :LONG].repeat(2, 0).astype(np.int32)
    )
    tokens[1, 250:] = TOKENS[1, 250:]
    lengths, settings = np.array([LONG, 400], np.int32), {"max_new_tokens": 40}
    out = lj.speculative_generate(
        ALL_RINGS, PARAMS, tokens, lengths, KEYS[:2], GREEDY, draft=DRAFTS[source], **settings
    )
    plain = run(tokens, lengths, KEYS[:2], config=ALL_RINGS, **settings)
    np.testing.assert_array_equal(out.output.tokens, plain.tokens)
    np.testing.assert_allclose(out.output.logprobs, plain.logprobs, atol=2e-5)
    assert (out.drafted > out.accepted).any()


def test_beams_keep_their_own_window():
    """Each text has the log-probabilities that `forward` says, and one beam is greedy."""
    out = lj.beam_search(CONFIG, PARAMS, TOKENS, LENGTHS, 3, max_new_tokens=24, num_return_sequences=2)
    for text in range(2):
        logprobs = logprobs_by_forward(CONFIG, STACKED, TOKENS, LENGTHS, out.tokens[:, text])
        np.testing.assert_allclose(out.logprobs[:, text], pick(logprobs, out.tokens[:, text]), atol=2e-5)
    one = lj.beam_search(CONFIG, PARAMS, TOKENS, LENGTHS, 1, max_new_tokens=24)
    greedy = run(max_new_tokens=24)
    np.testing.assert_array_equal(one.tokens[:, 0], greedy.tokens)


PROMPT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 900).tolist()


@pytest.mark.parametrize("config", [CONFIG, ALL_RINGS], ids=["mixed", "rings"])
def test_a_session_runs_again_what_its_ring_has_lost(config):
    session = Session(config, PARAMS)
    # (prompt, how many of its tokens are taken from the cache)
    turns = [
        (PROMPT[:30], 0),
        (PROMPT[:20] + PROMPT[50:400], 20),  # grows, and takes back a little
        (PROMPT[:20] + PROMPT[50:300] + PROMPT[:5], 270),  # takes back 104
        (PROMPT[:20] + PROMPT[50:60], 0),  # 249 more, which with those before are more than the ring keeps
        (PROMPT[:20] + PROMPT[50:800], 30),
        (PROMPT[:20] + PROMPT[50:700] + [7], 670),
        (PROMPT[:20] + PROMPT[50:480], 0),
        (PROMPT[:20] + PROMPT[50:900], 450),  # ends with a chunk that overlaps the one before it
    ]
    for prompt, reused in turns:
        found = list(session.stream(prompt, KEYS[0], GREEDY, max_new_tokens=4))
        row = np.array([prompt]), np.array([len(prompt)])
        alone = lj.generate(config, PARAMS, *row, KEYS[:1], GREEDY, max_new_tokens=4)
        assert found == np.asarray(alone.tokens[0]).tolist()
        assert session.reused == reused


def test_a_session_at_the_edge_of_what_a_ring_keeps():
    """Of 600 tokens run, 256 can be taken back, and no more."""
    session = Session(ALL_RINGS, PARAMS)
    next(session.stream(PROMPT[:600], KEYS[0], GREEDY, max_new_tokens=4))
    for length, reused in ((345, 345), (344, 344), (343, 0), (342, 342)):
        prompt = [*PROMPT[:length], 5]
        alone = run(np.array([prompt]), np.array([length + 1]), KEYS[:1], config=ALL_RINGS, max_new_tokens=4)
        assert list(session.stream(prompt, KEYS[0], GREEDY, max_new_tokens=4)) == alone.tokens[0].tolist()
        assert session.reused == reused


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "fsdp=2,context=2,tensor=2"])
def test_a_mesh_gives_the_tokens_of_one_device(mesh):
    """Over `context` the cache keeps everything, and the window is a mask."""
    expected = jax.device_get(run())
    mesh = meshes.make_mesh(mesh)
    with jax.set_mesh(mesh):
        params = lj.shard_params(jax.device_get(PARAMS), mesh, CONFIG)
        out = jax.device_get(run(params=params))
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.slow
def test_beams_and_drafts_on_a_context_mesh():
    tokens, lengths = TOKENS[1:3, :300], np.array([300, 290], np.int32)
    search = functools.partial(lj.beam_search, num_beams=2, max_new_tokens=6)
    speculate = functools.partial(
        lj.speculative_generate, key=KEYS[:2], sampling=GREEDY, max_new_tokens=6, num_draft_tokens=3
    )
    wanted = jax.device_get([f(CONFIG, PARAMS, tokens, lengths) for f in (search, speculate)])
    mesh = meshes.make_mesh("fsdp=2,context=2,tensor=2")
    with jax.set_mesh(mesh):
        params = lj.shard_params(jax.device_get(PARAMS), mesh, CONFIG)
        found = jax.device_get([f(CONFIG, params, tokens, lengths) for f in (search, speculate)])
    np.testing.assert_array_equal(found[0].tokens, wanted[0].tokens)
    np.testing.assert_array_equal(found[1].output.tokens, wanted[1].output.tokens)


def test_works_under_vmap_and_inside_shard_map():
    tokens, lengths = TOKENS[1:, :300], np.array([300, 290, 1], np.int32)
    go = functools.partial(run, tokens, lengths, sampling=RANDOM, max_new_tokens=4)
    out = jax.jit(jax.vmap(lambda key: go(key).tokens))(KEYS[:2])
    for each, key in zip(out, KEYS[:2], strict=True):
        np.testing.assert_array_equal(each, go(key).tokens)
    mesh = jax.make_mesh((3,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    rows = lambda *request: run(*request, RANDOM, max_new_tokens=4).tokens  # noqa: E731
    split = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=(P("rows"),) * 3, out_specs=P("rows")))
    np.testing.assert_array_equal(split(tokens, lengths, KEYS[:3]), go(KEYS[:3]).tokens)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_compiled_loop_never_copies_a_ring(rows):
    request = arguments.prepare_request(CONFIG, TOKENS[:rows], LENGTHS[:rows], GREEDY, None, 12, key=KEYS[0])
    static = {"num_return_sequences": 1, "top_logprobs": 0, "cache_dtype": None}
    state = generation.prefill_jit(CONFIG, PARAMS, request, 12, **static)
    body = loop_body(
        optimized(generation.decode_program("cpu").lower(CONFIG, PARAMS, state, np.int32(12))).as_text()
    )
    heads, width = CONFIG.num_key_value_heads, CONFIG.head_dim
    length = kv.slots(state.cache.k[0])
    size = rows * heads * length * width
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", body)]
    assert any(math.prod(shape) == size and length in shape for shape in shapes)
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|select|transpose|convert|gather|concatenate)\(", body)
    assert not [dims for dims in moved if math.prod(map(int, dims.split(","))) == size]


def test_more_tokens_at_once_than_a_ring_has_slots_for():
    cache = kv.init_cache(ALL_RINGS, 1, 1000, jnp.float32)
    tokens = np.zeros((1, kv.RUN_LENGTH + 2), np.int32)
    with pytest.raises(
        InputError, match="258 tokens are run at once, and a layer with a window of 8 has 264"
    ):
        forward_cached(ALL_RINGS, PARAMS, tokens, np.zeros(1, np.int32), cache)
