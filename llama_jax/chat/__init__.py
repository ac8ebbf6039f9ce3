"""Chat: templates, and conversations as token ids.

A template is a program in Jinja that came with a model, from anybody: it is rendered in a sandbox, in a
process that is stopped when it takes too much (process.py, worker.py).
"""

from llama_jax.chat.encode import Messages, checked_messages, encode_chat, render_chat
from llama_jax.chat.templates import BUILT_IN, ChatTemplate, chat_template
from llama_jax.chat.turns import encode_turns

__all__ = [
    "BUILT_IN",
    "ChatTemplate",
    "Messages",
    "chat_template",
    "checked_messages",
    "encode_chat",
    "encode_turns",
    "render_chat",
]
