"""The built-in chat templates of Llama's kin, against the formats of their authors' code."""

from __future__ import annotations

import functools

import pytest

from llama_jax.chat import BUILT_IN_TEMPLATES, ChatTemplate, chat_template, encode_chat, render_chat
from llama_jax.errors import InputError
from llama_jax.tokenizer import load_tokenizer
from tests.messages import assistant, system, user


def test_llama3_is_metas_chat_format():
    """meta-llama/llama3, llama/tokenizer.py, ChatFormat: header, two newlines, stripped text, end of turn."""
    template = ChatTemplate(BUILT_IN_TEMPLATES["llama-3"], "llama-3", {"bos_token": "<|begin_of_text|>"})
    dialog = [system("Be brief."), user(" Hi\n"), assistant("Yo"), user("Bye")]
    text = "<|begin_of_text|>"
    for message in dialog:
        text += (
            f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{message['content'].strip()}<|eot_id|>"
        )
    assert render_chat(template, dialog, False) == text
    assert render_chat(template, dialog) == f"{text}<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_mistral_is_that_of_mistral_common(shared_data):
    """InstructTokenizerV1: one BOS; every message is encoded by itself, answers end in EOS."""
    llama2 = load_tokenizer(shared_data / "llama2" / "tokenizer.model")
    encode = functools.partial(llama2.encode, add_bos=False)
    dialog = [system("S"), user("Hi"), assistant("Hello there"), user("Bye")]
    ids = [1, *encode("[INST] S\n\nHi [/INST]"), *encode("Hello there"), 2, *encode("[INST] Bye [/INST]")]
    assert encode_chat(llama2, chat_template(llama2, "mistral"), dialog) == ids
    with pytest.raises(InputError, match="chat template mistral refuses these messages"):
        encode_chat(llama2, chat_template(llama2, "mistral"), [user("a"), user("b")])
