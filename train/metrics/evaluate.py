"""Evaluation during training: metrics on the validation set, and sampled text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llama_jax import LlamaConfig, Sampling, generate
from llama_jax.errors import ConfigError
from llama_jax.loss import Loss
from llama_jax.tokenizer import Tokenizer

from ..config.eval import EvalConfig
from ..config.run import RunConfig
from ..data import Data
from ..data.evaluation import batches_of, weighted_mean
from ..devices import compute_dtype
from ..feed import Feed
from ..objectives import make_metrics_fn
from ..trainable import FULL_FINETUNING, Frozen, TrainableSpec, cast
from .run_log import log_validation


def make_eval_fn(
    run: RunConfig,
    model: LlamaConfig,
    platform: str,
    data: Data,
    feed: Feed,
    trainable_spec: TrainableSpec = FULL_FINETUNING,
    frozen: Frozen = None,
    *,
    log: Callable[[str], None] = lambda _: None,
) -> Callable[[Any], dict[str, float]]:
    """Makes the function from trainable parameters to metrics on the validation set.

    The metrics are `eval_loss` (nats per token, or the objective's loss per example or pair) and the
    objective's own, such as `accuracy`; for language modeling `eval_perplexity` and `bits_per_byte`. The dict
    is empty without a validation set. The z-loss and those of routers are excluded, so that losses are
    comparable.

    With several sources each gets its share of `eval.batches` by its weight; the metrics are their weighted
    means, and `eval_loss/FILES` is the loss of each.

    What encoding the validation set took is logged, in the evaluations that encode any of it.
    """
    train = dataclasses.replace(run.train, z_loss=0.0, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    plain = dataclasses.replace(run, train=train)
    metrics_fn = jax.jit(trainable_spec.wrap(make_metrics_fn(plain, model, platform)))

    def evaluate_source(trainable: Any, source: str | None, batches: int) -> dict[str, Any]:
        count = nbytes = 0.0
        totals: dict[str, np.ndarray] = {}
        counts: dict[str, float] = {}  # of metrics with one of their own
        for batch in itertools.islice(data.validation_batches(source), batches):
            loss, metrics = metrics_fn(trainable, frozen, feed.put(batch))
            for name, value in {"eval_loss": loss.total, **metrics}.items():
                if isinstance(value, Loss):
                    counts[name] = counts.get(name, 0.0) + float(value.count)
                    value = value.total
                totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
            count += float(loss.count)
            nbytes += batch["bytes"]
        if not count:
            return {}
        confusion = totals.pop("confusion", None)
        means: dict[str, Any] = {
            name: float(total) / (counts.get(name, count) or math.nan) for name, total in totals.items()
        }
        if confusion is not None:
            means["confusion"] = confusion
        if run.train.objective in ("pretrain", "sft"):
            bits = float(totals["eval_loss"]) / math.log(2)
            means["bits_per_byte"] = bits / nbytes if nbytes else math.nan
        return means

    def evaluate(trainable: Any) -> dict[str, float]:
        shares, encoded = data.validation_sources, data.validation.cost.records
        results = {
            source: evaluate_source(
                trainable, source if len(shares) > 1 else None, batches_of(run.eval.batches, share)
            )
            for source, share in shares.items()
        }
        if data.validation.cost.records > encoded:
            log_validation(data, log)
        results = {source: means for source, means in results.items() if means}
        if not results:
            return {}
        confusion = [means.pop("confusion") for means in results.values() if "confusion" in means]
        names = next(iter(results.values()))
        means = {
            name: weighted_mean((found[name], shares[source]) for source, found in results.items())
            for name in names
        }
        if run.train.objective == "kto":
            means["reward_margin"] = means["reward_desirable"] - means["reward_undesirable"]
        if confusion:
            means["macro_f1"] = macro_f1(sum(confusion))
        if run.train.objective in ("pretrain", "sft", "distill"):
            nats = means["cross_entropy" if run.train.objective == "distill" else "eval_loss"]
            means["eval_perplexity"] = math.exp(min(nats, 700))
        if len(shares) > 1:
            means |= {f"eval_loss/{source}": found["eval_loss"] for source, found in results.items()}
        return means

    return evaluate


def macro_f1(confusion: np.ndarray) -> float:
    """The mean of the classes' F1 scores, 2 hits / (labels + predictions).

    Args:
      confusion: [C, C], the confusion matrix, labels by row. Classes that are neither labels nor predictions
        are excluded.
    """
    totals = confusion.sum(0) + confusion.sum(1)
    return float(np.mean(2 * np.diag(confusion)[totals > 0] / totals[totals > 0]))


def make_sample_fn(
    run: RunConfig,
    model: LlamaConfig,
    platform: str,
    tokenizer: Tokenizer,
    trainable_spec: TrainableSpec = FULL_FINETUNING,
    frozen: Frozen = None,
) -> Callable[[Any, jax.Array], str]:
    """Makes the function from trainable parameters and a key to a sampled text.

    It continues `eval.prompt` by up to `eval.max_new_tokens` tokens, as far as the model's context allows.

    Raises:
      ConfigError: if the prompt alone fills the context.
    """
    config: EvalConfig = run.eval
    prompt = tokenizer.encode(config.prompt, add_bos=tokenizer.bos_id is not None)
    prompt = prompt or [*tokenizer.eos_ids, 0][:1]
    max_new_tokens = min(config.max_new_tokens, model.max_position_embeddings - len(prompt))
    if config.max_new_tokens and max_new_tokens < 1:
        raise ConfigError(
            f"eval.prompt has {len(prompt)} tokens and the model's context {model.max_position_embeddings}; "
            "shorten it"
        )
    unused = tuple(getattr(tokenizer, "unused_ids", ()))  # rows of a padded vocabulary
    sampling = Sampling(temperature=config.temperature, suppress_tokens=unused)
    tokens: Any = np.array([prompt], np.int32)  # the same in every process
    length: Any = np.array([len(prompt)], np.int32)
    dtype = compute_dtype(run.train, platform)

    @jax.jit
    def merged_params(trainable: Any, frozen: Frozen) -> Any:
        return cast(trainable_spec.language_model(trainable, frozen), dtype)

    def sample(trainable: Any, key: jax.Array) -> str:
        out = generate(
            model,
            merged_params(trainable, frozen),
            tokens,
            length,
            key,
            sampling,
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_ids,
        )
        # SentencePiece drops the first piece's leading space in decoding; a continuation must keep it.
        text = tokenizer.stream()
        text.extend(prompt)
        new_ids = np.asarray(out.tokens)[0, : int(np.asarray(out.lengths)[0])]
        return config.prompt + text.extend(new_ids) + text.flush()

    return sample
