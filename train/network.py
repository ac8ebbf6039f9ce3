"""A model beside the one that is trained: parameters with their static configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from llama_jax import LlamaConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """A model of any architecture, as a pytree that a step may take.

    Attributes:
      params: its parameters.
      config: its configuration, static.
    """

    params: Any
    config: LlamaConfig = dataclasses.field(metadata={"static": True})
