"""The endpoints, by OpenAI's own client: texts are those of `Model.generate`, errors have OpenAI's form."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
import time

import httpx
import openai
import pytest

import llama_jax as lj
from tests.messages import user
from tests.serving import http

NEW = 12
PROMPT = "ab c"
GREEDY = {"model": http.NAME, "temperature": 0.0}


def post(running, path, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json", **headers}
    return httpx.post(f"{running.url}{path}", content=content, headers=headers, timeout=60)


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(prompt=prompt, **{**GREEDY, "max_tokens": NEW, **options})


def chat(client, text="hello", **options):
    return client.chat.completions.create(messages=[user(text)], **{**GREEDY, "max_tokens": NEW, **options})


# Texts


def test_completions_are_those_of_generate(running, client):
    out = complete(client)
    assert out.choices[0].text == running.model.generate(PROMPT, max_new_tokens=NEW)
    assert out.object == "text_completion" and out.model == http.NAME
    assert out.choices[0].finish_reason == "length" and out.usage.completion_tokens == NEW
    assert out.usage.prompt_tokens == len(running.model.encode_prompt(PROMPT))
    assert out.usage.total_tokens == NEW + out.usage.prompt_tokens


def test_a_list_of_prompts_gives_a_choice_each_and_echo_the_prompt_too(running, client):
    prompts = ["a", "b c", "c"]
    out = complete(client, prompts, echo=True)
    texts = running.model.generate(prompts, max_new_tokens=NEW)
    assert [c.text for c in out.choices] == [a + b for a, b in zip(prompts, texts, strict=True)]
    rows = [running.model.encode_prompt(text) for text in prompts]
    assert [c.text for c in complete(client, rows).choices] == texts
    assert complete(client, rows[1]).choices[0].text == texts[1]


def test_a_seed_gives_the_same_samples_and_n_gives_several(running, client):
    options = {"temperature": 1.0, "seed": 3, "n": 3, "top_p": 0.9}
    texts = [choice.text for choice in complete(client, **options).choices]
    assert texts == [choice.text for choice in complete(client, **options).choices]
    assert texts == running.model.generate(
        PROMPT, max_new_tokens=NEW, temperature=1.0, seed=3, top_p=0.9, num_return_sequences=3
    )
    assert len(set(texts)) > 1 and texts != [
        c.text for c in complete(client, **options | {"seed": 4}).choices
    ]
    assert (
        complete(client, temperature=1.0).choices[0].text != complete(client, temperature=1.0).choices[0].text
    )


def test_settings_that_openai_does_not_have(running, client):
    extra = {"repetition_penalty": 1.3, "top_k": 5, "min_p": 0.01}
    out = complete(client, temperature=0.9, seed=1, extra_body=extra)
    assert out.choices[0].text == running.model.generate(
        PROMPT, max_new_tokens=NEW, temperature=0.9, seed=1, **extra
    )


def test_a_ban_by_logit_bias(running, client):
    first = running.model.tokenizer.encode(PROMPT)
    free = complete(client, first, logprobs=0, max_tokens=1)
    ids = next(iter(running.service.batcher.run([lj.Request(first, 1, lj.Sampling(temperature=0.0))]))).tokens
    banned = complete(client, first, max_tokens=1, logit_bias={str(ids[0]): -100})
    assert banned.choices[0].text != free.choices[0].text


def test_a_stop_string_ends_the_text_before_it(running, client):
    whole = running.model.generate(PROMPT, max_new_tokens=NEW)
    stop = whole[4:6]
    for streamed in (False, True):
        out = complete(client, stop=[stop, "never"], stream=streamed)
        chunks = list(out) if streamed else [out]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert text == whole[: whole.find(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_of_completions(running, client):
    out = complete(client, logprobs=2).choices[0]
    ids = running.model.encode_prompt(PROMPT)
    (expected,) = running.service.batcher.run(
        [lj.Request(ids, NEW, lj.Sampling(temperature=0.0), top_logprobs=2)]
    )
    found = out.logprobs
    assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert len(found.tokens) == len(found.text_offset) == NEW == len(found.top_logprobs)
    for top, likely, token in zip(found.top_logprobs, expected.top, found.tokens, strict=True):
        assert max(top.values()) == pytest.approx(likely[0][1], abs=1e-5) and token in top
    chunks = list(complete(client, logprobs=2, stream=True))
    assert [x for c in chunks if c.choices[0].logprobs for x in c.choices[0].logprobs.tokens] == found.tokens


def test_chats_are_those_of_a_conversation(running, client):
    talk = lj.Conversation(running.model, template="chatml")
    expected = "".join(talk.say("hello", max_new_tokens=NEW))
    out = chat(client)
    assert (out.choices[0].message.content, out.choices[0].message.role) == (expected, "assistant")
    assert out.usage.prompt_tokens == talk.prompt_tokens and out.object == "chat.completion"
    assert chat(client).usage.prompt_tokens_details.cached_tokens == talk.prompt_tokens // 32 * 32


def test_chunks_of_a_chat(running, client):
    expected = chat(client, n=2).choices
    stream = chat(client, n=2, stream=True, stream_options={"include_usage": True}, max_tokens=NEW)
    texts, reasons, last = ["", ""], [None, None], None
    for last in stream:
        for choice in last.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in expected]
    assert reasons == [choice.finish_reason for choice in expected]
    assert last.choices == [] and last.usage.completion_tokens == 2 * NEW


def test_logprobs_of_chats(running, client):
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks = list(chat(client, logprobs=True, top_logprobs=2, stream=True))
    parts = [x for c in chunks if c.choices[0].logprobs for x in c.choices[0].logprobs.content]
    assert [(x.token, x.logprob) for x in parts] == [(x.token, x.logprob) for x in whole]
    assert len(whole) == NEW and all(len(x.top_logprobs) == 2 for x in whole)
    data = bytes(byte for x in whole for byte in x.bytes)
    assert data.decode(errors="replace") == chat(client).choices[0].message.content.replace("", "")


def test_the_events_of_a_stream(running):
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"


def test_sixteen_streams_at_once_are_each_what_they_are_alone(running):
    """More than there are rows, by the asynchronous client."""
    expected = running.model.generate([f"{chr(97 + n)} b" for n in range(16)], max_new_tokens=NEW)

    async def one(client, number):
        prompt = f"{chr(97 + number)} b"
        stream = await client.completions.create(prompt=prompt, max_tokens=NEW, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, number) for number in range(16)))

    assert asyncio.run(all_at_once()) == expected


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 3}, "temperature is 3; it must be a number from 0 to 2"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number"),
        ({"n": 17}, "n is 17; it must be a whole number from 1 to 16"),
        ({"stream": "yes"}, "stream is 'yes'; it must be true or false"),
        ({"stop": [""]}, "stop is "),
        ({"stop": ["x"] * 17}, "up to 16"),
        ({"temprature": 1}, "unknown argument 'temprature'; did you mean temperature?"),
        ({"logit_bias": {"5": 10}}, "no other bias is supported"),
        ({"best_of": 4}, "best_of"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs"),
        ({"response_format": {"type": "x"}}, "response_format of type 'x' is unknown"),
        ({"stream_options": 3}, "stream_options is not an object"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": [1, "a"]}, "prompt is [1, 'a']"),
        ({"prompt": [10**6]}, "token id 1000000 is outside the vocabulary, of 288 ids"),
        ({"prompt": "a" * 400}, "this server takes up to 351; shorten it"),
        ({"max_tokens": 350}, "more than the 352 that this server has room for"),
        ({"min_p": float("nan")}, "min_p is nan"),
    ],
)
def test_a_field_that_cannot_be(running, changes, message):
    response = post(running, "/v1/completions", {**GREEDY, "prompt": PROMPT, "max_tokens": 4, **changes})
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert message in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages is []"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": 2}, "logprobs is 2; it must be true or false"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"prompt": "x"}, "unknown argument 'prompt'"),
    ],
)
def test_a_chat_that_cannot_be(running, changes, message):
    body = {**GREEDY, "messages": [user("a")], "max_tokens": 4, **changes}
    response = post(running, "/v1/chat/completions", body)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'"x"'])
def test_a_body_that_is_no_json_object(running, body):
    response = post(running, "/v1/completions", body)
    assert response.status_code == 400 and "the body is not" in response.json()["error"]["message"]


def test_statuses_of_other_errors(running, client):
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist; this server has 'tiny'"):
        complete(client, model="gpt")
    with pytest.raises(openai.BadRequestError, match="temperature is 9"):
        chat(client, temperature=9)
    assert post(running, "/v1/completions", b"x" * (5 << 20)).status_code == 413
    assert post(running, "/v1/completions", {}, **{"Content-Type": "text/plain"}).status_code == 415
    assert post(running, "/v1/nothing", {}).json()["error"]["code"] == "not_found"
    assert httpx.get(f"{running.url}/v1/completions").status_code == 405


def test_a_key_is_asked_for_and_limits_hold(running):
    with http.serving(running.model, api_key="secret", new_tokens=20) as guarded:
        base = f"{guarded.url}/v1"
        with openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                complete(client)
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        assert httpx.get(f"{guarded.url}/health").status_code == 200
        with openai.OpenAI(base_url=base, api_key="secret", max_retries=0) as client:
            assert complete(client).choices[0].text == running.model.generate(PROMPT, max_new_tokens=NEW)
            with pytest.raises(openai.BadRequestError, match="this server generates up to 20"):
                complete(client, max_tokens=21)
            # Beside a request that takes its time at every step; only now, as a busy machine is slow too.
            guarded.service.limits = dataclasses.replace(guarded.service.limits, seconds=0.2)
            guarded.batcher.submit(lj.Request([1], 20, follow=lambda _: time.sleep(0.05)))
            with pytest.raises(openai.APIStatusError, match=r"took more than 0.2 s") as caught:
                complete(client)
            assert caught.value.status_code == 408
            with pytest.raises(openai.APIError, match="took more than"):
                list(complete(client, stream=True))
        guarded.service.stopping = True
        assert httpx.get(f"{guarded.url}/health").status_code == 503
        refused = post(guarded, "/v1/completions", {"prompt": "a"}, Authorization="Bearer secret")
        assert refused.status_code == 503 and "stopping" in refused.json()["error"]["message"]


def hold(running):
    """Stops the device's thread, until the event that is returned is set."""
    release, held = threading.Event(), threading.Event()

    def follow(token):
        held.set()
        return release.wait(60)

    running.batcher.submit(lj.Request([1], 2, follow=follow))
    assert held.wait(60)
    return release


# Models, health, metrics


def test_models_health_and_metrics(running, client):
    assert [model.id for model in client.models.list()] == [http.NAME]
    assert client.models.retrieve(http.NAME).id == http.NAME
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok", "model": http.NAME}
    before = metrics(running)
    complete(client, max_tokens=5)
    post(running, "/v1/completions", b"{")
    running.until_idle()
    after = metrics(running)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["llama_jax_new_tokens_total"] == 5 and grown["llama_jax_requests_total"] == 1
    assert grown['llama_jax_http_responses_total{path="/v1/completions",status="400"}'] == 1
    assert grown["llama_jax_time_to_first_token_seconds_count"] == 1
    assert (after["llama_jax_requests_running"], after["llama_jax_batch_size"]) == (0, http.ROWS)


def metrics(running):
    lines = httpx.get(f"{running.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


# Many, slow and lost clients


def connect(running, body):
    """A connection that has sent a request and reads nothing."""
    connection = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])))
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_body_that_does_not_come_is_refused(running, monkeypatch):
    monkeypatch.setattr("llama_jax.serving.app.BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 9\r\n\r\n{")
        answer = b""
        while part := connection.recv(1 << 12):  # until the server closes it
            answer += part
        assert b" 408 " in answer and b"did not come within 0.05 s" in answer


def test_a_lost_client_frees_its_row(running):
    for streamed in (False, True):
        before = running.batcher.totals.new_tokens
        held = hold(running)
        lost = [
            connect(running, {**GREEDY, "prompt": "a", "max_tokens": 300, "stream": streamed})
            for _ in range(3)
        ]
        while running.batcher.waiting < 3:
            pass
        for connection in lost:
            connection.close()
        while not all(handle.cancelled for handle, _ in list(running.batcher._queue)):
            pass
        held.set()
        running.until_idle()
        assert running.batcher.totals.new_tokens - before < 100


def test_five_hundred_connections_leave_nothing_behind(running):
    """Some malformed, some that leave, some that never read; a queue of 32 refuses most of them."""
    threads = threading.active_count()
    statuses: list[int] = []

    async def one(client, number):
        body = {**GREEDY, "prompt": "ab"[number % 2], "max_tokens": 3, "stream": number % 3 == 0}
        kind, url = number % 5, f"{running.url}/v1/completions"
        headers = {"Content-Type": "application/json"}
        if kind == 0:
            response = await client.post(url, content=b"{malformed", headers=headers)
        elif kind == 1:
            async with client.stream("POST", url, json=body | {"max_tokens": 200}) as response:
                if response.status_code == 429:
                    await response.aread()  # else it leaves without reading
        else:
            response = await client.post(url, json=body)
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
        statuses.append(response.status_code)

    async def all_at_once():
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            await asyncio.gather(*(one(client, number) for number in range(500)))

    silent = [connect(running, {**GREEDY, "prompt": "a", "max_tokens": 40, "stream": True}) for _ in range(8)]
    asyncio.run(all_at_once())
    assert set(statuses) == {200, 400, 429} and statuses.count(400) == 100 and len(statuses) == 500
    running.until_idle()  # those that never read are done, too
    for connection in silent:
        connection.close()
    assert complete_text(running) == running.model.generate(PROMPT, max_new_tokens=NEW)
    assert threading.active_count() <= threads + 40  # the thread pool of the event loop keeps some


def complete_text(running):
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": NEW}
    return post(running, "/v1/completions", body).json()["choices"][0]["text"]
