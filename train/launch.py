"""From a configuration to a finished run: devices, tokenizer, data, state, compiled step; then the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from llama_jax.console import terminal
from llama_jax.console.loading import init_jax
from llama_jax.errors import InputError
from llama_jax.plan.flops import flops_by_attention
from llama_jax.sharding import check_mesh, use_mesh
from llama_jax.storage.atomic import write_atomically
from llama_jax.tokenizer.fit import fit_vocabulary

from . import gpu
from .checkpoints.checkpoints import Checkpoints, Restored
from .checkpoints.lock import run_directory, run_lock
from .config.read import to_toml
from .config.run import RunConfig
from .coordination import Agreement
from .data import Batches, Data
from .devices import check_quantization, compute_dtype, has_fp8, resolve_attention, run_mesh, start_jax
from .export import export_adapter
from .failed_start import discarded_unless_begun
from .feed import Feed
from .initialization import check_context, model_config
from .loop import EVAL_LOSSES, Loop
from .metrics.clock import Clock, GoodputRecords
from .metrics.evaluate import make_eval_fn, make_sample_fn
from .metrics.peak_flops import peak_flops
from .metrics.report import Report
from .metrics.run_log import log_adapter, log_best_step, log_goodput, log_results, log_run
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
    read_started,
    with_places,
)
from .restoring import restore_state
from .rl.prompts import PromptData
from .rl.reward_models import RewardModels
from .rl.rewards import Rewards
from .rl.rollouts import Rollouts
from .rl.student import rollouts_of
from .setup import Setup, open_run_data
from .signals import Interrupts
from .state import TrainState, init_state, residual_parts, with_residual
from .step import build_step
from .teacher import check_teacher, load_teacher, teacher_config
from .tokenizer import run_tokenizer
from .trainable import VALUE, Frozen, TrainableSpec, with_labels
from .value_model import check_value, value_config
from .watchdog import Watchdog


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
        rewards = _start_rewards(setup, stack)
        checkpoints = stack.enter_context(
            Checkpoints(
                setup.run_dir, run.checkpoint, model=setup.model, run=setup.provenance, warn=setup.log
            )
        )
        stack.enter_context(use_mesh(setup.mesh))
        run = setup.run
        step, abstract, *rest = build_step(
            run, setup.model, setup.mesh, setup.platform, setup.trainable_spec, setup.teacher
        )
        with clock.spend("checkpoint"):
            restored = _restore(setup, checkpoints, abstract)
        state, frozen = _initialize(
            setup, restored, has_frozen=bool({"base", "reference", VALUE} & {*(rest[1] or ())})
        )
        state = with_residual(state, residual_parts(abstract), setup.mesh)
        start_step = 0 if restored is None else restored.step
        if setup.is_primary:
            write_atomically(setup.run_dir / CONFIG_FILE, to_toml(setup.given))
        log_run(run, setup.model, setup.data, setup.mesh, setup.log, setup.teacher)
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
        batches: Batches | Rollouts
        evaluate: Callable[[Any], dict[str, float]]
        loop: Loop
        report = lambda: loop.report  # noqa: E731  # which shows no progress before the step is compiled
        if isinstance(data, PromptData):
            batches = rollouts_of(run)(
                run,
                setup.model,
                setup.platform,
                setup.tokenizer,
                setup.feed,
                data,
                setup.trainable_spec,
                frozen,
                rewards,
                RewardModels(
                    run.rl,
                    setup.log,
                    dtype=compute_dtype(run.train, setup.platform).name,
                    template=run.data.template,
                    mesh=setup.mesh,
                ),
                log=lambda text: report().log(text),
                write=lambda samples: report().samples([sample.as_json() for sample in samples]),
            )
            evaluate = batches.evaluate
        else:
            batches = data.train()
            args = (run, setup.model, setup.platform, data, setup.feed, setup.trainable_spec, frozen)
            evaluate = make_eval_fn(*args, log=setup.log)
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
            evaluate=evaluate,
            sample=make_sample_fn(run, model, platform, setup.tokenizer, spec, frozen),
            find_nonfinite=make_find_nonfinite(run, model, platform, spec, frozen),
            flops_per_token=flops_by_attention(
                model,
                run.train.seq_len,
                frozen=spec.adapter is not None,
                reference=run.runs_reference,
                teacher=setup.teacher,
                value_model=spec.value_model,
            ),
            peak_flops=peak_flops(compute_dtype(run.train, platform)),
            eval_losses=[] if restored is None else list(restored.data_states[0].get(EVAL_LOSSES, [])),
        )
        stopped = loop.train()
        _finish(setup, data, loop, stopped)
        return stopped


def _check_wandb(run: RunConfig) -> None:
    if run.log.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"log.wandb is {run.log.wandb!r} and wandb is not installed: pip install 'llama-jax[wandb]'"
        )


def _start_rewards(setup: Setup, stack: contextlib.ExitStack) -> Rewards | None:
    """Starts the reward functions, in process 0 of a run that has any."""
    if not (setup.run.samples and setup.run.rl.rewards) or not setup.is_primary:
        return None
    return stack.enter_context(Rewards(setup.run.rl, setup.log))


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
    if (teacher := teacher_config(run)) is not None:
        check_teacher(run, teacher, model, tokenizer)
    tokenizer = fit_vocabulary(tokenizer, model.vocab_size)
    platform = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform
    if (value_model := value_config(run)) is not None:
        check_value(run, value_model, model)
    trainable_spec = TrainableSpec.from_config(run, platform, len(model.labels), value_model)
    device = jax.local_devices()[0]
    check_quantization(run.train, device.device_kind, has_fp8=has_fp8(device))
    configs = tuple(config for config in (model, teacher, value_model) if config is not None)
    if mesh is not None:
        for config in configs:
            check_mesh(config, mesh)
    resolved = [resolve_attention(run, config, mesh, device, log) for config in configs]
    # Of all models; blockwise if one of them needs that.
    run = min(resolved, key=lambda run: run.train.attention != "blockwise")
    return Setup(
        run=run,
        run_dir=run_dir,
        platform=platform,
        mesh=mesh,
        feed=feed,
        tokenizer=tokenizer,
        model=model,
        trainable_spec=trainable_spec,
        teacher=teacher,
        data=open_run_data(run, tokenizer, shard=feed.shard, num_shards=feed.num_shards),
        is_primary=is_primary,
        log=log,
        given=given,
        started=started,
    )


def _restore(setup: Setup, checkpoints: Checkpoints, abstract: TrainState) -> Restored | None:
    """`restore_state`, once it is clear that the run's data are the same."""
    if setup.started is not None:
        check_data(setup.given, setup.provenance, setup.run_dir, setup.started, setup.data.is_of)
    return restore_state(checkpoints, abstract, setup.run.optimizer, setup.mesh, setup.started)


def _initialize(setup: Setup, restored: Restored | None, *, has_frozen: bool) -> tuple[TrainState, Frozen]:
    """The state, new or from a checkpoint, and the frozen parameters, which no checkpoint stores."""
    run = setup.run
    if restored is None:
        optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
        params = setup.load_pretrained()
        state, frozen = init_state(setup.model, optimizer, run.train.seed, params, setup.trainable_spec)
        return state, _with_teacher(setup, setup.with_reference(frozen))
    frozen = setup.with_reference(setup.split_initial_params()[1]) if has_frozen else None
    setup.log(f"resuming {setup.run_dir} after step {restored.step}")
    return restored.state, _with_teacher(setup, frozen)


def _with_teacher(setup: Setup, frozen: Frozen) -> Frozen:
    """The frozen parameters, with the teacher if there is one."""
    if setup.teacher is None:
        return frozen
    return {**(frozen or {}), "teacher": load_teacher(setup.run, setup.mesh, setup.platform)}


def _with_reference_logprobs(
    setup: Setup, state: TrainState, frozen: Frozen, restored: Restored | None, interrupts: Interrupts
) -> Data | PromptData | None:
    """The data, with precomputed reference log-probabilities if they are configured; None if stopped."""
    data = setup.data
    if isinstance(data, PromptData) or not setup.run.preference.precompute_ref_log_probs:
        return data

    def initial_params() -> Any:
        if restored is None or frozen is not None:
            return setup.trainable_spec.initial_params(state.params, frozen)
        return setup.split_initial_params()[0]

    logprobs = reference_logprobs(
        setup.run,
        setup.run_dir,
        setup.model,
        setup.platform,
        data,
        setup.feed,
        setup.trainable_spec,
        base=setup.base,
        initial_params=initial_params,
        stop=interrupts.agreed_stop,
        log=setup.log,
    )
    return None if logprobs is None else data.with_reference(logprobs)


def _make_report(setup: Setup, start_step: int) -> Report:
    return Report(
        setup.run_dir,
        setup.run.log,
        total_steps=setup.run.train.steps,
        start_step=start_step,
        is_primary=setup.is_primary,
        settings=dataclasses.asdict(setup.run),
        has_samples=setup.run.samples,
    )


def _finish(setup: Setup, data: Data | PromptData, loop: Loop, stopped: int) -> None:
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
