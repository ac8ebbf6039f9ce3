"""Messages and templates, said briefly."""

from __future__ import annotations

from llama_jax.chat import ChatTemplate


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def jinja(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, "the chat template", tokens)
