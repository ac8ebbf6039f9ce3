"""Searches for the fastest settings of a step: pruned by arithmetic, the best few compiled."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, get_args

from llama_jax import LlamaConfig
from llama_jax.errors import ConfigError, InputError
from llama_jax.ops.compiler_flags import LIBTPU_FLAGS
from llama_jax.ops.remat import Remat
from llama_jax.plan.candidates import Candidate, Ranking, rank
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import OFFLOADED, SAVED
from llama_jax.plan.result import StepPlan
from llama_jax.plan.topology import Topology

from ..config.read import to_toml
from ..config.run import RunConfig
from .compiling import plan_compiled
from .errors import CompilerMissing
from .inputs import SCOPED_VMEM, step_inputs

TIMEOUT = 1200.0  # seconds
RAISED_VMEM = "98304"  # KiB: docs/planning_arithmetic.md
# Memory that a compile of a large model may take; two run at once where there is room for both.
_COMPILE_BYTES = 6e9
_REFUSALS = 3  # as many candidates more than `top` are compiled at most: others have been refused
_MARGIN = 1.04  # of memory, by which the arithmetic may be wrong: within it the compiler decides
_HOPELESS = 1.15  # of memory: beyond it the configuration given is not compiled

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was compiled, or that the compiler refused.

    Attributes:
      run: the run's configuration with the candidate's settings.
      candidate: its settings, and its plan by arithmetic.
      compiled: its plan by the compiler; None if there is none.
      reason: why not.
      flags: of the compiler, beside those that every run sets.
    """

    run: RunConfig
    candidate: Candidate
    compiled: StepPlan | None = None
    reason: str = ""
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def plan(self) -> StepPlan:
        """The compiler's plan, or that of the arithmetic."""
        return self.candidate.plan if self.compiled is None else self.compiled


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
      best: the fastest that fits, compiled if there is a compiler; None if nothing fits.
      tried: those that were compiled or refused, the fastest first, the refused last.
      given: the configuration that the search began with, if it was compiled too.
      ranking: of all candidates, by arithmetic.
      seconds: that the search took.
      notes: what a reader must know, a sentence each.
    """

    best: Tried | None
    tried: tuple[Tried, ...]
    given: Tried | None
    ranking: Ranking
    seconds: float
    notes: tuple[str, ...] = ()

    def toml(self, today: datetime.date | None = None) -> str:
        """The best settings as a run's TOML, with what was predicted, by what and when, as comments.

        Raises:
          InputError: if nothing fits.
        """
        if self.best is None:
            raise InputError("no candidate fits; there is no configuration to write")
        plan, today = self.best.plan, today or datetime.date.today()
        versions = ", ".join(f"{name} {_version(name)}" for name in ("jax", "libtpu"))
        lines = [
            f"Found by llama-jax plan --search on {today} for {plan.topology} ({versions}).",
            f"Predicted ({plan.source}): {plan.step_seconds:.2f} s a step, MFU {plan.mfu:.1%}, "
            f"{plan.memory.peak / 1e9:.1f} GB of {plan.memory.capacity / 1e9:.1f} GB a chip.",
            *(f"Set LIBTPU_INIT_ARGS=--{name}={value}" for name, value in self.best.flags.items()),
        ]
        return "".join(f"# {line}\n" for line in lines) + "\n" + to_toml(self.best.run)


def search(
    run: RunConfig,
    model: LlamaConfig,
    topology: Topology,
    *,
    top: int = 3,
    timeout: float | None = None,
    compiled: bool = True,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> SearchResult:
    """Finds the mesh, remat policy, microbatches and compiler flags with the shortest predicted step.

    Everything that divides is planned by arithmetic; the fastest `top` that fit are compiled, and so is the
    configuration given, if it may fit, so that the best is at least as good. A candidate that the compiler
    refuses, most often for its memory, makes room for the next. Model, global batch and length stay.

    Args:
      run: the run's configuration.
      model: the model that it trains.
      topology: the slices to search for.
      top: candidates to compile.
      timeout: seconds for all of it; None for `TIMEOUT`. What is compiled by then counts.
      compiled: whether to compile at all; without, or without libtpu, the arithmetic decides.
      use_cache: whether answers of earlier compiles are used.
      progress: called with a line of text at each step.

    Raises:
      ConfigError: if nothing divides, or the slices are of an unknown chip.
    """
    start = time.monotonic()
    deadline = start + (TIMEOUT if timeout is None else timeout)
    tell = progress or (lambda _: None)
    tell("planning every mesh, remat policy and number of microbatches by arithmetic")
    default = int(LIBTPU_FLAGS.get(topology.kind, {}).get(SCOPED_VMEM, 0))
    given = _given(run, model, topology)
    ranking = rank(
        _seed(run, model, topology) if given is None else given.candidate.inputs,
        remats=[name for name in get_args(Remat) if name in SAVED and name not in OFFLOADED],
        scoped_vmem_kib=sorted({default, int(RAISED_VMEM)}),
        capacity=CHIPS[topology.kind].hbm_bytes * _MARGIN,
    )
    if not ranking.considered:
        raise ConfigError(
            f"no mesh of the {topology.chips} chips of {topology.name} divides both a global batch of "
            f"{run.train.global_batch_size} and the model; change train.global_batch_size"
        )
    found = [_apply(run, candidate, default) for candidate in ranking.fastest]
    tell(
        f"{ranking.considered} candidates, {ranking.too_large} too large; the fastest: "
        + (found[0].candidate.name if found else "none fits")
    )
    notes = ["Offloaded remat policies are not searched: the time of their copies is not modelled."]
    tried: list[Tried] = []

    def plan_one(one: Tried) -> StepPlan:
        left = max(deadline - time.monotonic(), 1.0)
        return plan_compiled(
            one.run, model, topology, compiler_flags=one.flags, timeout=left, use_cache=use_cache
        )

    if compiled and found:
        try:
            tried, given = _compile(found, given, top, plan_one, deadline, tell)
        except CompilerMissing as error:
            notes.append(f"{error}; ranked by arithmetic alone.")
    good = sorted((one for one in tried if one.compiled), key=lambda one: one.plan.step_seconds)
    best: Tried | None = good[0] if good else None
    if given is not None and given.compiled and (best is None or _is_faster(given, best)):
        best = given
    if best is None and not tried:
        best = next((one for one in found if one.plan.memory.fits), None)
    if tried and not good:
        notes.append("The compiler refused every candidate that it was given in the time that there was.")
    refused = [one for one in tried if not one.compiled]
    return SearchResult(best, (*good, *refused), given, ranking, time.monotonic() - start, tuple(notes))


def _is_faster(one: Tried, other: Tried) -> bool:
    return one.plan.memory.fits and one.plan.step_seconds < other.plan.step_seconds


def _given(run: RunConfig, model: LlamaConfig, topology: Topology) -> Tried | None:
    """The configuration as it is; None where it does not fit the slices."""
    from llama_jax.plan.estimate import estimate

    try:
        inputs = step_inputs(run, model, topology)
    except ConfigError:
        return None
    return Tried(run, Candidate(inputs, estimate(inputs)))


def _seed(run: RunConfig, model: LlamaConfig, topology: Topology) -> StepInputs:
    """Inputs to vary, of a run whose own mesh or microbatches do not divide.

    Raises:
      ConfigError: if no mesh does.
    """
    train = dataclasses.replace(run.train, gradient_accumulation_steps=1)
    sizes = [size for size in range(1, topology.chips + 1) if topology.chips % size == 0]
    for fsdp in reversed(sizes):
        for data in (size for size in sizes if (topology.chips // fsdp) % size == 0):
            for tensor in (size for size in sizes if (topology.chips // fsdp // data) % size == 0):
                context = topology.chips // (fsdp * data * tensor)
                mesh = dataclasses.replace(
                    run.mesh, slices=topology.slices, data=data, fsdp=fsdp, context=context, tensor=tensor
                )
                try:
                    return step_inputs(dataclasses.replace(run, train=train, mesh=mesh), model, topology)
                except ConfigError:
                    continue
    raise ConfigError(
        f"no mesh of the {topology.chips} chips of {topology.name} divides both a global batch of "
        f"{run.train.global_batch_size} and the model; change train.global_batch_size"
    )


def _apply(run: RunConfig, candidate: Candidate, default_vmem: int) -> Tried:
    """The run with a candidate's settings, for its slices."""
    inputs = candidate.inputs
    remat = next(name for name in get_args(Remat) if name == inputs.remat)
    train = dataclasses.replace(run.train, remat=remat, gradient_accumulation_steps=inputs.accumulation)
    one_slice = dataclasses.replace(inputs.topology, slices=1).name
    sizes: dict[str, Any] = dict(inputs.mesh)
    mesh = dataclasses.replace(run.mesh, **sizes, slices=inputs.topology.slices, topology=one_slice)
    changed = inputs.scoped_vmem_kib != default_vmem
    flags = {SCOPED_VMEM: str(inputs.scoped_vmem_kib)} if changed else {}
    return Tried(dataclasses.replace(run, train=train, mesh=mesh), candidate, flags=flags)


def _compile(
    found: list[Tried],
    given: Tried | None,
    top: int,
    plan_one: Callable[[Tried], StepPlan],
    deadline: float,
    tell: Progress,
) -> tuple[list[Tried], Tried | None]:
    """Compiles the fastest until `top` are, the compiler has refused too many, or the time is over.

    Args:
      found: candidates, the fastest first.
      given: compiled too, as the second; None if there is none.
      top: how many to compile.
      plan_one: compiles one.
      deadline: of `time.monotonic`, after which none is started.
      tell: told what is done.

    Returns:
      Those of `found` that were compiled or refused, and `given` with its plan.

    Raises:
      CompilerMissing: without libtpu.
    """
    answers: queue.SimpleQueue[tuple[Tried, StepPlan | BaseException]] = queue.SimpleQueue()

    def work(one: Tried) -> None:
        try:
            answers.put((one, plan_one(one)))
        except BaseException as error:  # raised again by the main thread
            answers.put((one, error))

    pending = found[: top + _REFUSALS]
    extra = [given] if given is not None and _is_worth_compiling(given, found[:top]) else []
    workers, running, tried, answer = _workers(), list[Tried](), list[Tried](), given
    while True:
        while len(running) < workers and time.monotonic() < deadline:
            wanted = sum(one.compiled is not None for one in tried) + sum(o is not given for o in running)
            if extra and (tried or running):
                one = extra.pop()
            elif pending and wanted < top:
                one = pending.pop(0)
            else:
                break
            tell(f"compiling {one.candidate.name}")
            running.append(one)
            threading.Thread(target=work, args=(one,), daemon=True).start()  # ends where this process does
        if not running:
            return tried, answer
        one, plan = answers.get()
        running.remove(one)
        if isinstance(plan, CompilerMissing) or not isinstance(plan, StepPlan | InputError | ConfigError):
            raise plan
        is_plan = isinstance(plan, StepPlan)
        done = dataclasses.replace(one, **({"compiled": plan} if is_plan else {"reason": str(plan)}))
        tell(_line(done))
        if one is given:
            answer = done
        else:
            tried.append(done)


def _line(one: Tried) -> str:
    """What came of a compile."""
    if one.compiled is None:
        return f"refused: {one.candidate.name}: {one.reason}"
    plan = one.compiled
    return f"{plan.step_seconds:.2f} s, {plan.memory.peak / 1e9:.1f} GB a chip: {one.candidate.name}"


def _is_worth_compiling(given: Tried, found: list[Tried]) -> bool:
    """Whether the configuration given may fit, and is none of the candidates."""
    memory = given.candidate.plan.memory
    if memory.peak > _HOPELESS * memory.capacity:
        return False
    return all(given.candidate.inputs != one.candidate.inputs for one in found)


def _workers() -> int:
    """How many compiles run at once: two, where processors and memory allow."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1
    return 2 if (os.cpu_count() or 1) >= 2 and free > 2 * _COMPILE_BYTES else 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"
