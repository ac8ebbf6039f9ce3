"""What to say of an unknown keyword argument: the closest one, or what another library's is called here."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from llama_jax.decoding.sampling import Sampling
from llama_jax.errors import InputError

_SEEDS = ("seed", "key", "rng", "rng_key", "prng_key", "random_seed", "generator")
# Names in Hugging Face transformers, vLLM, llama.cpp, MLX and OpenAI's API.
_OTHER_NAMES = {
    "max_new_tokens": ("max_tokens", "max_length", "max_gen_len", "n_predict", "max_completion_tokens"),
    "num_return_sequences": ("n", "num_samples", "num_sequences", "best_of"),
    "stop_strings": ("stop", "stop_sequences", "stop_words", "stop_string"),
    "eos_id": ("eos_token_id", "eos", "eos_ids", "end_id", "end_ids", "stop_token_ids"),
    "num_beams": ("beams", "beam_size", "beam_width"),
    "temperature": ("temp", "do_sample"),
    "repetition_penalty": ("repeat_penalty",),
    "num_draft_tokens": ("num_assistant_tokens", "num_speculative_tokens"),
    "draft": ("assistant_model", "draft_model", "prompt_lookup"),
    "tokens": ("input_ids", "ids", "prompt", "prompt_ids"),
    "lengths": ("attention_mask", "length", "prompt_lengths"),
    "sampling": ("sampling_params", "generation_config", "settings"),
    "top_logprobs": ("logprobs",),
    "json_schema": ("schema", "response_format", "guided_json", "response_schema"),
    "regex": ("guided_regex", "pattern"),
    "choices": ("guided_choice", "choice"),
    "suppress_tokens": ("bad_words_ids", "suppressed_tokens"),
}

P = ParamSpec("P")
R = TypeVar("R")


def keyword_hint(name: str, known: Sequence[str]) -> str:
    """What to use in place of the unknown argument `name`, in a sentence without its end.

    Args:
      name: the argument that was given.
      known: the arguments that there are.
    """
    if name in _SEEDS and "key" in known:
        return "give key=jax.random.key(seed)"
    if name in _SEEDS and "seed" in known:
        return "give seed=N, a whole number"
    for here, names in _OTHER_NAMES.items():
        if name in names and here in known:
            return f"did you mean {here}?"
    if "sampling" in known:
        settings = list(Sampling.__dataclass_fields__)
        usual = next((here for here, names in _OTHER_NAMES.items() if name in names), name)
        if setting := difflib.get_close_matches(usual, settings, n=1, cutoff=0.8):
            return f"give sampling=Sampling({setting[0]}=...)"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def explain_unknown_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function so that an unknown keyword argument is an `InputError` with a hint."""
    known = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise InputError(f"{function.__name__} has no argument {name!r}; {keyword_hint(name, known)}")
        return function(*args, **kwargs)

    return checked
