"""Chat templates, and conversations as token ids.

A chat template is an untrusted Jinja program that comes with a model. It is rendered in jinja2's sandbox, in
a separate process with limits on time and memory (process.py, worker.py).
"""

from llama_jax.chat.encode import encode_chat, render_chat
from llama_jax.chat.messages import Messages, content_text, validate_messages, validate_variables
from llama_jax.chat.templates import BUILT_IN_TEMPLATES, ChatTemplate, chat_template
from llama_jax.chat.turns import PromptDiffersError, TurnsDifferError, encode_each_turn, encode_turns

__all__ = [
    "BUILT_IN_TEMPLATES",
    "ChatTemplate",
    "Messages",
    "PromptDiffersError",
    "TurnsDifferError",
    "chat_template",
    "content_text",
    "encode_chat",
    "encode_each_turn",
    "encode_turns",
    "render_chat",
    "validate_messages",
    "validate_variables",
]
