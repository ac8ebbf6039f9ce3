"""Reads the pickle of a torch checkpoint without unpickling it.

A pickle is a program. This carries out the few operations that `torch.save` writes (protocol 2, and none of a
later one) on a stack of plain values: names of torch's functions stay names, nothing is imported or called,
and no number in the file sets aside memory. Lib/pickletools.py of CPython says what each operation does.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import quote

# A model of 1,000 tensors takes about 40,000 operations and 100 kB.
_MAX_OPERATIONS = 1 << 20
_MAX_NUMBER = 1 << 62
_MAX_DIMENSIONS = 8

# torch's storage classes by the element type that they stand for.
STORAGES = {"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}


class Function(NamedTuple):
    """The name of something that torch would call."""

    name: str


class StorageType(NamedTuple):
    """The name of a storage class, as the element type it stands for."""

    dtype: str


class Storage(NamedTuple):
    """A flat array in the checkpoint: its element type, the name of its entry, how many elements."""

    dtype: str
    key: str
    length: int


class TensorView(NamedTuple):
    """A tensor: elements of a storage, `offset` and `strides` counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_NAMES: dict[str, Function | StorageType] = {
    "torch._utils _rebuild_tensor_v2": Function("tensor"),
    "torch._utils _rebuild_parameter": Function("parameter"),
    "collections OrderedDict": Function("dict"),
    **{f"torch {name}": StorageType(dtype) for dtype, name in STORAGES.items()},
}


def read_torch_pickle(path: Path, data: bytes) -> Any:
    """Returns the value that a checkpoint's pickle describes, with a `TensorView` for each tensor.

    Args:
      path: where it is from, for messages.
      data: the pickle.

    Raises:
      CheckpointError: if it is malformed, or asks for anything but tensors in lists and dicts.
    """
    machine, stream = _Machine(path), io.BytesIO(data)
    try:
        for _ in range(_MAX_OPERATIONS):
            code = stream.read(1)
            if code == b".":
                return machine.stack.pop()
            if code not in _OPERATIONS:
                raise machine.refused(f"has the operation {code!r}" if code else "has no end")
            action, argument = _OPERATIONS[code]
            machine.carry_out(action, argument(stream))
    except CheckpointError:
        raise
    except (ValueError, LookupError, struct.error) as error:
        why = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{path}: its pickle is malformed ({why}); get the file again") from None
    raise CheckpointError(
        f"{path}: its pickle has more than {_MAX_OPERATIONS} operations; no model needs as many"
    )


def _packed(form: str) -> Callable[[BinaryIO], Any]:
    size = struct.calcsize(form)
    return lambda stream: struct.unpack(form, stream.read(size))[0]


def _text(stream: BinaryIO) -> str:
    return _exactly(stream, _packed("<I")(stream)).decode()


def _long(stream: BinaryIO) -> int:
    return int.from_bytes(_exactly(stream, _packed("<B")(stream)), "little", signed=True)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError(f"{size} bytes are asked for and {len(data)} left")
    return data


def _two_lines(stream: BinaryIO) -> str:
    return " ".join(stream.readline().decode().removesuffix("\n") for _ in range(2))


# What each operation does, and how its argument is read.
_OPERATIONS: dict[bytes, tuple[str, Callable[[BinaryIO], Any]]] = {
    b"\x80": ("protocol", _packed("<B")),
    b"N": ("push", lambda _: None),
    b"\x88": ("push", lambda _: True),
    b"\x89": ("push", lambda _: False),
    b"K": ("push", _packed("<B")),
    b"M": ("push", _packed("<H")),
    b"J": ("push", _packed("<i")),
    b"\x8a": ("push", _long),
    b"G": ("push", _packed(">d")),
    b"X": ("push", _text),
    b")": ("push", lambda _: ()),
    b"]": ("push", lambda _: []),
    b"}": ("push", lambda _: {}),
    b"(": ("mark", lambda _: None),
    b"t": ("tuple", lambda _: None),
    b"\x85": ("tuple", lambda _: 1),
    b"\x86": ("tuple", lambda _: 2),
    b"\x87": ("tuple", lambda _: 3),
    b"a": ("append", lambda _: 1),
    b"e": ("append", lambda _: None),
    b"s": ("set", lambda _: 2),
    b"u": ("set", lambda _: None),
    b"q": ("put", _packed("<B")),
    b"r": ("put", _packed("<I")),
    b"h": ("get", _packed("<B")),
    b"j": ("get", _packed("<I")),
    b"c": ("name", _two_lines),
    b"Q": ("storage", lambda _: None),
    b"R": ("call", lambda _: None),
    b"b": ("state", lambda _: None),
}


class _Machine:
    """The stack, what lies below each mark on it, and the memo of values by number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def carry_out(self, action: str, argument: Any) -> None:
        stack = self.stack
        match action:
            case "push":
                stack.append(argument)
            case "put":
                self.memo[argument] = stack[-1]
            case "get":
                if argument not in self.memo:
                    raise LookupError(f"nothing has the number {argument}")
                stack.append(self.memo[argument])
            case "mark":
                self.below_marks.append(stack)
                self.stack = []
            case "tuple":
                items = self.pop(argument)
                self.stack.append(tuple(items))
            case "append":
                items = self.pop(argument)
                self.top(list).extend(items)
            case "set":
                items = self.pop(argument)
                self.set_items(self.top(dict), items)
            case "name":
                stack.append(self.name(argument))
            case "storage":
                stack.append(self.storage(stack.pop()))
            case "call":
                function, arguments = self.pop(2)
                stack.append(self.call(function, arguments))
            case "state":
                # Modules note their versions in an attribute of their state's OrderedDict.
                state = stack.pop()
                if not isinstance(state, dict) or set(state) - {"_metadata"}:
                    raise self.refused("sets attributes of an object")
                self.top(dict)
            case "protocol":
                if argument != 2:
                    raise self.refused(f"is of protocol {argument}, not 2")

    def pop(self, count: int | None) -> list[Any]:
        """Takes the last `count` values off the stack; None: all above the last mark."""
        if count is None:
            items, self.stack = self.stack, self.below_marks.pop()
            return items
        if count > len(self.stack):
            raise IndexError("nothing is left on the stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise self.refused(f"fills a {type(value).__name__} as if it were a {kind.__name__}")
        return value

    def set_items(self, into: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Large numbers can be chosen to have one hash, and nested tuples to overflow the C stack.
            if type(key) is not str and not (type(key) is int and abs(key) < 1 << 31):
                raise self.refused(f"has a {type(key).__name__} as a key")
            into[key] = value

    def name(self, name: str) -> Function | StorageType:
        if name not in _NAMES:
            raise self.refused(f"asks for {quote(name.replace(' ', '.'))}")
        return _NAMES[name]

    def storage(self, reference: Any) -> Storage:
        match reference:
            case ("storage", StorageType(dtype), str(key), str(), length) if _are_numbers((length,)):
                return Storage(dtype, key, length)
        raise self.refused("refers to something that is no storage of numbers")

    def call(self, function: Any, arguments: Any) -> Any:
        """What torch's function makes of its arguments, by its name and theirs alone."""
        match function, arguments:
            case Function("dict"), ():
                return {}
            case Function("parameter"), (TensorView() as tensor, bool(), dict()):
                return tensor
            # The rest would be hooks, which are code, and a note to negate or conjugate the values.
            case Function("tensor"), (Storage() as storage, offset, shape, strides, bool(), *rest):
                numbers = _are_numbers((offset,)) and _are_numbers(shape) and _are_numbers(strides)
                if numbers and len(shape) == len(strides) <= _MAX_DIMENSIONS and not any(rest):
                    return TensorView(storage, offset, shape, strides)
        name = function.name if isinstance(function, Function) else type(function).__name__
        raise self.refused(f"calls {quote(name)} with what no tensor is made of")

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: its pickle {what}, which is not read: only floating-point tensors "
            "are, as torch.save(state_dict, ...) writes them"
        )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and 0 <= v < _MAX_NUMBER for v in values)
