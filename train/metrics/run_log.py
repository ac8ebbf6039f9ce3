"""Log messages before a run's first step and after its last."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import LlamaConfig
from llama_jax.console import terminal
from llama_jax.errors import CheckpointError
from llama_jax.eval.goodput import describe
from llama_jax.weights.adapters import RUN_ADAPTER_DIR
from llama_jax.weights.runs import BEST_METRIC, CHECKPOINTS, read_step_metadata, step_folders

from ..config.objective import HEAD_OBJECTIVES
from ..config.run import RunConfig
from ..data import Data
from ..devices import compute_dtype
from ..rl.prompts import PromptData
from ..trainable import Frozen
from .clock import GoodputRecords
from .plot import PLOT, plot_losses

Log = Callable[[str], None]


def log_run(
    run: RunConfig,
    model: LlamaConfig,
    data: Data | PromptData,
    mesh: Mesh | None,
    log: Log,
    teacher: LlamaConfig | None = None,
) -> None:
    """Logs the sizes of model, teacher, data, batch and mesh."""
    facts = data.describe()
    axes = "" if mesh is None else " x ".join(f"{n} {s}" for n, s in mesh.shape.items() if s > 1)
    platform = jax.devices()[0].platform
    simulated = "simulated " if platform == "cpu" and jax.local_device_count() > 1 else ""
    active = f" ({model.num_active_params / 1e6:,.1f}M of them for a token)" if model.num_experts else ""
    log(
        f"model: {model.num_params / 1e6:,.1f}M parameters{active}, {model.num_hidden_layers} layers; "
        f"vocabulary {model.vocab_size}" + _context(model)
    )
    if teacher is not None:
        settings = run.distillation
        log(
            f"teacher: {teacher.num_params / 1e6:,.1f}M parameters, {teacher.num_hidden_layers} layers; "
            f"beta {settings.beta:g}, temperature {settings.temperature:g}, "
            f"{f'its top {settings.top_k} tokens' if settings.top_k else 'all tokens'}"
        )
    log(
        f"data: {facts['documents']} documents, {facts['validation_documents']} of them for validation, "
        f"{terminal.human_bytes(facts['bytes'])}"
    )
    log_examples(data, log)
    if 0 < run.optimizer.schedule_steps < run.train.steps and run.optimizer.schedule != "constant":
        log(
            f"the learning-rate schedule ends after step {run.optimizer.schedule_steps} of "
            f"{run.train.steps}: optimizer.schedule_steps"
        )
    log(
        f"step: {run.train.global_batch_size} x {run.train.seq_len} tokens in "
        f"{compute_dtype(run.train, platform).name} on {jax.device_count()} {simulated}"
        f"{jax.devices()[0].device_kind} "
        f"device{'s' * (jax.device_count() > 1)}{f' ({axes})' if axes else ''}"
    )


def _context(model: LlamaConfig) -> str:
    """The context of a model whose frequencies are scaled; empty for another."""
    scaling = model.rope_scaling
    if scaling is None:
        return ""
    return f"; context {model.max_position_embeddings} ({scaling.kind}, factor {scaling.factor:g})"


def log_examples(data: Data | PromptData, log: Log) -> None:
    """Logs the lengths of finetuning examples, the fraction of tokens in the loss, and skipped examples.

    Of any data, the notes of `Data.describe`.
    """
    facts = data.describe()
    sample = facts.get("sample")
    if sample and sample["examples"]:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sample["skipped"].items())
        log(
            f"first {sample['examples']} examples: {sample['tokens'] / sample['examples']:.0f} tokens "
            f"on average, at most {sample['longest']}; {sample['learned'] / sample['tokens']:.0%} of them "
            "in the loss" + (f"; skipped: {skipped}" if skipped else "")
        )
    for note in facts["notes"]:
        log(f"note: {note}")


def log_validation(data: Data, log: Log) -> None:
    """Logs what it took to encode the validation set."""
    cost, processes = data.validation.cost, jax.process_count()
    by = "" if processes == 1 else f" by this one of {processes} processes"
    log(
        f"validation set: {cost.records} records encoded{by} in {cost.seconds:.1f} s, and kept in "
        f"{terminal.human_bytes(data.validation.nbytes)}"
    )


def log_adapter(run: RunConfig, trainable: Any, frozen: Frozen, log: Log) -> None:
    """Logs the number of trainable parameters and the size of the frozen base, if an adapter is trained."""
    if frozen is None or run.adapter.type == "none":
        return
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen["base"]))
    log(
        f"{_adapter_settings(run)}: {count / 1e6:,.2f}M trainable parameters on a frozen base of "
        f"{terminal.human_bytes(size)}"
    )
    if run.model.extends_context:
        log(
            "note: adapter formats do not record the context that the run extends; llama_jax reads it from "
            "the run, and for other programs `llama-jax convert` merges the adapter into its base"
        )


def _adapter_settings(run: RunConfig) -> str:
    """As in `lora, rank 8, alpha 16, target_modules *, dora`; what is off is left out."""
    words: list[str] = [run.adapter.type]
    for name, value in vars(run.adapter.settings).items():
        if value is True:
            words.append(name)
        elif value is not False:
            value = " ".join(value) if isinstance(value, tuple) else value
            words.append(f"{name} {value if isinstance(value, str) else f'{value:g}'}")
    return ", ".join(words)


def log_best_step(run_dir: Path, log: Log) -> None:
    """Logs which kept checkpoint has the lowest eval_loss, if that is not the last one."""
    losses = {}
    for step, folder in step_folders(run_dir).items():
        with contextlib.suppress(CheckpointError):
            losses[step] = read_step_metadata(folder).metrics.get(BEST_METRIC, math.inf)
    best = min(losses, key=lambda step: (not math.isfinite(losses[step]), losses[step], -step), default=0)
    if losses and math.isfinite(losses[best]) and best != max(losses):
        log(
            f"the lowest eval_loss of a kept checkpoint, {losses[best]:.4f}, is that of step {best}: "
            f"{run_dir / CHECKPOINTS / str(best)} is that model, {run_dir} the last one"
        )


def log_goodput(records: GoodputRecords, log: Log) -> None:
    """Logs what the wall time of all starts of the run was spent on."""
    if (goodput := records.goodput()) is not None:
        log(describe(goodput))


def log_results(run: RunConfig, run_dir: Path, data: Data | PromptData, log: Log) -> None:
    """Logs a unigram baseline, the files that were written, and the command to try next; plots the losses."""
    unigram_loss = data.unigram_loss(run.eval.batches)
    if not math.isnan(unigram_loss):  # there is a validation set
        log(f"eval_loss of a unigram model of the same tokens: {unigram_loss:.4f}")
    if run.log.plot:
        try:
            path = plot_losses(run_dir, unigram_loss)
            log(f"loss plot: {path}" if path else "loss plot: needs pip install 'llama-jax[plot]'")
        except OSError as error:
            log(f"loss plot: {run_dir / PLOT} cannot be written: {error.strerror}")
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
