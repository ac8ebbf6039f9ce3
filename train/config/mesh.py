"""`[mesh]`: the device mesh."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from llama_jax.errors import ConfigError
from llama_jax.meshes import ALL_AXES

from .checks import check_at_least, check_one_of

GradientDtype = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The sizes of the mesh axes; see `llama_jax.sharding` for their meaning.

    Attributes:
      data, fsdp, expert, context, tensor: axis sizes; one may be -1, which is inferred from the number of
        devices.
      slices: number of TPU slices connected by the data-center network (DCN); it must divide `data`.
      gradient_dtype: dtype in which gradients are summed over `data`, once a step. bfloat16 halves the bytes
        that cross the DCN. int8 quarters them: what it leaves out is kept, and added in the next step. Over
        the other axes gradients are summed in f32 in any case.
      topology: the TPU topology that the file is meant for, such as `v5p:4x4x4`: what
        `llama-jax plan` plans for. Training ignores it.

    Raises:
      ConfigError: for a size that is not positive, or more than one -1.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1
    gradient_dtype: GradientDtype = "float32"
    topology: str = ""

    def __post_init__(self) -> None:
        check_at_least("mesh", self, slices=1)
        check_one_of("mesh.gradient_dtype", self.gradient_dtype, get_args(GradientDtype))
        sizes = {name: getattr(self, name) for name in ALL_AXES}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{name} is {size}; it must be at least 1, or -1 to infer it")
        if list(sizes.values()).count(-1) > 1:
            inferred = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
            raise ConfigError(f"{' and '.join(inferred)} are both -1; only one axis size can be inferred")

    def residual_parts(self, data: int) -> int:
        """The number of parts of the residual of gradients in int8; 0 for another dtype.

        Args:
          data: the size of that axis, inferred where it is -1 here.

        Raises:
          ConfigError: if a dtype is set and there is nothing to sum.
        """
        if data == 1 and self.gradient_dtype != "float32":
            raise ConfigError(
                f'mesh.gradient_dtype is "{self.gradient_dtype}" and mesh.data 1: there is no sum over data; '
                "leave it out, or set mesh.data to the number of slices"
            )
        return data if self.gradient_dtype == "int8" else 0
