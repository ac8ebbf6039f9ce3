"""What a run says of itself before its first step and after its last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import LlamaConfig
from llama_jax.console import terminal
from llama_jax.weights.adapters import IN_RUN

from ..config.finetune import HEADS
from ..config.run import RunConfig
from ..data import Data
from ..devices import compute_dtype
from ..trainable import Frozen
from .plot import plot_losses

Say = Callable[[str], None]


def introduce(run: RunConfig, model: LlamaConfig, data: Data, mesh: Mesh | None, say: Say) -> None:
    """The first words: model, data, and what a step is."""
    facts = data.describe()
    sizes = "" if mesh is None else " x ".join(f"{n} {s}" for n, s in mesh.shape.items() if s > 1)
    platform = jax.devices()[0].platform
    say(
        f"model: {model.num_params / 1e6:,.1f}M parameters, {model.num_hidden_layers} layers; vocabulary "
        f"{model.vocab_size}"
    )
    say(
        f"data: {facts['documents']} documents, {facts['held_out_documents']} of them held out, "
        f"{terminal.human_bytes(facts['bytes'])}"
    )
    tell_examples(data, say)
    if 0 < run.optimizer.schedule_steps < run.train.steps and run.optimizer.schedule != "constant":
        say(
            f"the learning rate's schedule ends after step {run.optimizer.schedule_steps} of "
            f"{run.train.steps}: optimizer.schedule_steps"
        )
    say(
        f"step: {run.train.global_batch_size} x {run.train.seq_len} tokens in "
        f"{compute_dtype(run.train, platform).name} on {jax.device_count()} {jax.devices()[0].device_kind} "
        f"device{'s' * (jax.device_count() > 1)}{f' ({sizes})' if sizes else ''}"
    )


def tell_examples(data: Data, say: Say) -> None:
    """Says of finetuning's examples how long they are, and what of them is learned or was left out."""
    sample = data.describe().get("sample")
    if not sample or not sample["examples"]:
        return
    skipped = ", ".join(f"{count} {reason}" for reason, count in sample["skipped"].items())
    say(
        f"of the first {sample['examples']} examples: {sample['tokens'] / sample['examples']:.0f} tokens "
        f"each, the longest {sample['longest']}; {sample['learned'] / sample['tokens']:.0%} are learned"
        + (f"; left out: {skipped}" if skipped else "")
    )


def tell_adapter(run: RunConfig, trained: Any, frozen: Frozen, say: Say) -> None:
    """How much is trained, and what the base takes."""
    if frozen is None or run.adapter.type == "none":
        return
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen["base"]))
    say(
        f"{run.adapter.settings}: {count / 1e6:,.2f}M parameters are trained, over a frozen base of "
        f"{terminal.human_bytes(size)}"
    )


def finish(run: RunConfig, run_dir: Path, data: Data, say: Say) -> None:
    """The last words: how good the model is beside counting words, the plot, and what to do next."""
    unigram = data.unigram_loss()
    if unigram == unigram:  # not NaN: something is held out
        say(f"held-out loss of a unigram model of the same tokens: {unigram:.4f}")
    if run.log.plot:
        drawn = plot_losses(run_dir, unigram)
        say(f"loss plot: {drawn}" if drawn else "loss plot: needs pip install 'llama-jax[plot]'")
    if run.adapter.type != "none":
        whose = "AdapterHub" if run.adapter.type == "bottleneck" else "PEFT"
        say(f"the adapter is in {run_dir / IN_RUN}, in {whose}'s format")
    if run.train.objective not in HEADS:
        then = f"llama-jax generate {run_dir} --prompt ..."
    elif run.adapter.type in ("none", "lora"):
        then = f"llama-jax convert {run_dir} OUT --to hf"
    else:
        then = f"llama_jax.train.scorer.Scorer.load({str(run_dir)!r}) in Python"
    say(f"the model is in {run_dir}; try: {then}")
