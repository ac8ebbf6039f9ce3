"""What a model is worth part-way: its loss on held-out text, and a text of its own."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llama_jax import LlamaConfig, Sampling, generate
from llama_jax.errors import ConfigError
from llama_jax.tokenizer import Tokenizer

from ..config.run import EvalConfig, RunConfig
from ..data import Data
from ..devices import compute_dtype
from ..feed import Feed
from ..objectives.objective import Measure, make_measure
from ..state import FULL
from ..trainable import Frozen, Tuning, cast


def make_held_out_loss(
    run: RunConfig,
    model: LlamaConfig,
    platform: str,
    data: Data,
    feed: Feed,
    tuning: Tuning = FULL,
    frozen: Frozen = None,
) -> Callable[[Any], dict[str, float]]:
    """Makes the function of what is trained that measures it on the held-out examples.

    It returns `eval_loss` (nats a token, or the objective's own loss an example or pair) and what else
    the objective tells, such as `accuracy`; where tokens are predicted, `perplexity` and `bits_per_byte`; the
    empty dict where nothing is held out. The z-loss is left out: these numbers compare with everybody's.
    """
    plain = dataclasses.replace(run, train=dataclasses.replace(run.train, z_loss=0.0))
    told: Measure = jax.jit(tuning.over(make_measure(plain, model, platform)))

    def measure(params: Any) -> dict[str, float]:
        count = nbytes = 0.0
        totals: dict[str, np.ndarray] = {}
        for batch in itertools.islice(data.held_out(), run.eval.batches):
            loss, numbers = told(params, frozen, feed.put(batch))
            for name, number in {"eval_loss": loss.total, **numbers}.items():
                totals[name] = totals.get(name, 0.0) + np.asarray(number, np.float64)
            count += float(loss.count)
            nbytes += batch["bytes"]
        if not count:
            return {}
        confusion = totals.pop("confusion", None)
        means = {name: float(total) / count for name, total in totals.items()}
        if confusion is not None:
            means["macro_f1"] = macro_f1(confusion)
        if run.train.objective not in ("pretrain", "sft"):
            return means
        return means | {
            "eval_perplexity": math.exp(min(means["eval_loss"], 700)),
            "bits_per_byte": float(totals["eval_loss"]) / math.log(2) / nbytes if nbytes else math.nan,
        }

    return measure


def macro_f1(confusion: np.ndarray) -> float:
    """The mean over classes of the harmonic mean of precision and recall, 2 hits / (true + taken).

    Args:
      confusion: [C, C], how often each class, by row, was taken for each. Classes that neither occur nor are
        found do not count.
    """
    seen = confusion.sum(0) + confusion.sum(1)
    return float(np.mean(2 * np.diag(confusion)[seen > 0] / seen[seen > 0]))


def make_sampler(
    run: RunConfig,
    model: LlamaConfig,
    platform: str,
    tokenizer: Tokenizer,
    mesh: Mesh | None,
    tuning: Tuning = FULL,
    frozen: Frozen = None,
) -> Callable[[Any, jax.Array], str]:
    """Makes the function of what is trained and a key that writes `eval.max_new_tokens` tokens.

    They follow `eval.prompt`, and are fewer where the model's context is shorter.

    Raises:
      ConfigError: if the prompt alone fills it.
    """
    config: EvalConfig = run.eval
    rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]  # each device needs one
    prompt = tokenizer.encode(config.prompt, add_bos=tokenizer.bos_id is not None)
    prompt = prompt or [*tokenizer.eos_ids, 0][:1]
    room = model.max_position_embeddings - len(prompt)
    if config.max_new_tokens and room < 1:
        raise ConfigError(
            f"eval.prompt has {len(prompt)} tokens and the model's context {model.max_position_embeddings}; "
            "shorten it"
        )
    tokens = jnp.asarray(np.tile(np.array(prompt, np.int32), (rows, 1)))
    dtype = compute_dtype(run.train, platform)

    @jax.jit
    def weights(params: Any, frozen: Frozen) -> Any:
        return cast(tuning.model(params, frozen), dtype)

    def write(params: Any, key: jax.Array) -> str:
        out = generate(
            model,
            weights(params, frozen),
            tokens,
            jnp.full(rows, len(prompt), jnp.int32),
            key,
            Sampling(temperature=config.temperature),
            max_new_tokens=min(config.max_new_tokens, room),
            eos_id=tokenizer.eos_ids,
        )
        ids, lengths = out.tokens, out.lengths
        if jax.process_count() > 1:
            ids, lengths = (multihost_utils.process_allgather(x, tiled=True) for x in (ids, lengths))
        # A text's first piece loses its space in decoding, and a continuation's must not.
        text = tokenizer.stream()
        text.extend(prompt)
        new = np.asarray(ids)[0, : int(np.asarray(lengths)[0])]
        return config.prompt + text.extend(new) + text.flush()

    return write
