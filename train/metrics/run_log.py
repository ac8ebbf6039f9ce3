"""Log messages before a run's first step and after its last."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import LlamaConfig
from llama_jax.console import terminal
from llama_jax.weights.adapters import RUN_ADAPTER_DIR

from ..config.objective import HEAD_OBJECTIVES
from ..config.run import RunConfig
from ..data import Data
from ..devices import compute_dtype
from ..trainable import Frozen
from .plot import plot_losses

Log = Callable[[str], None]


def log_run(run: RunConfig, model: LlamaConfig, data: Data, mesh: Mesh | None, log: Log) -> None:
    """Logs the sizes of model, data, batch and mesh."""
    facts = data.describe()
    axes = "" if mesh is None else " x ".join(f"{n} {s}" for n, s in mesh.shape.items() if s > 1)
    platform = jax.devices()[0].platform
    log(
        f"model: {model.num_params / 1e6:,.1f}M parameters, {model.num_hidden_layers} layers; vocabulary "
        f"{model.vocab_size}"
    )
    log(
        f"data: {facts['documents']} documents, {facts['validation_documents']} of them for validation, "
        f"{terminal.human_bytes(facts['bytes'])}"
    )
    log_example_lengths(data, log)
    if 0 < run.optimizer.schedule_steps < run.train.steps and run.optimizer.schedule != "constant":
        log(
            f"the learning-rate schedule ends after step {run.optimizer.schedule_steps} of "
            f"{run.train.steps}: optimizer.schedule_steps"
        )
    log(
        f"step: {run.train.global_batch_size} x {run.train.seq_len} tokens in "
        f"{compute_dtype(run.train, platform).name} on {jax.device_count()} {jax.devices()[0].device_kind} "
        f"device{'s' * (jax.device_count() > 1)}{f' ({axes})' if axes else ''}"
    )


def log_example_lengths(data: Data, log: Log) -> None:
    """Logs the lengths of finetuning examples, the fraction of tokens in the loss, and skipped examples."""
    sample = data.describe().get("sample")
    if not sample or not sample["examples"]:
        return
    skipped = ", ".join(f"{count} {reason}" for reason, count in sample["skipped"].items())
    log(
        f"first {sample['examples']} examples: {sample['tokens'] / sample['examples']:.0f} tokens "
        f"on average, at most {sample['longest']}; {sample['learned'] / sample['tokens']:.0%} of them in "
        "the loss" + (f"; skipped: {skipped}" if skipped else "")
    )


def log_adapter(run: RunConfig, trainable: Any, frozen: Frozen, log: Log) -> None:
    """Logs the number of trainable parameters and the size of the frozen base, if an adapter is trained."""
    if frozen is None or run.adapter.type == "none":
        return
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen["base"]))
    log(
        f"{run.adapter.settings}: {count / 1e6:,.2f}M trainable parameters on a frozen base of "
        f"{terminal.human_bytes(size)}"
    )


def log_results(run: RunConfig, run_dir: Path, data: Data, log: Log) -> None:
    """Logs a unigram baseline, the files that were written, and the command to try next; plots the losses."""
    unigram_loss = data.unigram_loss(run.eval.batches)
    if not math.isnan(unigram_loss):  # there is a validation set
        log(f"eval_loss of a unigram model of the same tokens: {unigram_loss:.4f}")
    if run.log.plot:
        path = plot_losses(run_dir, unigram_loss)
        log(f"loss plot: {path}" if path else "loss plot: needs pip install 'llama-jax[plot]'")
    if run.adapter.type != "none":
        library = "AdapterHub" if run.adapter.type == "bottleneck" else "PEFT"
        log(f"the adapter is in {run_dir / RUN_ADAPTER_DIR}, in {library} format")
    if run.train.objective not in HEAD_OBJECTIVES:
        command = f"llama-jax generate {run_dir} --prompt ..."
    elif run.adapter.type in ("none", "lora"):
        command = f"llama-jax convert {run_dir} OUT --to hf"
    else:
        command = f"llama_jax.train.scorer.Scorer.load({str(run_dir)!r}) in Python"
    log(f"the model is in {run_dir}; next: {command}")
