"""Invariants of decoding: a row does not depend on its batch, and generate is a pure function."""

from __future__ import annotations

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import llama_jax as lj
from llama_jax import sharding
from llama_jax.decoding import arguments, generation
from llama_jax.errors import ConfigError, InputError
from tests.random_models import random_model, random_prompts

GREEDY = lj.Sampling(temperature=0.0)
RANDOM = lj.Sampling(temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.1)
KEY = jax.random.key(0)
MODEL = random_model(0, lj.presets.TINY)


@contextlib.contextmanager
def counting_compiles():
    """Collects an event for each program that XLA compiles."""
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def by_forward(config, params, prompt, count):
    """Greedy decoding without a cache: the whole sequence through `forward` for every token."""
    text = list(prompt)
    forward = jax.jit(lambda tokens: lj.forward(config, params, tokens))
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(text)] = text
        text.append(int(forward(padded)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_argmax_of_forward(seed):
    config, params = random_model(seed)
    tokens, lengths = random_prompts(seed, config, [5, 9])
    out = lj.generate(config, params, tokens, lengths, KEY, GREEDY, max_new_tokens=8)
    for row in range(2):
        assert out.tokens[row].tolist() == by_forward(config, params, tokens[row, : lengths[row]], 8)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
@pytest.mark.parametrize("seed", range(4))
def test_a_row_in_a_ragged_batch_is_the_row_alone(seed, sampling):
    config, params = random_model(seed)
    tokens, lengths = random_prompts(seed, config, [3, 17, 1, 9])
    keys = jax.random.split(KEY, 4)
    together = lj.generate(config, params, tokens, lengths, keys, sampling, max_new_tokens=8, eos_id=3)
    for row in range(4):
        prompt = tokens[row : row + 1, : lengths[row]]
        alone = lj.generate(
            config,
            params,
            prompt,
            lengths[row : row + 1],
            keys[row : row + 1],
            sampling,
            max_new_tokens=8,
            eos_id=3,
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        assert alone.lengths[0] == together.lengths[row]


def test_padding_does_not_matter():
    config, params = random_model(5)
    tokens, lengths = random_prompts(5, config, [4, 7])
    more = np.concatenate([tokens, np.full((2, 30), -5, np.int32)], axis=1)
    unpadded = lj.generate(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=6)
    padded = lj.generate(config, params, more, lengths, KEY, RANDOM, max_new_tokens=6)
    np.testing.assert_array_equal(padded.tokens, unpadded.tokens)
    np.testing.assert_allclose(padded.logprobs, unpadded.logprobs, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_log_probabilities_are_those_of_forward(sampling):
    config, params = random_model(6)
    tokens, lengths = random_prompts(6, config, [6, 6])
    out = lj.generate(config, params, tokens, lengths, KEY, sampling, max_new_tokens=7)
    text = np.concatenate([tokens, out.tokens], axis=1)
    logprobs = jax.nn.log_softmax(lj.forward(config, params, text))[:, 5:-1]
    picked = np.take_along_axis(np.asarray(logprobs), np.asarray(out.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.logprobs, picked, atol=2e-5)


def test_a_row_ends_with_any_eos_id_and_the_loop_with_the_last_row():
    config, params = random_model(1)
    tokens, lengths = random_prompts(1, config, [5, 8])
    free = lj.generate(config, params, tokens, lengths, KEY, GREEDY, max_new_tokens=10)
    ends = [int(free.tokens[0, 2]), int(free.tokens[1, 5])]
    out = lj.generate(config, params, tokens, lengths, KEY, GREEDY, max_new_tokens=10, eos_id=ends)
    for row in range(2):
        length = 1 + next(i for i, token in enumerate(free.tokens[row].tolist()) if token in ends)
        assert out.lengths[row] == length
        assert out.tokens[row].tolist() == free.tokens[row, :length].tolist() + [0] * (10 - length)
        assert not np.any(out.logprobs[row, length:])
    weights = lj.unstack(params)
    start = functools.partial(lj.prefill, max_new_tokens=10, eos_id=ends)
    state = jax.jit(start, static_argnums=0)(config, weights, tokens, lengths, KEY, GREEDY)
    step = jax.jit(lj.decode_step, static_argnums=0)
    while not state.done.all():
        state = step(config, weights, state)
    assert state.count == out.lengths.max()


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_stream_yields_what_generate_returns(sampling):
    config, params = random_model(2)
    tokens, lengths = random_prompts(2, config, [5, 8])
    out = lj.generate(config, params, tokens, lengths, KEY, sampling, max_new_tokens=12, eos_id=[1, 7, 30])
    steps = list(
        lj.stream(config, params, tokens, lengths, KEY, sampling, max_new_tokens=12, eos_id=[1, 7, 30])
    )
    streamed = np.stack([token for token, _ in steps], axis=1)
    live = np.stack([live for _, live in steps], axis=1)
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])
    np.testing.assert_array_equal(live.sum(1), out.lengths)


def test_works_inside_jit_and_under_vmap_over_keys():
    config, params = random_model(3)
    tokens, lengths = random_prompts(3, config, [5, 8])

    @jax.jit
    def program(params, tokens, keys, temperature):
        sample = lambda key: lj.generate(  # noqa: E731
            config, params, tokens, lengths, key, lj.Sampling(temperature=temperature), max_new_tokens=6
        )
        return jax.vmap(sample)(keys)

    keys = jax.random.split(KEY, 3)
    out = program(params, tokens, keys, 0.7)
    assert out.tokens.shape == (3, 2, 6)
    for i in range(3):
        alone = lj.generate(
            config, params, tokens, lengths, keys[i], lj.Sampling(temperature=0.7), max_new_tokens=6
        )
        np.testing.assert_array_equal(out.tokens[i], alone.tokens)


def test_works_inside_shard_map():
    config, params = random_model(3)
    tokens, lengths = random_prompts(3, config, [5, 8, 2, 11, 6, 6, 7, 1])
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    keys = jax.random.split(KEY, 8)
    lay = (P(), P("rows"), P("rows"), P("rows"))

    def rows(params, tokens, lengths, keys):
        return lj.generate(config, params, tokens, lengths, keys, RANDOM, max_new_tokens=5).tokens

    split = jax.shard_map(rows, mesh=mesh, in_specs=lay, out_specs=P("rows"))
    expected = lj.generate(config, params, tokens, lengths, keys, RANDOM, max_new_tokens=5)
    np.testing.assert_array_equal(jax.jit(split)(params, tokens, lengths, keys), expected.tokens)


@pytest.mark.parametrize("length", [1, 2, 33, 161, 300])
def test_chunked_prefill_equals_forward(length):
    """300 tokens take a large chunk and small ones, 161 one large chunk that is not full, 1 none."""
    config, params = MODEL
    config = config.replace(max_position_embeddings=1024)
    tokens, lengths = random_prompts(0, config, [length, max(1, length // 2)])
    out = lj.generate(config, params, tokens, lengths, KEY, GREEDY, max_new_tokens=4)
    for row in range(2):
        prompt = tokens[row, : lengths[row]]
        assert out.tokens[row].tolist() == by_forward(config, params, prompt, 4)


def test_prefill_memory_grows_with_the_cache_alone():
    """Activation memory is that of one chunk, whatever the prompt's length."""
    config = lj.presets.TINY.replace(max_position_embeddings=8192, num_hidden_layers=1)
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
        temporary.append(program.compile().memory_analysis().temp_size_in_bytes)
    kv = 2 * config.num_key_value_heads * config.head_dim * 4
    assert temporary[1] - temporary[0] <= 2 * kv * (8192 - 2048)  # the cache itself, in and out of the loop


def test_steps_past_the_limit_change_nothing():
    """Rows at their limit write nothing more to output and history."""
    config, params = MODEL
    weights = lj.unstack(params)
    tokens, lengths = random_prompts(0, config, [6, 3])
    start = jax.jit(functools.partial(lj.prefill, max_new_tokens=3), static_argnums=0)
    step = jax.jit(lj.decode_step, static_argnums=0)
    state = start(config, weights, tokens, lengths, KEY, GREEDY)
    for _ in range(3):
        state = step(config, weights, state)
    assert state.done.all()
    further = step(config, weights, step(config, weights, state))
    same = jax.tree.map(np.array_equal, (further.output, further.history), (state.output, state.history))
    assert all(jax.tree.leaves(same))


def test_after_warm_up_no_request_compiles():
    """500 requests of lengths 1 to 1500 with random settings."""
    config, params = random_model(0)
    config = config.replace(max_position_embeddings=2048, num_hidden_layers=1)
    weights = {**params, "layers": lj.unstack(params)["layers"][:1]}
    rng = np.random.default_rng(0)
    vocabulary = config.vocab_size
    with counting_compiles() as compiled:
        lj.warm_up(config, weights)
    assert len(compiled) == 10  # two for each of five sizes of cache
    with counting_compiles() as compiled:
        for number in range(500):
            length = int(rng.integers(1, 1501)) if number % 10 == 0 else int(rng.integers(1, 200))
            tokens, lengths = random_prompts(number, config, [length])
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
            run = lj.generate if number % 2 else lambda *a, **k: list(lj.stream(*a, **k))
            run(
                config, weights, tokens, lengths, jax.random.key(number), sampling,
                max_new_tokens=int(rng.integers(1, 5)),
                eos_id=rng.integers(0, vocabulary, rng.integers(0, 5)),
            )  # fmt: skip
    assert not compiled


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_num_return_sequences_equals_repeated_prompts(sampling):
    config, params = random_model(2)
    tokens, lengths = random_prompts(2, config, [5, 8])
    out = lj.generate(
        config, params, tokens, lengths, KEY, sampling, max_new_tokens=6, num_return_sequences=3
    )
    repeated = tokens.repeat(3, axis=0), lengths.repeat(3)
    expected = lj.generate(config, params, *repeated, KEY, sampling, max_new_tokens=6)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert (sampling is GREEDY) == bool((out.tokens[0] == out.tokens[1]).all())


def test_top_logprobs_are_those_of_forward():
    config, params = random_model(6)
    tokens, lengths = random_prompts(6, config, [6, 6])
    out = lj.generate(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=7, top_logprobs=5)
    text = np.concatenate([tokens, out.tokens], axis=1)
    logprobs = jax.nn.log_softmax(lj.forward(config, params, text))[:, 5:-1]
    values, ids = jax.lax.top_k(logprobs, 5)
    np.testing.assert_array_equal(out.top_tokens, ids)
    np.testing.assert_allclose(out.top_logprobs, values, atol=2e-5)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.1), ("int8", 0.1)])
def test_a_cache_of_lower_precision_gives_nearly_the_same_log_probabilities(dtype, close):
    config, params = random_model(6)
    tokens, lengths = random_prompts(6, config, [40, 21])
    forced = np.random.default_rng(0).integers(0, config.vocab_size, 8)
    settings = {"sampling": lj.Sampling(forced_tokens=forced), "max_new_tokens": 8}
    full = lj.generate(config, params, tokens, lengths, KEY, **settings)
    small = lj.generate(config, params, tokens, lengths, KEY, cache_dtype=dtype, **settings)
    np.testing.assert_array_equal(small.tokens, full.tokens)
    np.testing.assert_allclose(small.logprobs, full.logprobs, atol=close)
    assert (dtype == "float32") == np.array_equal(small.logprobs, full.logprobs)


def test_generate_inside_a_program_that_takes_gradients():
    """REINFORCE in one jitted function: `generate` contributes no gradient."""
    config, params = random_model(3)
    tokens, lengths = random_prompts(3, config, [5, 5])

    def score(params, tokens, out):
        text = jax.numpy.concatenate([tokens, out], axis=1)
        logprobs = jax.nn.log_softmax(lj.forward(config, params, text))[:, 4:-1]
        return jax.numpy.take_along_axis(logprobs, out[..., None], -1).mean()

    def through(params):
        out = lj.generate(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=4)
        return score(params, tokens, out.tokens) + 0 * out.logprobs.sum()

    drawn = lj.generate(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=4).tokens
    got = jax.jit(jax.grad(through))(params)
    expected = jax.jit(jax.grad(score))(params, tokens, drawn)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(got))


def loop_body(text):
    """The compiled decode loop: every line of its body and of the fusions and calls within."""
    parts = re.split(r"^(?=%|ENTRY )", text, flags=re.M)
    computations = {match[1]: part for part in parts if (match := re.match(r"(?:ENTRY )?%([\w.\-]+) ", part))}
    loops = re.findall(r"while\(.*?body=%([\w.\-]+)", text)
    todo, done = [max(loops, key=lambda name: len(computations[name]))], {}
    while todo:
        name = todo.pop()
        done[name] = computations[name]
        called = re.findall(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)", computations[name])
        todo += [other for other in called if other not in done]
    return "\n".join(done.values())


def test_the_compiled_loop_never_copies_the_cache_or_a_weight():
    config, params = MODEL
    tokens, lengths = random_prompts(0, config, [16, 16, 9])
    weights = lj.unstack(params)
    request = arguments.prepare_request(config, tokens, lengths, GREEDY, None, 100)
    static = {"num_return_sequences": 1, "top_logprobs": 0, "cache_dtype": None}
    state = generation.prefill_jit(config, weights, request, KEY, 100, **static)
    compiled = generation.decode_program("cpu").lower(config, weights, state, np.int32(100))
    body = loop_body(compiled.compile().as_text())
    cache = (3, config.num_key_value_heads, 128, config.head_dim)
    assert "f32[" + ",".join(map(str, cache)) + "]" in body and "dot" in body
    large = {math.prod(cache)} | {leaf.size for leaf in jax.tree.leaves(weights) if leaf.ndim > 1}
    moved = re.findall(r"= (f32\[[\d,]+\])\S* (?:copy|transpose|convert)\(", body)
    sizes = {shape: math.prod(map(int, shape[4:-1].split(","))) for shape in moved}
    assert moved and not [shape for shape, size in sizes.items() if size in large]


def test_the_compiled_loop_of_one_row_never_copies_the_cache():
    config, params = MODEL
    tokens, lengths = random_prompts(0, config, [16])
    weights = lj.unstack(params)
    request = arguments.prepare_request(config, tokens, lengths, GREEDY, None, 100)
    static = {"num_return_sequences": 1, "top_logprobs": 0, "cache_dtype": None}
    state = generation.prefill_jit(config, weights, request, KEY, 100, **static)
    body = loop_body(
        generation.decode_program("cpu").lower(config, weights, state, np.int32(100)).compile().as_text()
    )
    heads, width = config.num_key_value_heads, config.head_dim
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
            {"tokens": [[1, 2, 3, 4], [1, 256, 3, 4]]},
            "token id 256 in row 1, position 1 is outside the vocabulary of 256",
        ),
        ({"tokens": [[1, -2, 3, 4], [1, 2, 3, 4]]}, "token id -2 in row 0, position 1"),
        ({"tokens": [1, 2, 3]}, "tokens has shape (3,); it must be [batch, length]"),
        ({"tokens": np.zeros((2, 0), int)}, "a prompt needs at least one token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        (
            {"max_new_tokens": 254},
            "the prompt's 3 tokens and max_new_tokens 254 need 257 positions; the model's context has 256",
        ),
        ({"sampling": lj.Sampling(temperature=-1.0)}, "temperature is -1.0"),
        ({"sampling": lj.Sampling(top_p=np.zeros(3))}, "top_p has shape (3,)"),
        ({"tokens": [[1.5, 2, 3, 4], [1, 2, 3, 4]]}, "tokens is float"),
        ({"lengths": [2.5, 3]}, "lengths is float"),
        ({"eos_id": 2.5}, "eos_id is 2.5; it must be a token id, a sequence of them, or None"),
        ({"eos_id": {1, 2}}, "eos_id is {1, 2}"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0; it must be a whole number, at least 1"),
        ({"top_logprobs": 257}, "top_logprobs is 257; the vocabulary has 256 tokens"),
        (
            {"cache_dtype": "int4"},
            "cache_dtype is 'int4'; it must be one of float32, bfloat16, float16, int8",
        ),
        ({"cache_dtype": "float64"}, "cache_dtype is 'float64'"),
        ({"sampling": lj.Sampling(suppress_tokens=[256])}, "suppress_tokens holds 256"),
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
    config, params = MODEL
    tokens, lengths = (np.array(given.pop(name)) for name in ("tokens", "lengths"))
    with pytest.raises(InputError) as error:
        lj.generate(config, params, tokens, lengths, **given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_type_of_a_setting_and_no_length_within_a_bucket_recompiles():
    config, params = MODEL
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
    weights = lj.unstack(params)
    for run in (lj.generate, lambda *a, **k: list(lj.stream(*a, **k))):
        run(config, weights, np.ones((1, 7), int), np.array([7]), KEY, GREEDY, max_new_tokens=2)
        with counting_compiles() as compiled:
            for n in range(12):
                tokens, lengths = random_prompts(n, config, [n + 1])
                sampling = lj.Sampling(**forms[n % len(forms)])
                run(
                    config, weights, tokens, lengths, KEY, sampling,
                    max_new_tokens=2, eos_id=eos_ids[n % len(eos_ids)],
                )  # fmt: skip
        assert not compiled


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("spec", ["tensor=2", "context=2"])
def test_a_single_prompt_on_a_mesh_gives_the_same_tokens(spec, dtype):
    config, params = MODEL
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tokens, lengths = random_prompts(0, config, [6])
    expected = lj.generate(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=4)
    mesh = sharding.make_mesh(spec, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        params = lj.shard_params(params, mesh, config)
        out = lj.generate(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=4)
        streamed = lj.stream(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=4)
        np.testing.assert_array_equal(np.stack([t for t, _ in streamed], 1), out.tokens)
    if dtype == jnp.float32:  # bf16 sums in another order on a mesh
        np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_one_row_of_multi_head_attention_on_a_mesh():
    """G = 1: a reshape to groups of one must not lose the sharding of a batch of one."""
    config, params = random_model(0, lj.presets.TINY.replace(num_key_value_heads=8, num_hidden_layers=1))
    tokens, lengths = random_prompts(0, config, [6])
    expected = lj.generate(config, params, tokens, lengths, KEY, GREEDY, max_new_tokens=4)
    mesh = sharding.make_mesh("tensor=2", devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        params = lj.shard_params(params, mesh, config)
        out = lj.generate(config, params, tokens, lengths, KEY, GREEDY, max_new_tokens=4)
    np.testing.assert_array_equal(out.tokens, expected.tokens)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("spec", ["fsdp=4,tensor=2", "fsdp=8"])
def test_a_batch_that_does_not_divide_the_mesh_is_replicated(spec, count):
    """With 8 sequences of one prompt, the batch divides the mesh where the prompts do not."""
    config, params = random_model(0, lj.presets.TINY.replace(num_hidden_layers=1))
    tokens, lengths = random_prompts(0, config, [6, 3, 9][:count])
    arguments = (tokens, lengths, KEY, RANDOM)
    settings = {"max_new_tokens": 4, "num_return_sequences": 8 if count == 1 else 1}
    expected = lj.generate(config, params, *arguments, **settings)
    mesh = sharding.make_mesh(spec)
    with jax.set_mesh(mesh):
        params = lj.unstack(lj.shard_params(params, mesh, config))
        out = lj.generate(config, params, *arguments, **settings)
        streamed = np.stack([t for t, _ in lj.stream(config, params, *arguments, **settings)], axis=1)
        with pytest.raises(ConfigError, match=f"batch of {count} rows does not divide over mesh axes"):
            lj.forward(config, params, tokens)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_array_equal(streamed, expected.tokens)


def test_works_with_64_bit_types_enabled():
    config, params = MODEL
    tokens, lengths = random_prompts(0, config, [6, 3])
    expected = lj.generate(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=4)
    with jax.enable_x64(True):
        out = lj.generate(config, params, tokens, lengths, KEY, RANDOM, max_new_tokens=4)
        assert lj.next_token_loss(config, params, tokens % 9).total.dtype == jnp.float32
        again = lj.init(config, KEY)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    jax.tree.map(np.testing.assert_array_equal, again, lj.init(config, KEY))
