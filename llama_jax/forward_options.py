"""How a forward pass is computed: dtype, attention backend, rematerialization, backward passes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp

from llama_jax.attention import Backend
from llama_jax.errors import ConfigError
from llama_jax.ops.remat import Remat


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How a forward pass is computed, apart from the model.

    Hashable and static under `jit`: equal options share one compiled program.

    Attributes:
      dtype: the compute dtype; None is the dtype of the parameters. Norms, rotary angles, softmax, logits and
        accumulation are f32 in any case.
      attention_backend: `xla`, `blockwise`, `splash` or `cudnn`; see `attention.attention`.
      remat: what the backward pass of a layer keeps from its forward pass, which saves memory with stacked
        layers. `none`: everything, nothing is recomputed. `save_dots`: the outputs of all matrix products and
        of attention. `save_projections`: the same but for v and the sum after attention.
        `save_dots_except_mlp`: the outputs of the products in attention, and the sum after it. `attention`:
        the output of attention. `full`: only the input of the layer. `offload`: as `save_projections`, in
        host memory.
      custom_vjp: use the custom backward passes of `ops`, which compute in the compute dtype with f32
        accumulation, as the trainer does. They have no forward-mode derivative (`jax.jvp`).
      expert_capacity: the most tokens that an expert takes, as a multiple of the mean (`ops.experts`); others
        are dropped. None drops none.

    Raises:
      ConfigError: for an unknown backend, remat policy or dtype, or a `custom_vjp` that is not a bool.
    """

    dtype: jax.typing.DTypeLike | None = None
    attention_backend: Backend = "xla"
    remat: Remat = "none"
    custom_vjp: bool = False
    expert_capacity: float | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _float_dtype(self.dtype))
        for name, value, choices in (
            ("attention backend", self.attention_backend, get_args(Backend)),
            ("remat policy", self.remat, get_args(Remat)),
        ):
            if value not in choices:
                raise ConfigError(f"{name} {value!r} is unknown; use one of {', '.join(choices)}")
        if not isinstance(self.custom_vjp, bool):
            raise ConfigError(f"custom_vjp is {self.custom_vjp!r}; it must be True or False")
        if self.expert_capacity is not None and not 0 < self.expert_capacity < math.inf:
            raise ConfigError(
                f"expert_capacity is {self.expert_capacity!r}; it must be a number above 0, or None"
            )

    def override(self, **changes: Any) -> ForwardOptions:
        """A copy with those of `changes` that are not None.

        Raises:
          ConfigError: as for the constructor.
        """
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})


def _float_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    try:
        checked = jnp.dtype(dtype)
    except TypeError:
        checked = None
    if checked is None or not jnp.issubdtype(checked, jnp.floating):
        raise ConfigError(f"compute dtype is {dtype!r}; it must be a float dtype such as float32 or bfloat16")
    return checked
