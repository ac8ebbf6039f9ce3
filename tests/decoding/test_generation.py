"""Invariants of decoding: a row does not depend on its batch, and generate is a pure function.

Most tests run batches of four rows of one model, so that they share its compiled programs.
"""

from __future__ import annotations

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import llama_jax as lj
from llama_jax import meshes, sharding
from llama_jax.decoding import arguments, generation, processes
from llama_jax.errors import ConfigError, InputError
from tests.decoding.compiled import counting_compiles, loop_body
from tests.optimized import optimized
from tests.random_models import SMALL, random_model, random_prompts
from tests.uncached import logprobs_by_forward, pick

GREEDY = lj.Sampling(temperature=0.0)
RANDOM = lj.Sampling(temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.1)
samplings = pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 8)  # a key for each row, which takes another program than a single one

# Not SMALL itself: other files' programs would be missing from the count of `warmed`.
CONFIG, STACKED = random_model(0, SMALL.replace(rms_norm_eps=2e-5))
PARAMS = lj.unstack(STACKED)
TOKENS, LENGTHS = random_prompts(0, CONFIG, [3, 17, 1, 9])
MODELS = {
    "grouped": CONFIG,
    "multi-head": SMALL.replace(
        num_key_value_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_scaling=lj.RopeScaling("yarn", 4.0, original_max_position_embeddings=32),
    ),
    "multi-query": SMALL.replace(
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
        rope_scaling=lj.RopeScaling("ntk", 4.0),
    ),
}
models = pytest.mark.parametrize("name", MODELS)


def sharded(params, mesh, config=CONFIG):
    """Parameters on a mesh; from numpy, of which parts are cut without compiling programs."""
    return lj.shard_params(jax.device_get(params), mesh, config)


def model_of(name):
    config, params = random_model(0, MODELS[name])
    return config, params, *random_prompts(0, config, [3, 17, 1, 9])


def run(
    tokens=TOKENS, lengths=LENGTHS, key=KEY, sampling=GREEDY, *, config=CONFIG, params=PARAMS, **settings
):
    return lj.generate(config, params, tokens, lengths, key, sampling, **{"max_new_tokens": 12} | settings)


def run_stream(
    tokens=TOKENS, lengths=LENGTHS, key=KEY, sampling=GREEDY, *, config=CONFIG, params=PARAMS, **settings
):
    """The tokens that `stream` yields [B, steps], and where rows were live."""
    settings = {"max_new_tokens": 12} | settings
    steps = list(lj.stream(config, params, tokens, lengths, key, sampling, **settings))
    return np.stack([token for token, _ in steps], axis=1), np.stack([live for _, live in steps], axis=1)


@pytest.fixture(autouse=True, scope="module")
def warmed():
    """Compiles the programs of four rows, before any test does; returns their number and that of sizes."""
    with counting_compiles() as compiled:
        sizes = lj.warm_up(CONFIG, PARAMS, batch=4)
    return len(compiled), sizes


def test_after_warm_up_no_request_compiles(warmed):
    """Requests of all lengths with random settings."""
    assert warmed == (6, 3)  # two programs for each of three sizes of cache
    rng = np.random.default_rng(0)
    vocabulary = CONFIG.vocab_size
    longest = set()
    with counting_compiles() as compiled:
        for number in range(60):
            limit = 500 if number % 10 == 0 else 200
            tokens, lengths = random_prompts(number, CONFIG, rng.integers(1, limit, 4).tolist())
            sampling = lj.Sampling(
                temperature=float(rng.choice([0, 0.7, 1.5])),
                top_k=int(rng.integers(0, 9)),
                top_p=float(rng.uniform(0.1, 1)),
                min_p=float(rng.uniform(0, 0.3)),
                repetition_penalty=float(rng.uniform(0.8, 1.5)),
                presence_penalty=float(rng.uniform(-1, 1)),
                frequency_penalty=float(rng.uniform(-1, 1)),
                no_repeat_ngram_size=int(rng.integers(0, 5)),
                min_new_tokens=int(rng.integers(0, 4)),
                suppress_tokens=rng.integers(0, vocabulary // 2, rng.integers(0, 9)),
                forced_tokens=rng.integers(vocabulary // 2, vocabulary, rng.integers(0, 3)),
            )
            (run if number % 2 else run_stream)(
                tokens, lengths, jax.random.key(number), sampling,
                max_new_tokens=int(rng.integers(1, 5)),
                eos_id=rng.integers(0, vocabulary, rng.integers(0, 5)),
            )  # fmt: skip
            longest.add(arguments.cache_capacity(int(lengths.max())))
    assert longest == {128, 256, 512}
    assert not compiled


@models
def test_greedy_is_argmax_of_forward(name):
    config, params, tokens, lengths = model_of(name)
    out = lj.generate(config, params, tokens, lengths, KEYS[:4], GREEDY, max_new_tokens=12)
    logprobs = logprobs_by_forward(config, params, tokens, lengths, out.tokens)
    np.testing.assert_array_equal(out.tokens, logprobs.argmax(-1))
    np.testing.assert_allclose(out.logprobs, logprobs.max(-1), atol=2e-5)


def test_log_probabilities_are_those_of_forward():
    """Whatever the temperature, filters and penalties."""
    out = run(sampling=RANDOM)
    logprobs = logprobs_by_forward(CONFIG, STACKED, TOKENS, LENGTHS, out.tokens)
    np.testing.assert_allclose(out.logprobs, pick(logprobs, out.tokens), atol=2e-5)


@models
def test_a_row_in_a_ragged_batch_is_the_row_alone(name):
    config, params, tokens, lengths = model_of(name)
    keys = KEYS[:4]
    for sampling in (GREEDY, RANDOM):
        settings = {"max_new_tokens": 12, "eos_id": [3, 40]}
        together = jax.device_get(lj.generate(config, params, tokens, lengths, keys, sampling, **settings))
        for row in range(4):
            one = slice(row, row + 1)
            prompt = tokens[one, : lengths[row]], lengths[one], keys[one]
            alone = jax.device_get(lj.generate(config, params, *prompt, sampling, **settings))
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
            assert alone.lengths[0] == together.lengths[row]


def test_padding_does_not_matter():
    more = np.concatenate([TOKENS, np.full((4, 30), -5, np.int32)], axis=1)
    unpadded, padded = run(sampling=RANDOM), run(more, sampling=RANDOM)
    np.testing.assert_array_equal(padded.tokens, unpadded.tokens)
    np.testing.assert_allclose(padded.logprobs, unpadded.logprobs, atol=1e-5)


start = jax.jit(lj.prefill, static_argnums=0, static_argnames="max_new_tokens")
step = jax.jit(lj.decode_step, static_argnums=0)


def test_a_row_ends_with_any_eos_id_and_the_loop_with_the_last_row():
    free = jax.device_get(run())
    ends = [int(free.tokens[row, column]) for row, column in enumerate((2, 5, 8, 3))]
    out = jax.device_get(run(eos_id=ends))
    for row in range(4):
        length = 1 + next(i for i, token in enumerate(free.tokens[row].tolist()) if token in ends)
        assert out.lengths[row] == length < 12
        assert out.tokens[row].tolist() == free.tokens[row, :length].tolist() + [0] * (12 - length)
        assert not np.any(out.logprobs[row, length:])
    assert len(set(out.lengths.tolist())) > 1
    state = start(CONFIG, PARAMS, TOKENS, LENGTHS, KEY, GREEDY, max_new_tokens=12, eos_id=np.array(ends))
    while not state.done.all():
        state = step(CONFIG, PARAMS, state)
    assert state.count == out.lengths.max()
    np.testing.assert_array_equal(state.output.tokens, out.tokens)


def test_steps_past_the_limit_change_nothing():
    """Rows at their limit write nothing more to output and history."""
    state = start(CONFIG, PARAMS, TOKENS, LENGTHS, KEY, GREEDY, max_new_tokens=12, eos_id=np.full(4, -1))
    for _ in range(12):
        assert not state.done.any()
        state = step(CONFIG, PARAMS, state)
    assert state.done.all()
    further = step(CONFIG, PARAMS, step(CONFIG, PARAMS, state))
    same = jax.tree.map(np.array_equal, (further.output, further.history), (state.output, state.history))
    assert all(jax.tree.leaves(same))


@samplings
def test_stream_yields_what_generate_returns(sampling):
    out = run(sampling=sampling, eos_id=[1, 7, 30])
    streamed, live = run_stream(sampling=sampling, eos_id=[1, 7, 30])
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])
    np.testing.assert_array_equal(live.sum(1), out.lengths)


def test_works_inside_jit_and_under_vmap_over_keys():
    @jax.jit
    def program(params, keys, temperature):
        sampling = lj.Sampling(temperature=temperature)
        return jax.vmap(lambda key: run(key=key, sampling=sampling, params=params))(keys)

    out = jax.device_get(program(STACKED, KEYS[:3], 0.8))
    assert out.tokens.shape == (3, 4, 12)
    for i in range(3):
        alone = run(key=KEYS[i], sampling=lj.Sampling(temperature=0.8))
        np.testing.assert_array_equal(out.tokens[i], alone.tokens)


def test_works_inside_shard_map():
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def rows(params, tokens, lengths, keys):
        return run(tokens, lengths, keys, RANDOM, params=params).tokens

    lay = (P(), P("rows"), P("rows"), P("rows"))
    split = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=lay, out_specs=P("rows")))
    expected = run(key=KEYS[:4], sampling=RANDOM)
    np.testing.assert_array_equal(split(STACKED, TOKENS, LENGTHS, KEYS[:4]), expected.tokens)


def test_generate_inside_a_program_that_takes_gradients():
    """REINFORCE in one jitted function: `generate` contributes no gradient."""
    tokens = TOKENS[:, :1] % CONFIG.vocab_size
    settings = {"lengths": np.ones(4, np.int32), "sampling": RANDOM}

    def score(params, out):
        text = jnp.concatenate([tokens, out], axis=1)
        logprobs = jax.nn.log_softmax(lj.forward(CONFIG, params, text))[:, :-1]
        return jnp.take_along_axis(logprobs, out[..., None], -1).mean()

    def through(params):
        out = run(tokens, **settings, params=params)
        return score(params, out.tokens) + 0 * out.logprobs.sum()

    got = jax.jit(jax.grad(through))(STACKED)
    expected = jax.jit(jax.grad(score))(STACKED, run(tokens, **settings).tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("length", [1, 2, 33, 161, 300])
def test_chunked_prefill_equals_forward(length):
    """300 tokens take a large chunk and small ones, 161 one large chunk that is not full, 1 none."""
    tokens, lengths = random_prompts(0, CONFIG, [length, max(1, length // 2), 1, max(1, length - 1)])
    # The largest cache whatever the length, so that all share its programs.
    steps = lj.stream(CONFIG, PARAMS, tokens, lengths, KEY, GREEDY, max_new_tokens=512 - length)
    new_tokens = np.stack([token for token, _ in itertools.islice(steps, 4)], axis=1)
    logprobs = logprobs_by_forward(CONFIG, STACKED, tokens, lengths, new_tokens)
    np.testing.assert_array_equal(new_tokens, logprobs.argmax(-1))


def test_prefill_memory_grows_with_the_cache_alone():
    """Activation memory is that of one chunk, whatever the prompt's length."""
    config = CONFIG.replace(max_position_embeddings=8192)
    weights = jax.eval_shape(lambda key: lj.unstack(lj.init(config, key)), jax.random.key(0))
    static = {"num_return_sequences": 1, "top_logprobs": 0, "cache_dtype": None}
    temporary = []
    for length in (2000, 8000):
        request = arguments.prepare_request(
            config, np.ones((1, length), int), np.array([length]), GREEDY, None, 8
        )
        program = generation._prefill_bucketed.lower(
            config, weights, *request[:2], np.int32(length - 1), KEY, *request[2:4], np.int32(8), **static
        )
        temporary.append(optimized(program).memory_analysis().temp_size_in_bytes)
    kv = 2 * config.num_key_value_heads * config.head_dim * 4
    assert temporary[1] - temporary[0] <= 2 * kv * (8192 - 2048)  # the cache itself, in and out of the loop


@samplings
def test_several_sequences_per_prompt_and_the_most_likely_tokens(sampling):
    """`num_return_sequences` equals repeated prompts; `top_logprobs` are those of `forward`."""
    tokens, lengths = TOKENS[:2], LENGTHS[:2]
    out = jax.device_get(run(tokens, lengths, sampling=sampling, num_return_sequences=2, top_logprobs=5))
    tokens, lengths = tokens.repeat(2, axis=0), lengths.repeat(2)
    np.testing.assert_array_equal(out.tokens, run(tokens, lengths, sampling=sampling).tokens)
    assert (sampling is GREEDY) == bool((out.tokens[0] == out.tokens[1]).all())

    logprobs = logprobs_by_forward(CONFIG, STACKED, tokens, lengths, out.tokens)
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[..., :5]
    np.testing.assert_array_equal(out.top_tokens, ids)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(logprobs, ids, -1), atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "close"),
    [("float32", 1e-5), pytest.param("bfloat16", 0.1, marks=pytest.mark.slow), ("int8", 0.1), ("fp8", 0.25)],
)
def test_a_cache_of_lower_precision_gives_nearly_the_same_log_probabilities(dtype, close):
    tokens, lengths = random_prompts(6, CONFIG, [40, 21, 5, 33])
    forced = lj.Sampling(forced_tokens=np.random.default_rng(0).integers(0, CONFIG.vocab_size, 12))
    full = run(tokens, lengths, sampling=forced)
    small = run(tokens, lengths, sampling=forced, cache_dtype=dtype)
    np.testing.assert_array_equal(small.tokens, full.tokens)
    np.testing.assert_allclose(small.logprobs, full.logprobs, atol=close)
    assert (dtype == "float32") == np.array_equal(small.logprobs, full.logprobs)
    if dtype == "fp8":
        row = run(tokens[2:3], lengths[2:3], sampling=forced, cache_dtype=dtype)
        np.testing.assert_allclose(row.logprobs[0], small.logprobs[2], atol=1e-5)


def compiled_loop(rows, params=PARAMS):
    request = arguments.prepare_request(CONFIG, TOKENS[:rows], LENGTHS[:rows], GREEDY, None, 12, key=KEY)
    static = {"num_return_sequences": 1, "top_logprobs": 0, "cache_dtype": None}
    state = generation.prefill_jit(CONFIG, params, request, 12, **static)
    lowered = generation.decode_program("cpu").lower(CONFIG, params, state, np.int32(12))
    return loop_body(optimized(lowered).as_text())


def test_the_compiled_loop_never_copies_the_cache_or_a_weight():
    body = compiled_loop(4)
    cache = (4, CONFIG.num_key_value_heads, 128, CONFIG.head_dim)
    assert "f32[" + ",".join(map(str, cache)) + "]" in body and "dot" in body
    large = {math.prod(cache)} | {leaf.size for leaf in jax.tree.leaves(PARAMS) if leaf.ndim > 1}
    moved = re.findall(r"= (f32\[[\d,]+\])\S* (?:copy|transpose|convert)\(", body)
    sizes = {shape: math.prod(map(int, shape[4:-1].split(","))) for shape in moved}
    assert moved and not [shape for shape, size in sizes.items() if size in large]


@pytest.mark.slow
def test_a_step_on_a_tensor_mesh_communicates_activations_and_never_the_cache():
    """The embedding, attention's output, the feed-forward output, and the logits."""
    mesh = meshes.make_mesh("tensor=2", devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        body = compiled_loop(4, sharded(PARAMS, mesh))
    cache = f"f32[4,{CONFIG.num_key_value_heads // 2},128,{CONFIG.head_dim}]"
    assert cache in body and f"{cache}{{3,2,1,0}} copy(" not in body
    collectives = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (\w+\[[\d,]*\])\S* ({collectives})(?:-start)?\(", body)
    activations, logits = f"f32[4,1,{CONFIG.hidden_size}]", f"f32[4,{CONFIG.vocab_size}]"
    assert sorted(found) == [(activations, "all-reduce")] * 3 + [(logits, "all-gather")]


def test_the_compiled_loop_of_one_row_never_copies_the_cache():
    body, heads, width = compiled_loop(1), CONFIG.num_key_value_heads, CONFIG.head_dim
    assert re.search(rf"f32\[(1,{heads}|{heads},1),128,{width}\]", body)
    # Nor transposed for the product with the query.
    sides = rf"(128,{width}|{width},128)"
    moved = rf"= f32\[(1,{heads}|{heads},1|{heads}),{sides}\]\S* (?:copy|select|transpose)\("
    assert not re.search(moved, body)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [0, 3]}, "lengths is 0 in row 0: an empty prompt"),
        ({"lengths": [3, 9]}, "lengths is 9 in row 1: longer than a row of tokens, which is 4"),
        ({"lengths": [3]}, "lengths has shape (1,); it must be [2]"),
        (
            {"tokens": [[1, 2, 3, 4], [1, 72, 3, 4]]},
            "token id 72 in row 1, position 1 is outside the vocabulary of 72",
        ),
        ({"tokens": [[1, -2, 3, 4], [1, 2, 3, 4]]}, "token id -2 in row 0, position 1"),
        ({"tokens": [1, 2, 3]}, "tokens has shape (3,); it must be [batch, length]"),
        ({"tokens": np.zeros((2, 0), int)}, "a prompt needs at least one token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        (
            {"max_new_tokens": 510},
            "the prompt's 3 tokens and max_new_tokens 510 need 513 positions; the model's context has 512",
        ),
        ({"sampling": lj.Sampling(temperature=-1.0)}, "temperature is -1.0"),
        ({"sampling": lj.Sampling(top_p=np.zeros(3))}, "top_p has shape (3,)"),
        ({"tokens": [[1.5, 2, 3, 4], [1, 2, 3, 4]]}, "tokens is float"),
        ({"lengths": [2.5, 3]}, "lengths is float"),
        ({"eos_id": 2.5}, "eos_id is 2.5; it must be a token id, a sequence of them, or None"),
        ({"eos_id": {1, 2}}, "eos_id is {1, 2}"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0; it must be a whole number, at least 1"),
        ({"top_logprobs": 73}, "top_logprobs is 73; the vocabulary has 72 tokens"),
        (
            {"cache_dtype": "int4"},
            "cache_dtype is 'int4'; it must be one of float32, bfloat16, float16, int8, float8_e4m3fn",
        ),
        ({"cache_dtype": "float64"}, "cache_dtype is 'float64'"),
        ({"sampling": lj.Sampling(suppress_tokens=[72])}, "suppress_tokens holds 72"),
        ({"key": 0}, "key is int32 of shape (); make one with jax.random.key(seed)"),
        ({"key": jax.random.split(KEY, 3)}, "key has shape (3,); give one key, or one for each of 2 rows"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    given = {
        "tokens": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "lengths": [3, 3],
        "key": KEY,
        "sampling": GREEDY,
        "max_new_tokens": 4,
    } | arguments
    tokens, lengths = (np.array(given.pop(name)) for name in ("tokens", "lengths"))
    with pytest.raises(InputError) as error:
        run(tokens, lengths, **given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_lists_are_arrays():
    rows, lengths = TOKENS.tolist(), LENGTHS.tolist()
    arguments = {"sampling": GREEDY, "max_new_tokens": 9}
    listed = lj.generate(CONFIG, PARAMS, rows, lengths, KEY, **arguments)
    given = lj.generate(CONFIG, PARAMS, TOKENS, LENGTHS, KEY, **arguments)
    jax.tree.map(np.testing.assert_array_equal, listed, given)
    for function in (
        lambda tokens, lengths: lj.forward(CONFIG, PARAMS, tokens, tokens, tokens),
        lambda tokens, lengths: lj.next_token_loss(CONFIG, PARAMS, tokens, tokens, tokens, tokens),
        lambda tokens, lengths: lj.token_logprobs(CONFIG, PARAMS, tokens, tokens, tokens),
        lambda tokens, lengths: lj.prefill(CONFIG, PARAMS, tokens, lengths, KEY, max_new_tokens=9),
    ):  # shapes alone: nothing is compiled
        of_lists = jax.eval_shape(lambda f=function: f(rows, lengths))
        of_arrays = jax.eval_shape(lambda f=function: f(jnp.asarray(TOKENS), jnp.asarray(LENGTHS)))
        assert of_lists == of_arrays


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2], [3]], "tokens has rows of different lengths; pad them on the right"),
        ([1, 2], "shape (2,)"),
        ([[1, 2**40]], "tokens contains 1099511627776, beyond any vocabulary"),
        ("ab", "tokens is 'ab'; it must be an array, or a list, of whole numbers"),
        ([["a"]], "tokens is \"[['a']]\"; it must be an array, or a list, of whole numbers"),
        ([[0.5]], "tokens is float"),
    ],
)
def test_lists_that_are_no_arrays(tokens, message):
    for function in (lj.forward, lj.next_token_loss, lj.token_logprobs):
        with pytest.raises(InputError, match=re.escape(message)):
            function(CONFIG, PARAMS, tokens)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "did you mean max_new_tokens?"),
        ("seed", "give key=jax.random.key(seed)"),
        ("eos_token_id", "did you mean eos_id?"),
        ("temperature", "give sampling=Sampling(temperature=...)"),
        ("repeat_penalty", "give sampling=Sampling(repetition_penalty=...)"),
        ("cache_dtyp", "did you mean cache_dtype?"),
        ("zzz", "use one of config, params, tokens"),
    ],
)
def test_unknown_arguments_are_explained(name, hint):
    for function in (lj.generate, lj.stream, lj.speculative_generate):
        with pytest.raises(
            InputError, match=re.escape(f"{function.__name__} has no argument '{name}'; {hint}")
        ):
            function(CONFIG, PARAMS, TOKENS, LENGTHS, **{name: 1})


def test_no_type_of_a_setting_and_no_length_within_a_bucket_recompiles():
    array = lambda x: np.array([x], np.float64)  # noqa: E731
    forms = [
        {"temperature": 0},
        {"temperature": np.float32(0.5)},
        {"temperature": array(0.5)},
        {"temperature": array(0.5), "top_k": np.int64(4)},
        {"top_p": 1},
        {"top_k": array(4.0).astype(int), "min_p": 0.1},
    ]
    eos_ids = [None, 3, [3, 4], np.array([5]), (1, 2, 3)]
    for go in (run, run_stream):
        go(np.ones((1, 7), int), np.array([7]), KEYS[:1], max_new_tokens=2)
        with counting_compiles() as compiled:
            for n in range(12):
                tokens, lengths = random_prompts(n, CONFIG, [n + 1])
                sampling, eos_id = lj.Sampling(**forms[n % len(forms)]), eos_ids[n % len(eos_ids)]
                go(tokens, lengths, KEYS[:1], sampling, max_new_tokens=2, eos_id=eos_id)
        assert not compiled


@pytest.mark.slow
def test_one_bf16_prompt_on_a_mesh():
    """Sums are rounded in another order on a mesh, so only log-probabilities of given tokens compare."""
    prompt = TOKENS[:1], LENGTHS[:1]
    given = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 8).tolist()
    sampling = lj.Sampling(forced_tokens=given, temperature=0.9, top_k=20)
    expected = jax.device_get(run(*prompt, sampling=sampling))
    halved = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), PARAMS)
    mesh = meshes.make_mesh("context=2,tensor=2", devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = sharded(halved, mesh)
        out = jax.device_get(run(*prompt, sampling=sampling, params=params))
        streamed, _ = run_stream(*prompt, sampling=sampling, params=params)
    np.testing.assert_array_equal(streamed, out.tokens)
    assert out.tokens[0, :8].tolist() == given
    np.testing.assert_allclose(out.logprobs[:, :8], expected.logprobs[:, :8], atol=0.1)


def on_mesh(spec, name, count):
    """The output for the first of 8 rows, which are those of the module twice, on a mesh; streamed too."""
    config, params, tokens, lengths = model_of(name)
    mesh = meshes.make_mesh(spec)
    rows = np.arange(count) % 4
    with jax.set_mesh(mesh):
        given = tokens[rows], lengths[rows], KEYS[:count], RANDOM
        model = {"config": config, "params": sharded(lj.unstack(jax.device_get(params)), mesh, config)}
        out, (streamed, _) = run(*given, **model), run_stream(*given, **model)
    np.testing.assert_array_equal(streamed, out.tokens)
    return jax.device_get(out)


def assert_as_without_a_mesh(out, name, count):
    """The tokens; log-probabilities are rounded in another order on a mesh."""
    config, params, *prompts = model_of(name)
    assert len(out.tokens) == count
    for first in range(0, count, 4):
        keys = KEYS[first : first + 4]
        expected = jax.device_get(run(*prompts, keys, RANDOM, config=config, params=params))
        some = slice(first, min(first + 4, count))
        np.testing.assert_array_equal(out.tokens[some], expected.tokens[: count - first])
        np.testing.assert_allclose(out.logprobs[some], expected.logprobs[: count - first], atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "name", "counts"),
    [
        pytest.param("fsdp=4,tensor=2", "multi-head", [3, 1], marks=pytest.mark.slow),
        ("data=2,fsdp=2,context=2", "grouped", [5]),
    ],
)
def test_any_number_of_rows_on_any_mesh(spec, name, counts):
    """Rows that do not divide are filled up. With one on each device, each is bitwise the row alone.

    In multi-head attention a reshape to groups of one must not lose the sharding of a batch of one.
    """
    outputs = [on_mesh(spec, name, count) for count in counts]
    for count, out in zip(counts, outputs, strict=True):
        assert_as_without_a_mesh(out, name, count)
    if 1 in counts:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:1], b), *outputs)


@pytest.mark.slow
def test_several_sequences_of_each_prompt_on_a_mesh():
    """3 of each of 3 prompts: 9 rows on 8 devices are filled up to 24."""
    mesh, same = meshes.make_mesh("data=2,fsdp=4"), np.repeat(np.arange(3), 3)
    keys = jax.random.split(KEY, 9)
    with jax.set_mesh(mesh):
        settings = {"params": sharded(PARAMS, mesh), "num_return_sequences": 3}
        out = jax.device_get(run(TOKENS[:3], LENGTHS[:3], keys, RANDOM, **settings))
    assert len(out.tokens) == 9
    for first in (0, 4, 5):
        rows = same[first : first + 4]
        expected = jax.device_get(run(TOKENS[rows], LENGTHS[rows], keys[first : first + 4], RANDOM))
        np.testing.assert_array_equal(out.tokens[first : first + 4], expected.tokens)


def test_forward_says_which_number_of_rows_divides():
    mesh = meshes.make_mesh("fsdp=4,tensor=2")
    with (
        jax.set_mesh(mesh),
        pytest.raises(ConfigError, match="batch of 3 rows does not divide over mesh axes"),
    ):
        lj.forward(CONFIG, PARAMS, TOKENS[:3])


def test_inside_jit_nothing_leaves_the_device(monkeypatch):
    """No callback to the host and no look at other processes, on a mesh and without one."""

    class Untouchable:
        def __getattr__(self, name):
            pytest.fail(f"{name} of the coordination service is used")

    monkeypatch.setattr(processes, "_client", Untouchable)
    go = functools.partial(lj.generate, CONFIG, sampling=RANDOM, max_new_tokens=4)
    mesh = meshes.make_mesh("fsdp=4,tensor=2")
    for setting in (mesh, None):
        with sharding.use_mesh(setting):
            params = PARAMS if setting is None else sharded(PARAMS, mesh)
            jaxpr = str(jax.make_jaxpr(go)(params, TOKENS[:3], LENGTHS[:3], KEYS[:3]))
        assert "while[" in jaxpr
        assert not re.search("callback|infeed|outfeed", jaxpr)


def test_works_with_64_bit_types_enabled():
    expected = run(sampling=RANDOM)
    with jax.enable_x64(True):
        out = run(sampling=RANDOM)
        loss = jax.jit(lj.next_token_loss, static_argnums=0)(CONFIG, STACKED, TOKENS % CONFIG.vocab_size)
        assert loss.total.dtype == jnp.float32
        again = lj.init(CONFIG, KEY)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    jax.tree.map(np.testing.assert_array_equal, again, lj.init(CONFIG, KEY))
