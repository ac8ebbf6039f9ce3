"""From a configuration to a finished run: devices, tokenizer, data, state, compiled step; then the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import LlamaConfig
from llama_jax.console import terminal
from llama_jax.console.loading import init_jax
from llama_jax.errors import InputError
from llama_jax.plan.flops import flops_by_attention
from llama_jax.sharding import check_mesh, use_mesh
from llama_jax.storage.atomic import write_atomically
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizer.fit import fit_vocabulary
from llama_jax.weights.runs import StepMetadata

from . import gpu
from .checkpoints.checkpoints import Checkpoints, Restored
from .checkpoints.lock import run_directory, run_lock
from .config.objective import PAIR_OBJECTIVES
from .config.read import to_toml
from .config.run import RunConfig
from .coordination import Agreement
from .data import Data, Peers, open_data, show_batch
from .devices import check_quantization, compute_dtype, has_fp8, resolve_attention, run_mesh, start_jax
from .export import export_adapter
from .failed_start import discarded_unless_begun
from .feed import Feed
from .gather import gather_bytes
from .initialization import base_fingerprint, check_context, load_pretrained, model_config
from .loop import EVAL_LOSSES, Loop
from .metrics.clock import Clock, GoodputRecords
from .metrics.evaluate import make_eval_fn, make_sample_fn
from .metrics.peak_flops import peak_flops
from .metrics.report import Report
from .metrics.run_log import log_adapter, log_best_step, log_examples, log_goodput, log_results, log_run
from .nonfinite import make_find_nonfinite
from .objectives.reference import reference_logprobs
from .optimizer import make_optimizer, make_schedule
from .peers import end_together
from .provenance import (
    CONFIG_FILE,
    check_agreement,
    check_data,
    check_model,
    check_settings,
    is_same_model,
    needs_base,
    place_of,
    provenance,
    read_started,
    with_places,
)
from .signals import Interrupts
from .state import TrainState, init_state, split_params, with_ema
from .step import build_step
from .tokenizer import run_tokenizer
from .trainable import Frozen, TrainableSpec, with_labels
from .watchdog import Watchdog


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
      given: the configuration as it was given; in `run`, files that moved are where they are now.
      started: the record of the run's newest checkpoint; None if it has none.
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
    given: RunConfig
    started: StepMetadata | None

    @functools.cached_property
    def base(self) -> str | None:
        """The fingerprint of the frozen or reference weights; None if the run has none or they are random."""
        run, is_reference = self.run, self.run.train.objective == "dpo" or self.run.runs_reference
        if not run.model.init_from or not (is_reference or self.trainable_spec.adapter is not None):
            return None
        place = place_of(self.given, self.run_dir, self.started, "model.init_from")
        if place is None and self.started is not None:  # a run of all weights reads them no more
            return self.started.run.get("base")
        return base_fingerprint(run)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """What is recorded in checkpoints, and compared when the run is resumed."""
        return provenance(
            self.given,
            self.run_dir,
            self.started,
            data=self.data.fingerprint,
            model=self.model,
            spec=self.trainable_spec,
            base=self.base,
            base_model=self.run.model.init_from,
        )

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
      LlamaJaxError: with a one-line message for bad input, and for files that cannot be read or written. Of
        several processes every one prints it and exits.
    """
    clock = Clock()
    _check_wandb(run)
    start_jax(run.mesh, run.distributed)  # JAX installs a SIGTERM handler there, which Interrupts replaces
    agreement = Agreement.of_run()
    watchdog = Watchdog(clock, run.distributed, run_directory(run.train.run_dir))
    with (
        Interrupts(agreement) as interrupts,
        contextlib.ExitStack() as stack,
        end_together(stack.close, agreement, watchdog),
    ):
        setup = _set_up(run, stack)
        checkpoints = stack.enter_context(
            Checkpoints(
                setup.run_dir, run.checkpoint, model=setup.model, run=setup.provenance, warn=setup.log
            )
        )
        stack.enter_context(use_mesh(setup.mesh))
        run = setup.run
        step, abstract, *rest = build_step(run, setup.model, setup.mesh, setup.platform, setup.trainable_spec)
        with clock.spend("checkpoint"):
            restored = _restore(setup, checkpoints, abstract)
        state, frozen = _initialize(setup, restored, has_frozen=rest[1] is not None)
        start_step = 0 if restored is None else restored.step
        if setup.is_primary:
            write_atomically(setup.run_dir / CONFIG_FILE, to_toml(setup.given))
        log_run(run, setup.model, setup.data, setup.mesh, setup.log)
        log_adapter(run, state.params, frozen, setup.log)
        if start_step >= run.train.steps:
            export_adapter(run, setup.run_dir, setup.model, setup.trainable_spec, state.params, start_step)
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
        with terminal.spinner("compiling the step ..."), clock.spend("compile"):
            compiled = gpu.compile_step(step.lower(abstract, *rest), setup.model)
            agreement.meet("compiled")
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
            clock=clock,
            goodput=stack.enter_context(
                GoodputRecords(setup.run_dir, clock, first=start_step, is_primary=setup.is_primary)
            ),
            evaluate=make_eval_fn(run, model, platform, data, setup.feed, spec, frozen, log=setup.log),
            sample=make_sample_fn(run, model, platform, setup.tokenizer, spec, frozen),
            find_nonfinite=make_find_nonfinite(run, model, platform, spec, frozen),
            flops_per_token=flops_by_attention(
                model, run.train.seq_len, frozen=spec.adapter is not None, reference=spec.reference
            ),
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
            pairs = run.train.objective in PAIR_OBJECTIVES
            show_batch(next(batches), tokenizer, terminal.console(), pairs=pairs)
    log_examples(data, terminal.note)


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
    gpu.note_unused_gpu(log)
    mesh = run_mesh(run.mesh)
    feed = Feed.for_mesh(mesh, run.train.global_batch_size, run.train.seq_len)
    run_dir = run_directory(run.train.run_dir)
    if is_primary:
        stack.enter_context(run_lock(run_dir, warn=log))
        stack.enter_context(discarded_unless_begun(run_dir))
    check_agreement(run)
    started, given = read_started(run_dir), run
    check_settings(given, run_dir, started)
    run = with_places(given, run_dir, started)
    if started is None and not run.model.init_from:
        check_context(run, run.model.build())  # before a vocabulary is trained
    tokenizer = run_tokenizer(run, run_dir, started)
    unread_base = bool(run.model.init_from) and not needs_base(run)
    if started is not None and unread_base and is_same_model(given, started):
        model = with_labels(run, started.config)
        model = model.replace(vocab_size=run.model.vocab_size or model.vocab_size)
    else:
        model = model_config(run, tokenizer)
    if started is None:
        check_context(run, model)
    check_model(given, model, run_dir, started)
    tokenizer = fit_vocabulary(tokenizer, model.vocab_size)
    platform = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform
    trainable_spec = TrainableSpec.from_config(run, platform, head_outputs=len(model.labels))
    if mesh is not None:
        check_mesh(model, mesh)
    device = jax.local_devices()[0]
    check_quantization(run.train, device.device_kind, has_fp8=has_fp8(device))
    run = resolve_attention(run, model, mesh, device, log)
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
        given=given,
        started=started,
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
        peers=Peers(jax.process_index(), jax.process_count(), gather_bytes),
    )


def _restore(setup: Setup, checkpoints: Checkpoints, abstract: TrainState) -> Restored | None:
    """The newest intact checkpoint; where the optimizer's settings allow it, its state as they are now."""
    if setup.started is None:
        return checkpoints.restore(abstract)
    check_data(setup.given, setup.provenance, setup.run_dir, setup.started, setup.data.is_of)
    optimizer = setup.run.optimizer
    saved = setup.started.run.get("settings", {})
    had_ema = saved.get("optimizer.ema_decay", optimizer.ema_decay) > 0
    refrozen = saved.get("optimizer.freeze", list(optimizer.freeze)) != list(optimizer.freeze)
    restored = checkpoints.restore(
        with_ema(abstract, had_ema), lambda name: refrozen and name.startswith("opt_state.")
    )
    if restored is None:
        return None
    return dataclasses.replace(restored, state=with_ema(restored.state, optimizer.ema_decay > 0))


def _initialize(setup: Setup, restored: Restored | None, *, has_frozen: bool) -> tuple[TrainState, Frozen]:
    """The state, new or from a checkpoint, and the frozen parameters, which no checkpoint stores."""
    run = setup.run
    if restored is None:
        optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
        params = setup.load_pretrained()
        return init_state(setup.model, optimizer, run.train.seed, params, setup.trainable_spec)
    frozen = setup.split_initial_params()[1] if has_frozen else None
    setup.log(f"resuming {setup.run_dir} after step {restored.step}")
    return restored.state, frozen


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
        base=setup.base,
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
        log_goodput(loop.goodput, loop.report.log)
        saved = f"saved after step {loop.steps_done}" if loop.steps_done else "stopped before the first step"
        loop.report.log(f"{saved}; run the same command again to resume")
        return
    params, step = loop.state.params, loop.steps_done
    export_adapter(setup.run, setup.run_dir, setup.model, setup.trainable_spec, params, step)
    if setup.is_primary:
        log_best_step(setup.run_dir, loop.report.log)
        log_results(setup.run, setup.run_dir, data, loop.report.log)
        log_goodput(loop.goodput, loop.report.log)
