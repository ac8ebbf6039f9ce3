"""The grammars of a batcher's rows, stacked in arrays whose sizes rarely change: each compiles programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax
import numpy as np

from llama_jax.decoding.constraints import FREE, Constraint, Grammar, stack

# Grammars, states and classes that there is room for at first: most JSON schemas fit.
_ROOM = (4, 512, 256)


class GrammarTables:
    """Places for grammars, of which those that no row uses are given to others."""

    def __init__(self, batch_size: int) -> None:
        """There are none; `batch_size` is B."""
        self._batch_size = batch_size
        self._grammars: list[Grammar] = []
        self._room: tuple[int, ...] = _ROOM

    def place(
        self, grammar: Grammar, constraint: Constraint | None, used: Collection[Grammar]
    ) -> tuple[int, Constraint]:
        """Finds or makes a place for a grammar.

        Args:
          grammar: of a request that joins.
          constraint: of the rows; None if no row has had a grammar lately.
          used: the grammars of the other rows.

        Returns:
          The place, and the constraint with the grammar there. The arrays are new only if it was not there.
        """
        places = {id(one): place for place, one in enumerate(self._grammars)}
        if id(grammar) in places and constraint is not None:
            return places[id(grammar)], constraint
        kept = {id(one) for one in used}
        place = places.get(id(grammar))
        if place is None:
            unused = (number for number, one in enumerate(self._grammars) if id(one) not in kept)
            place = next(unused, len(self._grammars))
            self._grammars[place : place + 1] = [grammar]
        none = np.zeros(0)
        room = Grammar(none, np.broadcast_to(np.int32(0), self._room), none, none)
        stacked = stack(self._grammars, at_least=room)
        self._room = np.shape(stacked.transitions)
        arrays = jax.tree.map(jax.device_put, stacked)
        if constraint is not None:
            return place, dataclasses.replace(constraint, grammars=arrays)
        rows = np.zeros(self._batch_size, np.int32)
        return place, Constraint(
            grammars=arrays, index=jax.device_put(rows + np.int32(FREE)), state=jax.device_put(rows)
        )
