"""What of a model is trained and what is frozen beside it: all the weights, or an adapter on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig, adapters, quantize, sharding
from llama_jax.ops.quantization import Quantized

from .config.finetune import HEADS
from .config.run import OptimizerConfig, RunConfig
from .devices import compute_dtype
from .optimizer import frozen as frozen_by_name

Params = Any
Trainable = Any  # what the optimizer sees and a checkpoint holds
Frozen = Mapping[str, Any] | None  # what a step reads beside it


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a run's parameters are made of what it trains and what it does not.

    Attributes:
      adapter: the settings of the adapter that is trained alone, or None.
      base: `float32`, `bfloat16`, `int8` or `nf4`: what the frozen weights under an adapter are held in.
      reference: whether steps need the model that training began with, to compare with.
      outputs: how many numbers the head gives that is trained along; 0 is none.
      optimizer: its section, which says what is frozen by name; None freezes nothing.
    """

    adapter: adapters.Settings | None = None
    base: str = "float32"
    reference: bool = False
    outputs: int = 0
    optimizer: OptimizerConfig | None = None

    @property
    def averaged(self) -> bool:
        """Whether what is evaluated and saved is a running average of what is trained."""
        return self.optimizer is not None and self.optimizer.ema_decay > 0

    @staticmethod
    def of(run: RunConfig, platform: str, outputs: int = 1) -> Tuning:
        """What a run's configuration says.

        Args:
          run: the configuration.
          platform: what is trained on, such as `tpu`.
          outputs: of the head, where the objective has one.
        """
        base = run.adapter.base
        return Tuning(
            adapter=run.adapter.settings,
            base=compute_dtype(run.train, platform).name if base == "auto" else base,
            reference=run.train.objective == "dpo" and not run.preference.precompute_ref_log_probs,
            outputs=outputs if run.train.objective in HEADS else 0,
            optimizer=run.optimizer,
        )

    def begin(self, model: LlamaConfig, params: Params, key: jax.Array) -> tuple[Trainable, Frozen]:
        """Takes a model's f32 weights apart into what is trained and what is frozen.

        Args:
          model: the model.
          params: stacked, laid out over the current mesh, if there is one.
          key: for what begins at random.
        """
        adapter_key, head_key = jax.random.split(key)
        head = params.get("score")
        if self.outputs:  # a head is in the place of the output projection
            params = {name: tree for name, tree in params.items() if name not in ("lm_head", "score")}
        trainable: Any = params
        frozen: dict[str, Any] = {}
        if self.adapter is not None:
            frozen["base"] = held_in(params, self.base)
            trainable = adapters.init(self.adapter, model, frozen["base"], adapter_key)
        elif self.reference:
            # A copy, since a step gives away the buffers of what it trains.
            frozen["reference"] = jax.tree.map(jnp.copy, params)
        if self.outputs:
            if head is None:
                width = params["embed"]["embedding"].shape[1]
                kernel = 0.02 * jax.random.normal(head_key, (width, self.outputs), jnp.float32)
                head = {"kernel": sharding.constrain(kernel, sharding.SCORE_DC)}
            trainable = {**trainable, "score": head}
        return trainable, frozen or None

    def model(self, trainable: Trainable, frozen: Frozen) -> Params:
        """The parameters as a model's functions take them; what is frozen by name has no gradient."""
        if self.optimizer is not None and self.optimizer.freeze:
            trainable = jax.tree.map(
                lambda x, keep: jax.lax.stop_gradient(x) if keep else x,
                trainable,
                frozen_by_name(self.optimizer, trainable),
            )
        if self.adapter is None:
            return trainable
        assert frozen is not None
        attached = adapters.attach(self.adapter, frozen["base"], {"layers": trainable["layers"]})
        return {**attached, **{name: tree for name, tree in trainable.items() if name != "layers"}}

    def beginning(self, trainable: Trainable, frozen: Frozen) -> Params:
        """The model that training began with, of what it began with."""
        if self.adapter is None:
            return trainable
        assert frozen is not None
        return frozen["base"]

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """An objective, or its like, of (trainable, frozen, batch) in place of (parameters, batch)."""

        def applied(trainable: Trainable, frozen: Frozen, batch: Any, **more: Any) -> Any:
            return function(self.model(trainable, frozen), batch, **self.extras(frozen), **more)

        return applied

    def extras(self, frozen: Frozen) -> dict[str, Any]:
        """What an objective is handed beside parameters and batch."""
        if not self.reference:
            return {}
        assert frozen is not None
        return {"reference": frozen["reference"] if self.adapter is None else frozen["base"]}


def held_in(params: Params, form: str) -> Params:
    """The weights in one of the forms of `Tuning.base`."""
    if form in ("float32", "bfloat16"):
        return cast(params, jnp.dtype(form))
    return quantize(cast(params, jnp.bfloat16), 8 if form == "int8" else "nf4")


def cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """Every plain weight in `dtype`; quantised ones stay, and are computed with in it."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return dataclasses.replace(leaf, dtype=jnp.dtype(dtype))
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
