"""A refactoring does not change the compiled programs: fingerprints equal those in tests/golden/programs.

If a change is intended, `python -m benchmarks.program_fingerprint --renew NAME` stores the new fingerprint,
and its diff is part of the commit.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import fingerprints, program_fingerprint
from benchmarks.programs import PROGRAMS
from tests.optimized import optimized

ROOT = Path(__file__).parents[1]
ON_TPU = [name for name, program in PROGRAMS.items() if program.platform == "tpu"]
F32 = jnp.float32


def on_cpu(stage: str) -> list[Any]:
    """The names of a CPU's programs; slow tests but for those that are quick to look at."""
    return [
        pytest.param(name, marks=() if stage in program.quick else pytest.mark.slow)
        for name, program in PROGRAMS.items()
        if program.platform == "cpu"
    ]


def check(name: str, stage: str, table: fingerprints.Fingerprint) -> None:
    """Fails with the rows that changed; skips where no fingerprint is kept for what runs here."""
    of = PROGRAMS[name].platform
    if why := program_fingerprint.absent(name, of, stage):
        pytest.skip(why)
    text = program_fingerprint.changes(name, of, stage, table)
    assert not text, text


@functools.cache
def lowered(name: str) -> Any:
    """The program as JAX hands it to XLA; made once for both stages."""
    return PROGRAMS[name].lower()


@pytest.mark.parametrize("name", on_cpu("lowered"))
def test_jax_lowers_the_same_program(name: str) -> None:
    check(name, "lowered", fingerprints.of_lowered(lowered(name)))


@pytest.mark.parametrize("name", on_cpu("optimised"))
def test_xla_compiles_it_to_the_same(name: str) -> None:
    """In this process: the suite's other flags and its 8 devices do not change the HLO of one device."""
    check(name, "optimised", fingerprints.of_compiled(optimized(lowered(name))))


@pytest.mark.pods
@pytest.mark.parametrize("name", ON_TPU)
def test_the_tpu_compiler_compiles_it_to_the_same(name: str) -> None:
    command = [sys.executable, "-m", "benchmarks.program_fingerprint", "--json", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)[name]
    # 3% above what was measured, also where a renewed fingerprint is the same again.
    assert stages["optimised"]["whole"]["estimated_cycles"] <= 3.88e9
    assert stages["optimised"]["memory"]["peak_memory"] < 85e9
    for stage, table in stages.items():
        check(name, stage, table)


def both(
    function: Any, *shapes: tuple[int, ...]
) -> tuple[fingerprints.Fingerprint, fingerprints.Fingerprint]:
    """Fingerprints of both stages of a function of f32 arrays."""
    made = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, F32) for shape in shapes))
    return fingerprints.of_lowered(made), fingerprints.of_compiled(optimized(made))


def changed(before: Any, after: Any) -> list[list[str]]:
    """The rows of each stage that differ between two programs."""
    return [fingerprints.differences(*pair) for pair in zip(before, after, strict=True)]


def test_what_is_stored_names_every_program() -> None:
    assert sorted(path.stem for path in program_fingerprint.FOLDER.glob("*.json")) == sorted(PROGRAMS)


def decode(cache: jax.Array, token: jax.Array, *, copied: bool) -> jax.Array:
    """A loop that writes a token's keys into its cache and reads them all; or reads the cache as it was."""

    def turn(t: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        old, token = state
        cache = jax.lax.dynamic_update_slice(old, token[None], (t, 0))
        read = old if copied else cache
        return cache, jnp.tanh(token + jnp.sin(token @ read.T) @ read)

    return jax.lax.fori_loop(0, 8, turn, (cache, token))[1]


def test_a_copy_of_the_cache_in_the_loop_is_seen() -> None:
    shapes = ((16, 4), (4,))
    plain, copied = (both(functools.partial(decode, copied=c), *shapes) for c in (False, True))
    as_lowered, as_compiled = changed(plain, copied)
    assert as_lowered == []  # which is why both stages are compared
    assert any(row.startswith("ops: copy: ") for row in as_compiled), as_compiled


def test_a_weight_stored_the_other_way_round_is_seen() -> None:
    plain = both(lambda x, w: x @ w, (8, 64), (64, 32))
    turned = both(lambda x, w: jnp.einsum("bd,fd->bf", x, w), (8, 64), (32, 64))
    as_lowered, as_compiled = changed(plain, turned)
    assert "products: f32[8,64] f32[64,32] contracting 1 x 0: 1 -> 0" in as_lowered
    assert any(row.startswith("arguments: f32[32,64]{1,0}: 0 -> 1") for row in as_compiled)


def test_another_spelling_of_a_reshape_is_the_same_program() -> None:
    plain = both(lambda x: jnp.reshape(x, (8, 4, 16)) * 2, (8, 64))
    assert changed(plain, both(lambda y: 2 * y.reshape(y.shape[0], -1, 16), (8, 64))) == [[], []]
    inner = jax.jit(lambda z: z.reshape(8, 4, 16))  # a function of its own in the text
    assert changed(plain, both(lambda x: inner(x) * 2, (8, 64))) == [[], []]
    twice, _ = changed(plain, both(lambda x: x.reshape(512).reshape(8, 4, 16) * 2, (8, 64)))
    assert twice == ["ops: reshape: 1 -> 2"]


def test_a_difference_is_told_by_row_with_the_command_that_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_fingerprint, "FOLDER", tmp_path)
    assert "no fingerprint is stored for toy" in str(program_fingerprint.absent("toy", "cpu", "lowered"))
    stages = {"lowered": {"ops": {"add": 1, "mul": 2}}, "optimised": {"ops": {"copy": 1}}}
    program_fingerprint.keep("toy", "a toy", "cpu", stages)
    assert program_fingerprint.absent("toy", "cpu", "optimised") is None
    assert program_fingerprint.changes("toy", "cpu", "lowered", stages["lowered"]) == ""
    text = program_fingerprint.changes("toy", "cpu", "lowered", {"ops": {"add": 3, "sub": 1, "mul": 2}})
    assert "  ops: add: 1 -> 3\n  ops: sub: 0 -> 1\n" in text
    assert text.endswith("python -m benchmarks.program_fingerprint --renew toy")


def test_the_hlo_of_another_processor_is_kept_while_the_lowered_program_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_fingerprint, "FOLDER", tmp_path)
    stages = {"lowered": {"ops": {"add": 1}}, "optimised": {"ops": {"copy": 1}}}
    program_fingerprint.keep("toy", "a toy", "cpu", stages)
    monkeypatch.setattr(program_fingerprint, "features", lambda of: "another")
    why = program_fingerprint.absent("toy", "cpu", "optimised")
    assert why is not None and "no fingerprint is stored for toy's HLO on another" in why
    assert program_fingerprint.absent("toy", "cpu", "lowered") is None
    program_fingerprint.keep("toy", "a toy", "cpu", stages)
    (kept,) = program_fingerprint.stored("toy")["fingerprints"].values()
    assert len(kept["optimised"]) == 2
    program_fingerprint.keep("toy", "a toy", "cpu", stages | {"lowered": {"ops": {"add": 2}}})
    (kept,) = program_fingerprint.stored("toy")["fingerprints"].values()
    assert list(kept["optimised"]) == ["another"]
