"""From a configuration to a finished run: devices, vocabulary, data, state, compiled step; then the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from llama_jax import LlamaConfig, adapters
from llama_jax.console import terminal
from llama_jax.console.compilation_cache import keep_compiled_programs
from llama_jax.errors import ConfigError, DataError, InputError
from llama_jax.sharding import check_mesh, use_mesh
from llama_jax.tokenizer import Tokenizer
from llama_jax.weights.adapters import IN_RUN
from llama_jax.weights.derived import Head
from llama_jax.weights.write.adapters import save_adapter

from .checkpoints.atomic_write import write_whole
from .checkpoints.checkpoints import Checkpoints
from .checkpoints.lock import run_lock
from .config.read import to_toml
from .config.run import RunConfig
from .data import Data, open_data, show_batch
from .devices import compute_dtype, join_processes, run_mesh
from .feed import Feed
from .initialization import starting_model, starting_weights
from .loop import MEASURED, Loop
from .metrics.evaluate import make_held_out_loss, make_sampler
from .metrics.flops import flops_per_token, peak_flops
from .metrics.report import Report
from .metrics.run_log import finish, introduce, tell_adapter, tell_examples
from .objectives.objective import make_objective
from .objectives.reference import reference_logprobs
from .optimizer import make_optimizer, make_schedule
from .signals import Interrupts
from .state import begin, take_apart
from .step import build_step
from .tokenizer import run_tokenizer
from .trainable import Frozen, Tuning

CONFIG = "config.toml"


def train(run: RunConfig) -> int:
    """Trains, or goes on with the run that `train.run_dir` holds.

    Returns:
      0 when the last step is done, or the number of the signal that stopped it with everything saved.

    Raises:
      LlamaJaxError: for whatever a user can mend, in one line.
    """
    if run.log.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"log.wandb is {run.log.wandb!r} and wandb is not installed: pip install 'llama-jax[wandb]'"
        )
    join_processes(run.distributed)  # where JAX takes SIGTERM for itself, so before Interrupts takes it back
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        first = jax.process_index() == 0
        say: Callable[[str], None] = terminal.note if first else lambda _: None
        keep_compiled_programs()
        mesh = run_mesh(run.mesh)
        feed = Feed.over(mesh, run.train.global_batch_size, run.train.seq_len)
        run_dir = Path(run.train.run_dir).expanduser()
        if first:
            stack.enter_context(run_lock(run_dir, warn=say))
        tokenizer = run_tokenizer(run, run_dir)
        model = starting_model(run, tokenizer)
        platform = jax.devices()[0].platform
        tuning = Tuning.of(run, platform, outputs=len(model.labels))
        if mesh is not None:
            check_mesh(model, mesh)
        data = _open_data(run, tokenizer, feed.share, feed.shares)
        notes = {"data": data.fingerprint, "seed": run.train.seed, "seq_len": run.train.seq_len}
        checkpoints = stack.enter_context(
            Checkpoints(run_dir, run.checkpoint, model=model, run=notes, warn=say)
        )
        stack.enter_context(use_mesh(mesh))
        step, abstract, abstract_batch, abstract_frozen = build_step(run, model, mesh, platform, tuning)
        restored, measured = checkpoints.restore(abstract), []
        if restored is None:
            optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
            params, done = starting_weights(run, mesh, tuning), 0
            state, frozen = begin(model, optimizer, run.train.seed, params, tuning)
        else:
            _check_same(restored.run, notes, run_dir)
            state, done = restored.state, restored.step
            frozen = None
            if abstract_frozen is not None:  # no checkpoint holds it
                frozen = take_apart(model, run.train.seed, starting_weights(run, mesh, tuning), tuning)[1]
            measured = restored.data_states[0].get(MEASURED, [])
            say(f"resuming {run_dir} after step {done}")
        if first:
            write_whole(run_dir / CONFIG, to_toml(run).encode())
        introduce(run, model, data, mesh, say)
        tell_adapter(run, state.params, frozen, say)
        if done >= run.train.steps:
            say(f"{run_dir} has had its {done} steps; train.steps makes it go on")
            return 0
        if run.preference.precompute_ref_log_probs:

            def beginning() -> Any:
                if restored is None or frozen is not None:
                    return tuning.beginning(state.params, frozen)
                return take_apart(model, run.train.seed, starting_weights(run, mesh, tuning), tuning)[0]

            logprobs = reference_logprobs(
                run,
                run_dir,
                model,
                platform,
                data,
                feed,
                tuning,
                beginning=beginning,
                stop=interrupts.agreed_stop,
                say=say,
            )
            if logprobs is None:
                say("stopped before the first batch; nothing is saved")
                return interrupts.agreed_stop()
            data = data.with_reference(logprobs)
        batches = data.train()
        stack.callback(batches.close)
        if restored is not None:
            batches.restore(restored.data_states)
        with terminal.spinner("compiling the step ..."):
            compiled = step.lower(abstract, abstract_batch, abstract_frozen).compile()
        report = Report(
            run_dir,
            run.log,
            steps=run.train.steps,
            done=done,
            first=first,
            settings=dataclasses.asdict(run),
        )
        loop = Loop(
            run=run,
            run_dir=run_dir,
            step=lambda state, batch: compiled(state, batch, frozen),
            state=state,
            done=done,
            batches=batches,
            feed=feed,
            checkpoints=checkpoints,
            report=stack.enter_context(report),
            interrupts=interrupts,
            held_out=make_held_out_loss(run, model, platform, data, feed, tuning, frozen),
            sample=make_sampler(run, model, platform, tokenizer, mesh, tuning, frozen),
            diagnose=_diagnosis(run, model, platform, tuning, frozen),
            flops={
                kind: flops_per_token(
                    model,
                    run.train.seq_len,
                    causal=kind == "causal",
                    frozen=tuning.adapter is not None,
                    reference=tuning.reference,
                )
                for kind in ("causal", "full")
            },
            peak=peak_flops(compute_dtype(run.train, platform)),
            measured=list(measured),
        )
        stopped = loop.train()
        if stopped:
            report.say(f"saved after step {loop.done}; the same command goes on from there")
            return stopped
        if tuning.adapter is not None:
            _save_adapter(run, run_dir, model, tuning.adapter, loop.state.params)
        if first:
            finish(run, run_dir, data, report.say)
        return stopped


def first_batch(run: RunConfig) -> None:
    """Prints the first batch of a run, token by token, and leaves no trace of it.

    Raises:
      LlamaJaxError: for whatever a user can mend, in one line.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = run_tokenizer(run, Path(folder))
        data = _open_data(run, tokenizer, 0, 1)
        with contextlib.closing(data.train()) as batches:
            show_batch(next(batches), tokenizer, Console(highlight=False))
    tell_examples(data, terminal.note)


def _open_data(run: RunConfig, tokenizer: Tokenizer, share: int, shares: int) -> Data:
    return open_data(
        run.data,
        tokenizer,
        objective=run.train.objective,
        seq_len=run.train.seq_len,
        batch_size=run.train.global_batch_size,
        seed=run.train.seed,
        process_index=share,
        process_count=shares,
    )


def _save_adapter(
    run: RunConfig, run_dir: Path, model: LlamaConfig, settings: adapters.Settings, trained: Any
) -> None:
    """Writes the adapter, of all processes' parts."""
    if jax.process_count() > 1:
        trained = multihost_utils.process_allgather(trained, tiled=True)
    if jax.process_index() == 0:
        adapter, head = {"layers": trained["layers"]}, None
        if model.labels:
            head = Head(np.asarray(trained["score"]["kernel"]).T, model.labels)
        where, base = run_dir / IN_RUN, run.model.init_from
        save_adapter(where, settings, adapter, model, base_model=base, replace=True, head=head)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    """Checks that a resumed run reads the data that it began with, in the same order."""
    if before.get("data") != now["data"]:
        raise DataError(
            f"{run_dir}: the data is not what this run began with (files, text, tokenizer or weights have "
            "changed); put it back, or begin another run with --train.run_dir and --model.init_from"
        )
    for name in ("seed", "seq_len"):
        if before.get(name) != now[name]:
            raise ConfigError(
                f"train.{name} is {now[name]} and the run in {run_dir} began with {before.get(name)}; its "
                "batches follow from it: give the same, or another train.run_dir"
            )


def _diagnosis(
    run: RunConfig, model: LlamaConfig, platform: str, tuning: Tuning, frozen: Frozen
) -> Callable[[Any, Any], dict[str, Any]]:
    objective = tuning.over(make_objective(run, model, platform))

    def total(params: Any, frozen: Frozen, batch: Any) -> jax.Array:
        return objective(params, frozen, batch).total

    def diagnose(params: Any, batch: Any) -> dict[str, Any]:
        """Which tensors of the parameters, and of their gradient on this batch, hold what is not finite."""
        grads = jax.jit(jax.grad(total))(params, frozen, batch)
        report = {}
        for name, tree in (("parameters", params), ("gradients", grads)):
            bad = {
                jax.tree_util.keystr(path, simple=True, separator="."): int(jnp.sum(~jnp.isfinite(leaf)))
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            report[f"not_finite_in_{name}"] = {path: count for path, count in bad.items() if count}
        return report

    return diagnose
