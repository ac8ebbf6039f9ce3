"""A request in a batch that others join and leave gives what `generate` gives alone.

All tests share one model and the sizes of one batcher, so that they share its programs.
"""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import meshes
from llama_jax.errors import InputError, QueueFullError
from llama_jax.serving import programs
from llama_jax.serving.arguments import prepare
from llama_jax.serving.batcher import Batcher
from llama_jax.serving.engine import STEPS
from llama_jax.serving.requests import Handle, Request
from tests.decoding.compiled import counting_compiles
from tests.optimized import optimized
from tests.random_models import SMALL, random_model

CONFIG, PARAMS = random_model(0, SMALL)
WEIGHTS = lj.unstack(PARAMS)
ROWS, LENGTH = 3, 448
RNG = np.random.default_rng(0)
SYSTEM = RNG.integers(0, CONFIG.vocab_size, 70).tolist()
SETTINGS = [
    lj.Sampling(temperature=0.0),
    lj.Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.5),
    lj.Sampling(temperature=1.3, top_k=20, min_new_tokens=3, suppress_tokens=[1, 2], no_repeat_ngram_size=2),
]


def ids(count, seed=None):
    rng = RNG if seed is None else np.random.default_rng(seed)
    return rng.integers(0, CONFIG.vocab_size, count).tolist()


def request(prompt, count=6, kind=0, seed=0, **options):
    return Request(prompt, count, SETTINGS[kind], key=jax.random.key(seed), **options)


def batcher(**options):
    return Batcher(CONFIG, WEIGHTS, **{"batch_size": ROWS, "max_length": LENGTH, **options})


def check_alone(request, result, config=CONFIG, params=WEIGHTS, atol=3e-5, **options):
    """A result's tokens, log-probabilities and alternatives are those of `generate`."""
    out = lj.generate(
        config,
        params,
        np.array([request.tokens]),
        np.array([len(request.tokens)]),
        request.key,
        request.sampling,
        max_new_tokens=request.max_new_tokens,
        eos_id=request.eos_id,
        num_return_sequences=4 if request.index else 1,
        top_logprobs=4,
        **options,
    )
    row, count = request.index, len(result.tokens)
    assert int(out.lengths[row]) == count
    assert result.tokens == np.asarray(out.tokens[row, :count]).tolist()
    np.testing.assert_allclose(result.logprobs, out.logprobs[row, :count], atol=atol)
    if wanted := request.top_logprobs:
        top = np.array(result.top)  # [T, n, 2]
        assert top[..., 0].tolist() == np.asarray(out.top_tokens[row, :count, :wanted]).tolist()
        np.testing.assert_allclose(top[..., 1], out.top_logprobs[row, :count, :wanted], atol=atol)


def random_requests(count, seed):
    """Prompts of 1 to 350 tokens, half of them behind a system prompt, with any settings."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        prompt = [*(SYSTEM if number % 2 else []), *ids(int(rng.integers(1, 280)), seed + number)]
        eos = int(rng.integers(CONFIG.vocab_size)) if number % 3 else None
        yield request(
            prompt,
            int(rng.integers(1, 40)),
            number % 3,
            number,
            eos_id=eos,
            top_logprobs=3 * (number % 4 == 1),
        )


def test_nothing_compiles_after_warm_up():
    """The first test of the file: the others find these programs compiled."""
    batch = batcher()
    seen = []
    batch.warm_up(lambda done, number: seen.append((done, number)))
    assert seen == [(n, 7) for n in range(1, 8)]  # steps of one row or of all
    requests = list(random_requests(10, 200))
    with counting_compiles() as compiled:
        batch.run(requests)
    assert not compiled


def test_rows_that_join_and_leave_at_random_equal_generate():
    """Submitted between steps at random; some are cancelled, at random too."""
    rng, batch = np.random.default_rng(7), batcher()
    handles, waiting = [], list(random_requests(24, 100))
    while waiting or batch.step():
        if waiting and rng.random() < 0.3:
            handles.append(batch.submit(waiting.pop()))
        if handles and rng.random() < 0.04:
            handles[rng.integers(len(handles))].cancel()
        if waiting:
            batch.step()
    results = [handle.result(timeout=0) for handle in handles]
    whole = [r for r in results if r.finish_reason != "cancelled"]
    assert len(whole) > 12 and {"stop", "length"} <= {r.finish_reason for r in whole}
    assert sum(r.shared_tokens > 0 for r in whole) > 3
    for handle, result in zip(handles, results, strict=True):
        if result.finish_reason != "cancelled":
            check_alone(handle.request, result)
    assert (batch.running, batch.waiting) == (0, 0)


def test_company_changes_no_bit():
    """Where that is asked for: log-probabilities are bitwise those of the row alone."""
    requests = [request([*SYSTEM, *ids(n, n)], 9, n % 3, n) for n in (5, 40, 290, 33, 150)]
    together = batcher(invariant=True).run(requests)
    for each, result in zip(requests, together, strict=True):
        (alone,) = batcher(invariant=True).run([each])
        assert result.shared_tokens == 0
        assert (alone.tokens, alone.logprobs) == (result.tokens, result.logprobs)


def test_a_shared_prefix_is_copied_and_changes_nothing():
    batch = batcher()
    first = request([*SYSTEM, *ids(20, 1)], 40)
    (result,) = batch.run([first])
    assert result.shared_tokens == 0
    # A chat's next turn begins with the last one and its answer, of which the last token was not run.
    turn = request([*first.tokens, *result.tokens, *ids(9, 2)], kind=1)
    again = request(first.tokens, 12, kind=2, seed=3)
    unlike = request([*SYSTEM[:31], *ids(40, 4)])
    for each, shared in ((turn, 128), (again, 64), (unlike, 0)):
        (result,) = batch.run([each])
        check_alone(each, result)
        assert result.shared_tokens == shared
    # Of a row that is still running.
    running = batch.submit(request([*ids(100, 5), *SYSTEM], 60))
    batch.step()
    joined = batch.submit(request([*running.request.tokens[:97], *ids(5, 6)]))
    while batch.step():
        pass
    assert joined.result().shared_tokens == 96
    for handle in (running, joined):
        check_alone(handle.request, handle.result())


def test_continuations_of_one_prompt_equal_those_of_generate():
    requests = [request(ids(50, 8), 8, 1, index=index) for index in range(4)]
    results = batcher().run(requests)
    for each, result in zip(requests, results, strict=True):
        check_alone(each, result)
    assert [result.shared_tokens for result in results] == [0, 32, 32, 32]
    assert len({tuple(result.tokens) for result in results}) > 1


def test_rings_and_eight_bits():
    """A sliding window, whose rings cannot be resumed from everywhere, and a quantized cache."""
    config = CONFIG.replace(sliding_window=40)
    batch = Batcher(config, WEIGHTS, batch_size=2, max_length=LENGTH, cache_dtype="int8")
    base = ids(330, 9)
    turns = [base, [*base[:300], 1, 2], base[:64] + ids(220, 10), [*base, *ids(30, 11)]]
    for prompt, shared in zip(turns, (0, 288, 0, 288), strict=True):
        each = request(prompt, 8, 1)
        (result,) = batch.run([each])
        check_alone(each, result, config, cache_dtype="int8", atol=2e-2)
        assert result.shared_tokens == shared


def test_no_program_copies_the_cache():
    """Each writes into the cache that it is given, which is donated."""
    batch = batcher()
    engine, zero, row = batch._engine, np.int32(0), np.zeros((1, 32), np.int32)
    state, cache = engine._on_device()
    settings = prepare(request([0]), CONFIG, engine.sizes).settings
    tokens = np.zeros(LENGTH, np.int32)
    lowered = [
        (1, programs.prefill_chunk.lower(CONFIG, WEIGHTS, cache, row, zero, zero)),
        (1, programs.copy_prefix.lower(cache, state.cache, zero, zero)),
        (ROWS, programs.join.lower(state, cache, zero, tokens, zero, *settings, zero - 1)),
        (ROWS, programs.move.lower(state, zero, zero)),
    ]
    for rows in (1, ROWS):
        stopped, static = np.ones(rows, bool), {"rows": rows, "most_steps": STEPS, "num_top": 20}
        steps = engine._decode.lower(CONFIG, WEIGHTS, state, stopped, zero, np.asarray(False), **static)
        lowered.append((ROWS, steps))
    for rows, program in lowered:
        text = optimized(program).as_text()
        shape = rf"f32\[{rows},{CONFIG.num_key_value_heads},{LENGTH},{CONFIG.head_dim}\]"
        assert re.search(rf"{shape}\S* parameter", text)
        assert not re.search(rf"= {shape}\S* (copy|transpose|convert|slice)\(", text)
        assert len(re.findall("may-alias|must-alias", text)) >= 2 * CONFIG.num_hidden_layers


def test_requests_move_to_the_first_rows_and_texts_are_kept_in_others():
    """One that is left alone is run alone; a prefix survives requests that take turns in the first row."""
    batch = batcher()
    handles = [batch.submit(request(ids(40, n), 6 + 20 * (n == 2), 1, n)) for n in range(3)]
    while batch.step():
        pass
    assert [handle is None for handle in batch._engine.rows] == [True] * ROWS
    for handle in handles:
        check_alone(handle.request, handle.result(timeout=0))
    turns = [ids(90, 50), ids(90, 51)]
    for _ in range(3):
        for number, text in enumerate(turns):
            each = request(text, 6)
            (result,) = batch.run([each])
            check_alone(each, result)
            turns[number] = [*text, *result.tokens, *ids(5)]
    assert result.shared_tokens == 96


# Leaving


def test_a_cancelled_request_frees_its_row_and_disturbs_nobody():
    batch = batcher()
    running = [batch.submit(request(ids(30, n), 30, 1, n)) for n in range(ROWS)]
    queued = [batch.submit(request(ids(30, n), 5, 1, n)) for n in (10, 11)]
    while not all(handle.generated for handle in running):
        batch.step()
    running[1].cancel()
    queued[0].cancel()
    batch.step()
    assert (
        running[1].result(timeout=0).finish_reason == queued[0].result(timeout=0).finish_reason == "cancelled"
    )
    assert 0 < running[1].generated < 30 and queued[0].generated == 0
    while batch.step():
        pass
    for handle in (running[0], running[2], queued[1]):
        check_alone(handle.request, handle.result(timeout=0))


def test_time_runs_out_in_the_queue_and_in_a_row():
    batch = batcher(batch_size=ROWS)
    late = [batch.submit(request(ids(5), 300, timeout=0.05)) for _ in range(ROWS + 1)]
    batch.step()
    time.sleep(0.06)
    batch.step()
    assert [handle.result(timeout=0).finish_reason for handle in late] == ["timeout"] * (ROWS + 1)
    assert late[0].generated > 0 and late[-1].generated == 0 and batch.running == 0


def test_follow_ends_a_request_at_its_token():
    whole = batcher().run([request(ids(12, 3), 20)])[0].tokens
    seen = []

    def follow(token):
        seen.append(token.id)
        return len(seen) == 7

    def fail(token):
        raise RuntimeError("of this request")

    requests = [request(ids(12, 3), 20, follow=follow), request(ids(12, 3), 20)]
    batch = batcher()
    broken = batch.submit(request(ids(9), 20, follow=fail))
    ended, other = batch.run(requests)
    assert (ended.tokens, ended.finish_reason) == (whole[:7], "stop") and seen == whole[:7]
    assert other.tokens == whole
    with pytest.raises(RuntimeError, match="of this request"):
        broken.result(timeout=0)


def test_a_step_that_fails_ends_the_rows_and_not_the_queue(monkeypatch):
    batch = batcher()
    running = [batch.submit(request(ids(5, n), 9)) for n in range(ROWS)]
    queued = batch.submit(request(ids(5, 9), 9))
    batch.step()

    def fail(*_, **__):
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(batch._engine, "_decode", fail)
        assert batch.step()
    for handle in running:
        with pytest.raises(RuntimeError, match="the device is lost"):
            handle.result(timeout=0)
    while batch.step():
        pass
    check_alone(queued.request, queued.result(timeout=0))


def test_weights_that_are_not_finite_end_a_request_with_an_error():
    weights = {**WEIGHTS, "final_norm": {"scale": WEIGHTS["final_norm"]["scale"].at[0].set(np.nan)}}
    batch = Batcher(CONFIG, weights, batch_size=ROWS, max_length=LENGTH)
    with pytest.raises(InputError, match="the logits are not finite"):
        batch.run([request(ids(5))])
    assert batch.running == 0


def test_two_hundred_requests_leave_nothing_behind():
    with batcher(max_queue=200) as batch:
        batch.run(random_requests(6, 300))
        gc.collect()
        arrays, threads = len(jax.live_arrays()), threading.active_count()
        handles = [batch.submit(request(ids(20, n), 3, n % 3, n)) for n in range(200)]
        for number, handle in enumerate(handles):
            if number % 5 == 0:
                handle.cancel()
        reasons = {handle.result().finish_reason for handle in handles}
        assert reasons <= {"length", "cancelled"} and (batch.running, batch.waiting) == (0, 0)
        del handles, handle
        gc.collect()
        assert not [x for x in gc.get_objects() if isinstance(x, Handle)]
        assert threading.active_count() == threads and len(jax.live_arrays()) <= arrays
    assert "batcher" not in {thread.name for thread in threading.enumerate()}


# Threads and queues


def test_a_thread_serves_readers_of_every_kind():
    """Readers in threads and in an event loop, and one that never reads."""
    requests = list(random_requests(8, 400))
    found = {}
    with batcher() as batch:
        unread = batch.submit(request(ids(20, 1), 50))
        handles = [batch.submit(each) for each in requests]

        def read(number):
            found[number] = [token.id for token in handles[number]]

        async def read_async(number):
            found[number] = [token.id async for token in handles[number]]

        async def all_async():
            await asyncio.gather(*map(read_async, range(4, 8)))

        threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        asyncio.run(all_async())
        for thread in threads:
            thread.join()
        assert unread.result(timeout=60).finish_reason == "length"
        (result,) = batch.run([requests[0]])
    for number, handle in enumerate(handles):
        assert found[number] == handle.result(timeout=0).tokens
        check_alone(handle.request, handle.result(timeout=0))
    assert result.tokens == found[0]


def test_a_full_queue_refuses_all_or_nothing():
    batch = batcher(max_queue=2)
    handles = batch.submit_all([request(ids(3)) for _ in range(ROWS + 1)])
    with pytest.raises(QueueFullError, match="4 requests are waiting, and the queue holds 2") as caught:
        batch.submit_all([request(ids(3)), request(ids(3))])
    assert 1 <= caught.value.retry_after <= 60 and batch.waiting == ROWS + 1
    handles.append(batch.submit(request(ids(3))))
    with pytest.raises(QueueFullError):
        batch.submit(request(ids(3)))
    while batch.step():
        pass
    assert all(handle.done for handle in handles)


def test_closing_cancels_everything_and_start_begins_anew():
    batch = batcher()
    with batch:
        handles = [batch.submit(request(ids(5, n), 400)) for n in range(5)]
    assert {handle.result(timeout=0).finish_reason for handle in handles} == {"cancelled"}
    with pytest.raises(QueueFullError, match="closed"):
        batch.submit(request(ids(5)))
    with batch:
        check_alone(each := request(ids(5, 2)), batch.submit(each).result(timeout=60))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "the prompt is empty"),
        ({"tokens": [0, 72]}, "token id 72 at position 1 is outside the vocabulary of 72"),
        ({"tokens": [0.5]}, "ids are float64"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 446}, "need 449 positions; there are 448"),
        ({"sampling": lj.Sampling(temperature=-1)}, "temperature is -1"),
        ({"sampling": lj.Sampling(suppress_tokens=list(range(65)))}, "suppress_tokens holds 65 ids"),
        ({"top_logprobs": 21}, "top_logprobs is 21; this batcher returns up to 20"),
        ({"eos_id": list(range(17))}, "eos_id holds 17 ids"),
        ({"eos_id": "end"}, "eos_id is 'end'"),
        ({"key": 3}, "key is 3; give one key"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "give one key"),
    ],
)
def test_a_request_that_cannot_work(changes, message):
    batch = batcher()
    with pytest.raises(InputError, match=message):
        batch.submit(Request(**{"tokens": [1, 2, 3], "max_new_tokens": 4, **changes}))
    assert batch.waiting == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 513}, "max_length is 513; the model's context has 512"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"cache_dtype": "int3"}, "cache_dtype is 'int3'"),
    ],
)
def test_a_batcher_that_cannot_work(options, message):
    with pytest.raises(InputError, match=message):
        batcher(**options)


def test_a_mesh_is_refused():
    mesh = meshes.make_mesh("tensor=2", devices=jax.devices()[:2])
    with pytest.raises(InputError, match="on a mesh of 2 devices, and a batcher runs on one"):
        Batcher(CONFIG, lj.shard_params(jax.device_get(WEIGHTS), mesh, CONFIG))
