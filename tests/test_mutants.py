"""The list of mutants keeps up with the code: `python -m tests.mutants` runs them."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutants import MUTANTS

ROOT = Path(__file__).parents[1]


def test_every_mutant_can_be_applied():
    for mutant in MUTANTS:
        assert (ROOT / mutant.path).read_text().count(mutant.before) == 1, mutant.name
        assert mutant.before != mutant.after
        assert all((ROOT / test.partition("::")[0]).exists() for test in mutant.tests), mutant.name


def test_mutants_are_named_once_and_touch_every_room():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    rooms = {str(Path(mutant.path).parent) for mutant in MUTANTS}
    library = ("adapters", "decoding", "hub", "ops", "plan", "text", "tokenizer", "weights", "console")
    assert rooms >= {"llama_jax", *(f"llama_jax/{room}" for room in library)}
    assert rooms >= {"train", "train/data", "train/metrics", "train/objectives"}
