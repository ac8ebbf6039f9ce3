"""Chat templates, and conversations as token ids.

A chat template is an untrusted Jinja program that comes with a model. It is rendered in jinja2's sandbox, in
a separate process with limits on time and memory (process.py, worker.py).
"""

from llama_jax.chat.encode import Messages, encode_chat, render_chat, validate_messages
from llama_jax.chat.templates import BUILT_IN_TEMPLATES, ChatTemplate, chat_template
from llama_jax.chat.turns import encode_turns

__all__ = [
    "BUILT_IN_TEMPLATES",
    "ChatTemplate",
    "Messages",
    "chat_template",
    "encode_chat",
    "encode_turns",
    "render_chat",
    "validate_messages",
]
