"""Plans a run's step for a TPU slice: what needs the run's configuration, and its compiled step."""

from .compiling import plan_compiled
from .errors import CompilerMissing, OutOfMemory
from .shape import model_of, with_rows_per_chip

__all__ = ["CompilerMissing", "OutOfMemory", "model_of", "plan_compiled", "with_rows_per_chip"]
