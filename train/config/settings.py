"""The settings of a run by their names: the keys of its sections, and those of tables within a section."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

# Names of keys in other programs' files, read as ours.
ALIASES = {
    "model.rope_scaling.kind": "model.rope_scaling.rope_type",
    "model.rope_scaling.type": "model.rope_scaling.rope_type",
}
# Keys that other programs have in another table.
ELSEWHERE = {"model.rope_scaling.rope_theta": "model.rope_theta"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A key of a section, such as `steps`, or of a table in it, such as `rope_scaling.factor`.

    Attributes:
      owner: the dataclass that it is a field of.
      field: the field.
      annotation: its type.
    """

    owner: Any
    field: dataclasses.Field[Any]
    annotation: Any

    @property
    def table(self) -> Any:
        """The dataclass of the table that this setting is; None for a plain value."""
        return next((t for t in alternatives(self.annotation) if dataclasses.is_dataclass(t)), None)


def settings(section: Any) -> dict[str, Setting]:
    """The settings of a section's dataclass by their names in it; a table comes before its keys."""
    hints, found = get_type_hints(section), {}
    for field in dataclasses.fields(section):
        setting = found[field.name] = Setting(section, field, hints[field.name])
        if setting.table is not None:
            found |= {f"{field.name}.{key}": inner for key, inner in settings(setting.table).items()}
    return found


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; any other type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
