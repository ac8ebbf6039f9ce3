"""A model for lm-evaluation-harness, in this process: `lm_eval.simple_evaluate(HarnessModel(model), ...)`.

Needs the `eval` extra. The rules (how a context and its continuation are split into tokens, what precedes an
empty context, rolling windows, stop strings) are lm-eval's own; truncation and decoding are those of its `hf`
model, whose scores these are to rounding.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from llama_jax.chat import chat_template, render_chat
from llama_jax.decoding.arguments import check_int, pad_right
from llama_jax.decoding.generation import stream
from llama_jax.errors import InputError, LlamaJaxError
from llama_jax.eval.continuations import ContinuationScorer
from llama_jax.eval.windows import Window, score_windows
from llama_jax.text.model import Model
from llama_jax.text.pretrained import load
from llama_jax.text.stop_strings import StopStrings, split_stop_strings

Report = Callable[[str, int, int], None]  # (what, done, total)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_OPEN_END = "\uf8ff "  # marks the end of a message that is to be continued; no text has the character
_log = logging.getLogger(__name__)


@register_model("llama_jax")
class HarnessModel(TemplateLM):
    """A `Model` as lm-eval calls it; `lm_eval.simple_evaluate(model=HarnessModel(model), tasks=[...])`.

    Importing this module also registers the name `llama_jax`, for `simple_evaluate("llama_jax",
    {"pretrained": "smollm2-135m"}, ...)`.
    """

    def __init__(
        self,
        pretrained: Model | str,
        *,
        dtype: str = "float32",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        report: Report = lambda *_: None,
        **ignored: None,
    ) -> None:
        """Loads the model, if it is not loaded.

        Args:
          pretrained: a model, or what `llama_jax.load` takes.
          dtype: of a model that is loaded here.
          batch_size: contexts, windows or prompts in a forward pass.
          max_length: the most tokens that the model reads; None is its context. Longer requests lose their
            first tokens.
          max_gen_toks: new tokens of a request that does not say how many.
          report: is called after each batch with what it does, and how many requests are done, of how many.
          **ignored: what `simple_evaluate` passes to every model, `device` and `max_batch_size`.

        Raises:
          InputError: for a size that is out of range, or another argument.
        """
        super().__init__()
        for name, value in ignored.items():
            if value is not None:
                raise InputError(f"HarnessModel has no argument {name!r}; leave it out")
        model = load(pretrained, dtype, scan_layers=False) if isinstance(pretrained, str) else pretrained
        size = int(batch_size) if isinstance(batch_size, str) and batch_size.isdecimal() else batch_size
        context = model.config.max_position_embeddings
        self.model = model
        self.batch_size = check_int("batch_size", size)
        self.max_length = context if max_length is None else check_int("max_length", max_length, minimum=2)
        if self.max_length > context:
            raise InputError(f"max_length is {max_length}; the model's context has {context} positions")
        self.max_gen_toks = check_int("max_gen_toks", max_gen_toks)
        self.truncated = 0  # requests that lost their first tokens
        self._report = report
        self._without_system = False
        self._scorer = ContinuationScorer(model, batch_size=self.batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.model.tokenizer.eos_id is None:
            raise InputError(f"the vocabulary of {self.model.path} has no EOS token, which lm-eval needs")
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS where there is none."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps requests under, in its cache."""
        return str(self.model.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; control tokens in it are read as such, as a chat template's must be."""
        return self.model.tokenizer.encode(string, add_bos=add_special_tokens, parse_special=True)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether each is greedy decoding's."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for strings, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, and the model reads {self.max_length}: "
                    f"{str(strings[1])[:40]!r}"
                )
            keep = self.max_length + 1 - len(continuation)  # the last token is not read
            self.truncated += len(context) > keep
            pairs.append((context[-keep:], continuation))
        scores = self._scorer.score(pairs, progress=self._progress("log-likelihoods"))
        answers = [(float(s.logprobs.sum(dtype=np.float64)), bool(s.greedy.all())) for s in scores]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probabilities of whole texts, in windows that do not overlap."""
        windows, counts = [], []
        for request in requests:
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [Window(inputs, targets) for inputs, targets in rolling]
            windows += own
            counts.append(len(own))
        scores = iter(
            score_windows(
                self.model, windows, batch_size=self.batch_size, progress=self._progress("rolling windows")
            )
        )
        totals = [
            float(sum(next(scores).logprobs.sum(dtype=np.float64) for _ in range(count))) for count in counts
        ]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to a stop string, in batches of prompts of like length and the same settings."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        order = sorted(range(len(requests)), key=lambda number: (settings[number], len(prompts[number])))
        progress = self._progress("generation")
        found: dict[int, str] = {}
        while order:
            first = order[0]
            here = [n for n in order[: self.batch_size] if settings[n] == settings[first]]
            order = order[len(here) :]
            texts = self._generate([prompts[n] for n in here], requests[first].args[1])
            for number, text in zip(here, texts, strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
            progress(len(found), len(requests))
        return [found[number] for number in range(len(requests))]

    def _generate(self, rows: list[list[int]], gen_kwargs: dict[str, Any]) -> list[str]:
        """The continuations of prompts with the same settings; decoding ends when all have stopped."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until, new_tokens = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        keep = self.max_length - new_tokens
        if keep < 1:
            raise InputError(
                f"max_gen_toks is {new_tokens}, and the model's context {self.max_length}; generate fewer"
            )
        self.truncated += sum(len(row) > keep for row in rows)
        chosen = {name: kwargs.pop(name) for name in _SAMPLING if name in kwargs}
        if not kwargs.pop("do_sample"):
            chosen = {name: chosen[name] for name in ("repetition_penalty",) if name in chosen}
        if kwargs:
            raise InputError(
                f"generation_kwargs has {', '.join(kwargs)}; known are do_sample, until, max_gen_toks, "
                f"{', '.join(_SAMPLING)}"
            )
        tokenizer, special = self.model.tokenizer, self.model.tokenizer.special_tokens
        # A stop string that holds a control token and more is in no text, which has none of them.
        stops = [s for s in until if s and (s in special or not any(t and t in s for t in special))]
        end_ids, strings = split_stop_strings(tokenizer, stops)
        sampling, key = self.model.sampling(**chosen)
        tokens, lengths = pad_right([row[-keep:] for row in rows])
        decoders, watch = [tokenizer.stream() for _ in rows], [StopStrings(strings) for _ in rows]
        texts = [""] * len(rows)
        with self.model.on_mesh():
            for newest, live in stream(
                self.model.config,
                self.model.params,
                tokens,
                lengths,
                key,
                sampling,
                max_new_tokens=new_tokens,
                eos_id=end_ids,
            ):
                for row in np.flatnonzero(live):
                    piece = decoders[row].push(int(newest[row]))
                    texts[row] += piece
                    watch[row].push(piece)
                ended = [stop.stopped for stop in watch]
                if all(ended):
                    break
        texts = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
        return [postprocess_generated_text(text, strings, None) for text in texts]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text; without a generation prompt the last message is left open."""
        template, history = chat_template(self.model.tokenizer), [*chat_history]
        if not add_generation_prompt:
            history[-1] = {**history[-1], "content": history[-1]["content"] + _OPEN_END}
        try:
            text = render_chat(template, history, add_generation_prompt)
        except LlamaJaxError:
            said = [message for message in history if message["role"] != "system"]
            if len(said) == len(history):
                raise
            if not self._without_system:
                _log.warning("the chat template refuses a system message; it is left out")
            self._without_system = True
            text = render_chat(template, said, add_generation_prompt)
        return text if add_generation_prompt else _up_to_open_end(text)

    def chat_template(self, chat_template_name: bool | str = False) -> str | None:
        """The source of the model's chat template; None if none is asked for."""
        return chat_template(self.model.tokenizer).source if chat_template_name else None

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._report(what, done, total)


def _up_to_open_end(text: str) -> str:
    """A rendered conversation up to the end of its last message, as transformers continues one."""
    before, mark, after = text.rpartition(_OPEN_END.strip())
    if not mark:
        raise InputError("the chat template leaves out the last message, which then cannot be continued")
    is_kept = after.startswith(" ")  # the template strips messages otherwise
    return before if is_kept else before.rstrip()
