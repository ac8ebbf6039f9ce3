"""From a configuration to a finished run: devices, tokenizer, data, state, compiled step; then the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from llama_jax import LlamaConfig, adapters
from llama_jax.console import terminal
from llama_jax.console.loading import init_jax
from llama_jax.errors import ConfigError, DataError, InputError
from llama_jax.sharding import check_mesh, use_mesh
from llama_jax.tokenizer import Tokenizer
from llama_jax.weights.adapters import RUN_ADAPTER_DIR
from llama_jax.weights.derived import Head
from llama_jax.weights.write.adapters import save_adapter

from .checkpoints.atomic_write import write_atomically
from .checkpoints.checkpoints import Checkpoints, Restored
from .checkpoints.lock import run_directory, run_lock
from .config.read import to_toml
from .config.run import RunConfig
from .data import Data, open_data, show_batch
from .devices import compute_dtype, join_processes, run_mesh
from .feed import Feed
from .initialization import base_fingerprint, load_pretrained, model_config
from .loop import EVAL_LOSSES, Loop
from .metrics.evaluate import make_eval_fn, make_sample_fn
from .metrics.flops import flops_per_token, peak_flops
from .metrics.report import Report
from .metrics.run_log import log_adapter, log_example_lengths, log_results, log_run
from .objectives import make_loss_fn
from .objectives.reference import reference_logprobs
from .optimizer import make_optimizer, make_schedule
from .signals import Interrupts
from .state import TrainState, init_state, split_params
from .step import build_step
from .tokenizer import run_tokenizer
from .trainable import Frozen, TrainableSpec

CONFIG_FILE = "config.toml"


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything about a run that is known before its state exists.

    Attributes:
      run: the configuration.
      run_dir: the run's directory.
      platform: such as `cpu`, `gpu` or `tpu`.
      mesh: the device mesh; None for a single device.
      feed: transfers batches to the devices.
      tokenizer: the run's tokenizer.
      model: the model's configuration.
      trainable_spec: which parameters are trained.
      data: the training and validation data.
      is_primary: whether this is process 0, which writes files and logs.
      log: prints a line on stderr; does nothing in other processes.
    """

    run: RunConfig
    run_dir: Path
    platform: str
    mesh: Mesh | None
    feed: Feed
    tokenizer: Tokenizer
    model: LlamaConfig
    trainable_spec: TrainableSpec
    data: Data
    is_primary: bool
    log: Callable[[str], None]

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """What may not change during a run: saved in checkpoints, compared when the run is resumed.

        The order of the batches, the model, and the frozen base of an adapter.
        """
        train = self.run.train
        base = base_fingerprint(self.run) if self.trainable_spec.adapter is not None else None
        return {
            "data": self.data.fingerprint,
            "seed": train.seed,
            "seq_len": train.seq_len,
            "model": json.loads(json.dumps(dataclasses.asdict(self.model))),
            "base": base,
        }

    def load_pretrained(self) -> Any:
        """The weights of `model.init_from`; None if weights start random."""
        return load_pretrained(self.run, self.mesh, self.trainable_spec)

    def split_initial_params(self) -> tuple[Any, Frozen]:
        """The initial trainable and frozen parameters."""
        params = self.load_pretrained()
        return split_params(self.model, self.run.train.seed, params, self.trainable_spec)


def train(run: RunConfig) -> int:
    """Trains a model, or resumes the run in `train.run_dir`.

    Returns:
      0 when the last step is done, or the number of the signal that stopped the run, with its state saved.

    Raises:
      LlamaJaxError: with a one-line message for bad input, and for files that cannot be read or written.
    """
    _check_wandb(run)
    join_processes(run.distributed)  # JAX installs a SIGTERM handler there, which Interrupts replaces
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        setup = _set_up(run, stack)
        checkpoints = stack.enter_context(
            Checkpoints(
                setup.run_dir, run.checkpoint, model=setup.model, run=setup.provenance, warn=setup.log
            )
        )
        stack.enter_context(use_mesh(setup.mesh))
        step, *abstract_args = build_step(run, setup.model, setup.mesh, setup.platform, setup.trainable_spec)
        restored = checkpoints.restore(abstract_args[0])
        state, frozen = _initialize(setup, restored, has_frozen=abstract_args[2] is not None)
        start_step = 0 if restored is None else restored.step
        if setup.is_primary:
            write_atomically(setup.run_dir / CONFIG_FILE, to_toml(run).encode())
        log_run(run, setup.model, setup.data, setup.mesh, setup.log)
        log_adapter(run, state.params, frozen, setup.log)
        if start_step >= run.train.steps:
            if setup.trainable_spec.adapter is not None:  # a run may be killed before it is written
                _save_adapter(setup, setup.trainable_spec.adapter, state.params)
            setup.log(
                f"{setup.run_dir} is complete after {start_step} steps; increase train.steps to continue"
            )
            return 0
        data = _with_reference_logprobs(setup, state, frozen, restored, interrupts)
        if data is None:
            setup.log("stopped before the first batch; nothing is saved")
            return interrupts.agreed_stop()
        batches = data.train()
        stack.callback(batches.close)
        if restored is not None:
            batches.restore(restored.data_states)
        with terminal.spinner("compiling the step ..."):
            compiled = step.lower(*abstract_args).compile()
        model, platform, spec = setup.model, setup.platform, setup.trainable_spec
        loop = Loop(
            run=run,
            run_dir=setup.run_dir,
            step=lambda state, batch: compiled(state, batch, frozen),
            state=state,
            steps_done=start_step,
            batches=batches,
            feed=setup.feed,
            checkpoints=checkpoints,
            report=stack.enter_context(_make_report(setup, start_step)),
            interrupts=interrupts,
            evaluate=make_eval_fn(run, model, platform, data, setup.feed, spec, frozen),
            sample=make_sample_fn(run, model, platform, setup.tokenizer, setup.mesh, spec, frozen),
            find_nonfinite=_make_find_nonfinite(setup, frozen),
            flops_per_token=_flops_per_token(setup),
            peak_flops=peak_flops(compute_dtype(run.train, platform)),
            eval_losses=[] if restored is None else list(restored.data_states[0].get(EVAL_LOSSES, [])),
        )
        stopped = loop.train()
        _finish(setup, data, loop, stopped)
        return stopped


def print_first_batch(run: RunConfig) -> None:
    """Prints the first batch of a run, token by token, without creating the run.

    Raises:
      LlamaJaxError: with a one-line message for bad input.
    """
    init_jax()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = run_tokenizer(run, Path(directory))
        data = _open_data(run, tokenizer, shard=0, num_shards=1)
        with contextlib.closing(data.train()) as batches:
            show_batch(next(batches), tokenizer, Console(highlight=False))
    log_example_lengths(data, terminal.note)


def _check_wandb(run: RunConfig) -> None:
    if run.log.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"log.wandb is {run.log.wandb!r} and wandb is not installed: pip install 'llama-jax[wandb]'"
        )


def _set_up(run: RunConfig, stack: contextlib.ExitStack) -> Setup:
    """Locks the run's directory, and opens devices, tokenizer, model and data."""
    init_jax()
    is_primary = jax.process_index() == 0
    log: Callable[[str], None] = terminal.note if is_primary else lambda _: None
    mesh = run_mesh(run.mesh)
    feed = Feed.for_mesh(mesh, run.train.global_batch_size, run.train.seq_len)
    run_dir = run_directory(run.train.run_dir)
    if is_primary:
        stack.enter_context(run_lock(run_dir, warn=log))
    tokenizer = run_tokenizer(run, run_dir)
    model = model_config(run, tokenizer)
    platform = jax.devices()[0].platform
    trainable_spec = TrainableSpec.from_config(run, platform, head_outputs=len(model.labels))
    if mesh is not None:
        check_mesh(model, mesh)
    return Setup(
        run=run,
        run_dir=run_dir,
        platform=platform,
        mesh=mesh,
        feed=feed,
        tokenizer=tokenizer,
        model=model,
        trainable_spec=trainable_spec,
        data=_open_data(run, tokenizer, shard=feed.shard, num_shards=feed.num_shards),
        is_primary=is_primary,
        log=log,
    )


def _open_data(run: RunConfig, tokenizer: Tokenizer, *, shard: int, num_shards: int) -> Data:
    return open_data(
        run.data,
        tokenizer,
        objective=run.train.objective,
        seq_len=run.train.seq_len,
        batch_size=run.train.global_batch_size,
        seed=run.train.seed,
        process_index=shard,
        process_count=num_shards,
    )


def _initialize(setup: Setup, restored: Restored | None, *, has_frozen: bool) -> tuple[TrainState, Frozen]:
    """The state, new or from a checkpoint, and the frozen parameters, which no checkpoint stores."""
    run = setup.run
    if restored is None:
        optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
        params = setup.load_pretrained()
        return init_state(setup.model, optimizer, run.train.seed, params, setup.trainable_spec)
    _check_provenance(restored.run, setup.provenance, setup.run_dir)
    frozen = setup.split_initial_params()[1] if has_frozen else None
    setup.log(f"resuming {setup.run_dir} after step {restored.step}")
    return restored.state, frozen


def _check_provenance(saved: Mapping[str, Any], current: Mapping[str, Any], run_dir: Path) -> None:
    """Checks that a resumed run trains the same model on the same data in the same order."""
    if saved.get("data") != current["data"]:
        raise DataError(
            f"{run_dir}: the data is not what this run was started with (files, text, tokenizer or weights "
            "have changed); restore it, or start another run with --train.run_dir and --model.init_from"
        )
    for name in ("seed", "seq_len"):
        if saved.get(name) != current[name]:
            raise ConfigError(
                f"train.{name} is {current[name]} and the run in {run_dir} was started with "
                f"{saved.get(name)}; the order of its batches depends on it: set it to that, or choose "
                "another train.run_dir"
            )
    model = saved.get("model", current["model"])
    for name, value in current["model"].items():
        if name in model and model[name] != value:
            raise ConfigError(
                f"model.{name} is {value} and the run in {run_dir} was started with {model[name]}: set it to "
                "that, or start another run with --train.run_dir and --model.init_from"
            )
    if saved.get("base", current["base"]) != current["base"]:
        raise ConfigError(
            f"model.init_from holds other weights than those that the adapter in {run_dir} was started on; "
            "give those, or choose another train.run_dir"
        )


def _with_reference_logprobs(
    setup: Setup, state: TrainState, frozen: Frozen, restored: Restored | None, interrupts: Interrupts
) -> Data | None:
    """The data, with precomputed reference log-probabilities if they are configured; None if stopped."""
    if not setup.run.preference.precompute_ref_log_probs:
        return setup.data

    def initial_params() -> Any:
        if restored is None or frozen is not None:
            return setup.trainable_spec.initial_params(state.params, frozen)
        return setup.split_initial_params()[0]

    logprobs = reference_logprobs(
        setup.run,
        setup.run_dir,
        setup.model,
        setup.platform,
        setup.data,
        setup.feed,
        setup.trainable_spec,
        initial_params=initial_params,
        stop=interrupts.agreed_stop,
        log=setup.log,
    )
    return None if logprobs is None else setup.data.with_reference(logprobs)


def _make_report(setup: Setup, start_step: int) -> Report:
    return Report(
        setup.run_dir,
        setup.run.log,
        total_steps=setup.run.train.steps,
        start_step=start_step,
        is_primary=setup.is_primary,
        settings=dataclasses.asdict(setup.run),
    )


def _finish(setup: Setup, data: Data, loop: Loop, stopped: int) -> None:
    """Logs how the run ended; writes the adapter and the plot of a run that was not stopped."""
    if stopped:
        loop.report.log(f"saved after step {loop.steps_done}; run the same command again to resume")
        return
    if setup.trainable_spec.adapter is not None:
        _save_adapter(setup, setup.trainable_spec.adapter, loop.state.params)
    if setup.is_primary:
        log_results(setup.run, setup.run_dir, data, loop.report.log)


def _flops_per_token(setup: Setup) -> dict[str, float]:
    """FLOPs per token by how attention is counted: `causal` or `full`."""
    return {
        attention: flops_per_token(
            setup.model,
            setup.run.train.seq_len,
            causal=attention == "causal",
            frozen=setup.trainable_spec.adapter is not None,
            reference=setup.trainable_spec.reference,
        )
        for attention in ("causal", "full")
    }


def _make_find_nonfinite(setup: Setup, frozen: Frozen) -> Callable[[Any, Any], dict[str, Any]]:
    """Makes the function that reports which parameters and gradients are not finite on a batch."""
    loss_fn = setup.trainable_spec.wrap(make_loss_fn(setup.run, setup.model, setup.platform))

    def total_loss(trainable: Any, frozen: Frozen, batch: Any) -> jax.Array:
        return loss_fn(trainable, frozen, batch).total

    def find_nonfinite(trainable: Any, batch: Any) -> dict[str, Any]:
        grads = jax.jit(jax.grad(total_loss))(trainable, frozen, batch)
        report = {}
        for name, tree in (("parameters", trainable), ("gradients", grads)):
            counts = {
                jax.tree_util.keystr(path, simple=True, separator="."): int(jnp.sum(~jnp.isfinite(leaf)))
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            report[f"not_finite_in_{name}"] = {path: count for path, count in counts.items() if count}
        return report

    return find_nonfinite


def _save_adapter(setup: Setup, settings: adapters.Settings, trainable: Any) -> None:
    """Writes the adapter, gathered from all processes, and its head into the run's directory."""
    if jax.process_count() > 1:
        trainable = multihost_utils.process_allgather(trainable, tiled=True)
    if not setup.is_primary:
        return
    head = None
    if setup.model.labels:
        head = Head(np.asarray(trainable["score"]["kernel"]).T, setup.model.labels)
    save_adapter(
        setup.run_dir / RUN_ADAPTER_DIR,
        settings,
        {"layers": trainable["layers"]},
        setup.model,
        base_model=setup.run.model.init_from,
        replace=True,
        head=head,
    )
