"""Conversations: cached answers equal a full prefill, and the state survives interruptions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.chat import ChatTemplate, encode_chat
from llama_jax.decoding import session
from llama_jax.errors import InputError, TokenizerError
from llama_jax.text.conversation import Conversation
from llama_jax.tokenizer import load_tokenizer
from tests import random_models
from tests.chat.test_tools import RESULT, TOOLS
from tests.messages import user
from tests.tokenizer import vocabularies

QUESTIONS = ["the quick brown fox", "hello world, the cat", "  is   there a forêt?\n"]
NEW = 12


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    paths = vocabularies.write_all(tmp_path_factory.mktemp("vocabularies"))
    return {kind: load_tokenizer(paths[kind]) for kind in ("sentencepiece", "json-bpe")}


def build(tokenizer):
    config = random_models.random_config(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 256, "num_hidden_layers": 1}
    config = dataclasses.replace(config, **sizes)
    config, params = random_models.random_model(0, config)
    return lj.Model(config, lj.unstack(params), tokenizer, Path("random"))


@pytest.fixture(scope="module")
def model(tokenizers):
    return build(tokenizers["json-bpe"])


@pytest.fixture
def chat(model):
    return Conversation(model, template="chatml")


def reply(conversation, text, **settings):
    return "".join(conversation.say(text, **{"max_new_tokens": NEW, **settings}))


@functools.partial(jax.jit, static_argnames="config")
def argmax_token(config, params, tokens, position):
    return lj.forward(config, params, tokens)[0, position].argmax()


def uncached_ids(conversation, messages, new):
    """The conversation's token ids and their greedy continuation, without a cache."""
    model = conversation.model
    prompt = encode_chat(model.tokenizer, conversation.template, messages)
    tokens, ids = np.zeros((1, 256), np.int32), list(prompt)
    for _ in range(new):
        tokens[0, : len(ids)] = ids
        ids.append(int(argmax_token(model.config, model.params, tokens, len(ids) - 1)))
        if ids[-1] in model.tokenizer.eos_ids:
            break
    return prompt, ids[len(prompt) :]


# Laws


@pytest.mark.parametrize(("kind", "turns"), [("sentencepiece", 2), ("json-bpe", 3)])
def test_answers_equal_a_full_prefill_and_only_new_tokens_are_run(tokenizers, kind, turns):
    conversation = Conversation(build(tokenizers[kind]), "la forêt", "chatml")
    cached = []
    for question in QUESTIONS[:turns]:
        answer = reply(conversation, question)
        *before, last = conversation.messages
        assert last == {"role": "assistant", "content": answer}
        ids, new = uncached_ids(conversation, before, NEW)
        assert answer == conversation.model.tokenizer.decode(new)
        assert conversation.prompt_tokens == len(ids)
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(cached, ids[:-1], strict=False))
        assert conversation.session.reused == len(list(shared))
        cached = [*ids, *new[:-1]]
    assert conversation.session.reused > 50


def test_tools_and_their_results(model):
    variables = {"tools": [{"name": "weather"}], "enable_thinking": False}
    conversation = Conversation(model, template=TOOLS, **variables)
    for said, message in (("In Rome?", user("In Rome?")), (RESULT, RESULT)):
        conversation.say(said)  # encoded at once, answered when it is read
        ids = encode_chat(model.tokenizer, TOOLS, [message], **variables)
        assert conversation.prompt_tokens == len(ids)


def test_the_seed_determines_the_samples(chat):
    first = reply(chat, "hello", temperature=1.0, seed=1)
    chat.undo()
    assert reply(chat, "hello", temperature=1.0, seed=1) == first
    chat.undo()
    assert reply(chat, "hello", temperature=1.0, seed=2) != first


# How an answer ends


def test_max_new_tokens(chat):
    reply(chat, "hello", max_new_tokens=3)
    assert chat.finish_reason == "length"
    assert len(uncached_ids(chat, chat.messages[:-1], 3)[1]) == 3


def test_an_eos_token_ends_the_answer(chat, model, monkeypatch):
    _, new = uncached_ids(chat, [{"role": "user", "content": "hello"}], NEW)
    first = new.index(new[4])
    monkeypatch.setattr(model.tokenizer, "eos_ids", (new[4],))
    reply(chat, "hello")
    assert chat.finish_reason == "stop"
    assert chat.session.tokens[chat.prompt_tokens :] == new[:first]


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(chat):
    whole = reply(chat, "hello")
    chat.undo()
    stop = whole[5:8]
    answer = reply(chat, "hello", stop_strings=["not there", stop])
    assert answer == whole[: whole.index(stop)]
    assert chat.finish_reason == "stop"
    assert chat.messages[-1]["content"] == answer
    following = reply(chat, "the cat")
    assert following == chat.model.tokenizer.decode(uncached_ids(chat, chat.messages[:-1], NEW)[1])


def test_the_answer_is_streamed(chat):
    pieces = list(chat.say("hello", max_new_tokens=NEW))
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == chat.messages[-1]["content"]


# Interruptions


def usable(conversation):
    """Whether the next answer equals that of a full prefill."""
    answer = reply(conversation, "the cat")
    _, new = uncached_ids(conversation, conversation.messages[:-1], NEW)
    return answer == conversation.model.tokenizer.decode(new)


def test_a_closed_answer_keeps_what_was_reply(chat):
    answer = chat.say("hello", max_new_tokens=NEW)
    partial = next(answer) + next(answer)
    answer.close()
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": partial}]
    assert chat.finish_reason is None
    assert len(chat.session.tokens) > chat.prompt_tokens
    assert usable(chat)
    assert chat.session.reused > 0


def test_the_next_message_closes_the_answer_before_it(chat):
    answer = chat.say("hello", max_new_tokens=NEW)
    partial = next(answer)
    assert usable(chat)
    assert chat.messages[1] == {"role": "assistant", "content": partial}
    assert list(answer) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interrupted_step_keeps_what_was_reply(chat, monkeypatch, error):
    steps = session.decode_loop_jit
    left = iter(range(4))

    def interrupted(*args):
        if next(left, None) is None:
            raise error
        return steps(*args)

    with monkeypatch.context() as patch:
        patch.setattr(session, "decode_loop_jit", interrupted)
        answer, pieces = chat.say("hello", max_new_tokens=NEW), []
        with pytest.raises(error):
            pieces.extend(answer)
    assert pieces
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert usable(chat)


def test_a_message_without_an_answer_is_dropped(chat, monkeypatch):
    reply(chat, "hello")
    before = chat.messages

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "_init_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reply(chat, "the cat")
    chat.say("the cat")  # the generator is never consumed
    assert chat.messages == before
    assert usable(chat)


def test_an_empty_answer_is_kept(chat, model, monkeypatch):
    _, new = uncached_ids(chat, [{"role": "user", "content": "hello"}], 1)
    monkeypatch.setattr(model.tokenizer, "eos_ids", (new[0],))
    answer = reply(chat, "hello", stop_strings=model.tokenizer.decode(new))
    assert answer == ""
    assert chat.messages[-1] == {"role": "assistant", "content": ""}


# Undo and reset


def test_undo_and_reset(chat):
    first = reply(chat, "hello")
    messages = chat.messages
    reply(chat, "the cat")
    chat.undo()
    assert chat.messages == messages
    chat.reset()
    assert chat.messages == []
    assert reply(chat, "hello") == first
    assert chat.session.reused == chat.prompt_tokens - 1
    chat.undo()
    with pytest.raises(InputError, match="there is nothing to undo"):
        chat.undo()


def test_the_system_prompt_may_change(chat):
    reply(chat, "hello")
    chat.system = "the dog"
    assert chat.messages[0] == {"role": "system", "content": "the dog"}
    assert usable(chat)
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "the dog"}]


# The end of the context


def test_an_answer_ends_at_the_end_of_the_context(chat):
    reply(chat, "the " * 50, max_new_tokens=10_000)
    assert chat.finish_reason == "length"
    assert len(chat.session.tokens) == 255  # the last sampled token is not in the cache


def test_a_turn_that_does_not_fit_changes_nothing(chat):
    reply(chat, "hello")
    messages, cached = chat.messages, chat.session.tokens
    with pytest.raises(InputError, match=r"with this turn the conversation has .* context of 256"):
        chat.say("the " * 200)
    assert chat.messages == messages
    assert chat.session.tokens == cached
    assert usable(chat)


# Bad input


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a\ud800", {}, r"messages\[0\]: content has a lone surrogate"),
        (b"a", {}, r"messages\[0\]: content is of type bytes"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number, at least 1"),
        ("a", {"temperature": -1.0}, "temperature is -1.0; it must be"),
        ("a", {"top_p": 2.0}, "top_p is 2.0; it must be"),
        ("a", {"seed": "x"}, "seed is x; it must be"),
        ("a", {"stop_strings": [""]}, r"stop_strings\[0\] is empty"),
    ],
)
def test_bad_input_is_rejected_at_the_call(chat, text, settings, message):
    with pytest.raises(InputError, match=message):
        chat.say(text, **settings)
    assert chat.messages == []


def test_nul_is_ordinary_text(chat):
    reply(chat, "a\0b")
    assert usable(chat)


def test_a_template_error_changes_nothing(model):
    source = "{% if messages | length > 1 %}{{ raise_exception('no more') }}{% endif %}a"
    conversation = Conversation(model, template=ChatTemplate(source, "the template", {}))
    reply(conversation, "hello")
    messages = conversation.messages
    with pytest.raises(InputError, match="the template refuses these messages: no more"):
        conversation.say("the cat")
    assert conversation.messages == messages


def test_templates(tokenizers, model, tmp_path):
    with pytest.raises(TokenizerError, match="the model has no chat template; choose one"):
        Conversation(build(tokenizers["sentencepiece"]))
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[-1].content }}")
    assert reply(Conversation(model, template=path), "hello")
