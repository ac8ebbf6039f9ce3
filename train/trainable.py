"""Which parameters are trained and which are frozen: all weights, or an adapter on frozen base weights."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig, adapters, init, quantize, sharding
from llama_jax.errors import ConfigError
from llama_jax.ops.quantization import Quantized
from llama_jax.weights.hf import default_labels

from .config.objective import HEAD_OBJECTIVES
from .config.optimizer import OptimizerConfig
from .config.run import RunConfig
from .devices import compute_dtype
from .network import Network

Params = Any
Trainable = Any  # what the optimizer updates and a checkpoint stores
# A step's other, constant parameters: `base` or `reference`, `value`, and `teacher`, a `Network`.
Frozen = Mapping[str, Any] | None
VALUE = "value"  # among the parameters: the value function of PPO


@dataclasses.dataclass(frozen=True)
class TrainableSpec:
    """How a model's parameters are split into trainable and frozen ones, and merged again.

    Attributes:
      adapter: settings of the adapter that is trained on frozen base weights; None trains all weights.
      base: dtype or quantization of the frozen base weights: `float32`, `bfloat16`, `int8` or `nf4`.
      reference: whether there is a reference model: the initial parameters, or others.
      other_reference: whether it is another model than the initial one, see `with_reference`.
      head_outputs: number of outputs of the head that replaces the LM head; 0 for none.
      value_head: whether a value function is trained beside the policy, a head on its last hidden states.
      value_model: the configuration of a value function that is a network of its own.
      optimizer: the `optimizer` section, whose `freeze` patterns apply; None freezes nothing.
    """

    adapter: adapters.Settings | None = None
    base: str = "float32"
    reference: bool = False
    other_reference: bool = False
    head_outputs: int = 0
    value_head: bool = False
    value_model: LlamaConfig | None = None
    optimizer: OptimizerConfig | None = None

    @property
    def uses_ema(self) -> bool:
        """Whether an exponential moving average of the trainable parameters is evaluated and saved."""
        return self.optimizer is not None and self.optimizer.ema_decay > 0

    @staticmethod
    def from_config(
        run: RunConfig, platform: str, head_outputs: int = 1, value_model: LlamaConfig | None = None
    ) -> TrainableSpec:
        """Makes the spec of a run.

        Args:
          run: the run's configuration.
          platform: the platform that is trained on, such as `tpu`.
          head_outputs: number of outputs of the head, if the objective has one.
          value_model: the configuration of `rl.value_model`, if the run has one.
        """
        base = run.adapter.base
        return TrainableSpec(
            adapter=run.adapter.settings,
            base=compute_dtype(run.train, platform).name if base == "auto" else base,
            reference=run.has_reference,
            other_reference=bool(run.rl.reference) and run.has_reference,
            head_outputs=head_outputs if run.train.objective in HEAD_OBJECTIVES else 0,
            value_head=run.train.objective == "ppo" and not run.rl.value_model,
            value_model=value_model,
            optimizer=run.optimizer,
        )

    def split(self, model: LlamaConfig, params: Params, key: jax.Array) -> tuple[Trainable, Frozen]:
        """Splits a model's f32 parameters into trainable and frozen ones.

        Args:
          model: the model's configuration.
          params: stacked, sharded over the current mesh, if there is one; with those of the value model as
            `value`, which are random if they are not given.
          key: for the random initial values of adapter, head and value model.
        """
        params, value = {name: x for name, x in params.items() if name != VALUE}, params.get(VALUE)
        adapter_key, head_key = jax.random.split(key)
        head = params.get("score")
        if self.head_outputs:  # the head replaces the output projection
            params = {name: tree for name, tree in params.items() if name not in ("lm_head", "score")}
        trainable: Any = params
        frozen: dict[str, Any] = {}
        if self.adapter is not None:
            frozen["base"] = cast_base(params, self.base)
            trainable = adapters.init(self.adapter, model, frozen["base"], adapter_key)
            if self.other_reference:
                frozen["reference"] = cast_base(params, self.base)
        elif self.reference:
            # A copy, since a step donates the buffers of the trainable parameters.
            frozen["reference"] = jax.tree.map(jnp.copy, params)
        if self.head_outputs:
            if head is None:
                width = params["embed"]["embedding"].shape[1]
                kernel = 0.02 * jax.random.normal(head_key, (width, self.head_outputs), jnp.float32)
                head = {"kernel": sharding.constrain(kernel, sharding.SCORE_DC)}
            trainable = {**trainable, "score": head}
        if self.value_head:  # from zero: the policy's first updates are not disturbed
            kernel = jnp.zeros((params["embed"]["embedding"].shape[1], 1), jnp.float32)
            trainable = {**trainable, VALUE: {"kernel": sharding.constrain(kernel, sharding.SCORE_DC)}}
        if self.value_model is not None:
            value_key = jax.random.fold_in(key, 1)
            value = init(self.value_model, value_key) if value is None else value
            if self.adapter is not None:
                frozen[VALUE] = cast_base(
                    {name: x for name, x in value.items() if name != "score"}, self.base
                )
                adapter = adapters.init(self.adapter, self.value_model, frozen[VALUE], value_key)
                value = {**adapter, "score": value["score"]}
            trainable = {**trainable, VALUE: value}
        return trainable, frozen or None

    def with_reference(self, frozen: Frozen, reference: Params) -> Frozen:
        """Replaces the reference model, the initial parameters, by another of the same shapes."""
        reference = reference if self.adapter is None else cast_base(reference, self.base)
        return {**(frozen or {}), "reference": reference}

    def merge(self, trainable: Trainable, frozen: Frozen) -> Params:
        """Merges both into the model's parameters; those that match `optimizer.freeze` get no gradient."""
        if self.optimizer is not None and self.optimizer.freeze:
            trainable = jax.tree.map(
                lambda x, is_frozen: jax.lax.stop_gradient(x) if is_frozen else x,
                trainable,
                frozen_mask(self.optimizer, trainable),
            )
        if self.value_model is not None:
            value = trainable[VALUE]
            if self.adapter is not None:
                assert frozen is not None
                value = self._attached(frozen[VALUE], value)
            trainable = {**trainable, VALUE: Network(value, self.value_model)}
        if self.adapter is None:
            return trainable
        assert frozen is not None
        return self._attached(frozen["base"], trainable)

    def language_model(self, trainable: Trainable, frozen: Frozen) -> Params:
        """`merge` without a value function: what samples and is evaluated."""
        return {name: tree for name, tree in self.merge(trainable, frozen).items() if name != VALUE}

    def _attached(self, base: Params, trainable: Trainable) -> Params:
        """Base parameters with their adapter, and what else is trained beside it."""
        assert self.adapter is not None
        attached = adapters.attach(self.adapter, base, {"layers": trainable["layers"]})
        return {**attached, **{name: tree for name, tree in trainable.items() if name != "layers"}}

    def initial_params(self, trainable: Trainable, frozen: Frozen) -> Params:
        """The model's initial parameters, from the initial trainable and the frozen ones."""
        if self.adapter is None:
            return trainable
        assert frozen is not None
        return frozen["base"]

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Turns a function of (params, batch), such as a loss, into one of (trainable, frozen, batch).

        The reference model's parameters are passed to it as `reference` if the spec has one, and the teacher
        as `teacher` if it is frozen beside them.
        """

        def wrapped(trainable: Trainable, frozen: Frozen, batch: Any, **kwargs: Any) -> Any:
            if frozen is not None and "teacher" in frozen:
                kwargs["teacher"] = frozen["teacher"]
            if self.reference:
                assert frozen is not None
                kwargs["reference"] = frozen["reference"] if "reference" in frozen else frozen["base"]
            return function(self.merge(trainable, frozen), batch, **kwargs)

        return wrapped


FULL_FINETUNING = TrainableSpec()  # all weights are trained


def cast_base(params: Params, base: str) -> Params:
    """Casts or quantizes frozen base weights as `TrainableSpec.base` says."""
    if base in ("float32", "bfloat16"):
        return cast(params, jnp.dtype(base))
    return quantize(cast(params, jnp.bfloat16), 8 if base == "int8" else "nf4")


def cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """Casts floating-point leaves to `dtype`; quantized ones stay, and are dequantized to it."""

    def cast_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return dataclasses.replace(leaf, dtype=jnp.dtype(dtype))
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast_leaf, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def with_labels(run: RunConfig, model: LlamaConfig) -> LlamaConfig:
    """Sets the labels of the head that the objective trains; none if it trains no head."""
    labels: tuple[str, ...] = ()
    if run.train.objective in HEAD_OBJECTIVES:
        labels = run.data.labels if run.train.objective == "classify" else default_labels(1)
    return model.replace(labels=labels)


def frozen_mask(config: OptimizerConfig, params: Any) -> Any:
    """Which leaves match a pattern of `config.freeze`: a bool for each.

    Raises:
      ConfigError: for a pattern that matches no parameter, or patterns that match all.
    """
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), params
    )
    all_names = jax.tree.leaves(names)
    for pattern in config.freeze:
        if not fnmatch.filter(all_names, pattern):
            known = ", ".join(dict.fromkeys(all_names))
            raise ConfigError(f"optimizer.freeze: {pattern!r} matches no parameter (there are {known})")
    mask = jax.tree.map(lambda name: any(fnmatch.fnmatch(name, p) for p in config.freeze), names)
    if all(jax.tree.leaves(mask)):
        raise ConfigError(f"optimizer.freeze {list(config.freeze)} leaves nothing to train; freeze less")
    return mask
