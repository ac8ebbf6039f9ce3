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
from llama_jax.loss import Loss
from llama_jax.tokenizer import Tokenizer
from train.config import EvalConfig, RunConfig
from train.data import Data
from train.devices import compute_dtype
from train.feed import Feed
from train.objectives import pretraining


def make_held_out_loss(
    run: RunConfig, model: LlamaConfig, platform: str, data: Data, feed: Feed
) -> Callable[[Any], dict[str, float]]:
    """Makes the function of the parameters that measures them on the held-out text.

    It returns `held_out_loss` (nats a token), `perplexity` and `bits_per_byte`; the empty dict where nothing
    is held out. The z-loss is left out: these numbers compare with everybody's.
    """
    plain = dataclasses.replace(run.train, z_loss=0.0)
    batch_loss: Callable[..., Loss] = jax.jit(pretraining(model, plain, platform))

    def measure(params: Any) -> dict[str, float]:
        total = count = nbytes = 0.0
        for batch in itertools.islice(data.held_out(), run.eval.batches):
            loss = batch_loss(params, feed.put(batch))
            total, count = total + float(loss.total), count + float(loss.count)
            nbytes += batch["bytes"]
        if not count:
            return {}
        mean = total / count
        return {
            "held_out_loss": mean,
            "perplexity": math.exp(min(mean, 700)),
            "bits_per_byte": total / math.log(2) / nbytes if nbytes else math.nan,
        }

    return measure


def make_sampler(
    run: RunConfig, model: LlamaConfig, platform: str, tokenizer: Tokenizer, mesh: Mesh | None
) -> Callable[[Any, jax.Array], str]:
    """Makes the function of parameters and key that writes `eval.max_new_tokens` tokens after the prompt.

    Fewer where the model's context is shorter.

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
    def cast(params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), params)

    def write(params: Any, key: jax.Array) -> str:
        out = generate(
            model,
            cast(params),
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
