"""Reads the pickle of a torch checkpoint without unpickling it.

A pickle is a program. This interpreter executes only the opcodes that `torch.save` writes (protocol 2) on a
stack of plain values: names of torch's functions stay names, nothing is imported or called, and no size in
the file allocates memory. CPython's Lib/pickletools.py documents the opcodes.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import quote

# A model of 1,000 tensors takes about 40,000 opcodes and 100 kB.
_MAX_OPCODES = 1 << 20
_MAX_SIZE = 1 << 62
_MAX_DIMENSIONS = 8

# torch's storage classes by element type.
STORAGES = {"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}


class Function(NamedTuple):
    """A function that torch would call."""

    name: str


class StorageType(NamedTuple):
    """A storage class, represented by its element type."""

    dtype: str


class Storage(NamedTuple):
    """A flat array in the checkpoint: element type, name of the zip entry, number of elements."""

    dtype: str
    key: str
    length: int


class TensorView(NamedTuple):
    """A tensor as a strided view of a storage; `offset` and `strides` are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_GLOBALS: dict[str, Function | StorageType] = {
    "torch._utils _rebuild_tensor_v2": Function("tensor"),
    "torch._utils _rebuild_parameter": Function("parameter"),
    "collections OrderedDict": Function("dict"),
    **{f"torch {name}": StorageType(dtype) for dtype, name in STORAGES.items()},
}


def read_torch_pickle(path: Path, data: bytes) -> Any:
    """Returns the object that a checkpoint's pickle describes, with a `TensorView` for each tensor.

    Args:
      path: the file, for error messages.
      data: the pickle.

    Raises:
      CheckpointError: if the pickle is malformed, or contains anything but tensors in lists and dicts.
    """
    machine, stream = _Machine(path), io.BytesIO(data)
    try:
        for _ in range(_MAX_OPCODES):
            opcode = stream.read(1)
            if opcode == b".":
                return machine.stack.pop()
            if opcode not in _OPCODES:
                raise machine.unsupported(f"has the opcode {opcode!r}" if opcode else "is truncated")
            action, read_argument = _OPCODES[opcode]
            machine.execute(action, read_argument(stream))
    except CheckpointError:
        raise
    except (ValueError, LookupError, struct.error) as error:
        detail = " ".join(str(error).split())[:100]
        raise CheckpointError(
            f"{path}: its pickle is malformed ({detail}); download the file again"
        ) from None
    raise CheckpointError(
        f"{path}: its pickle has more than {_MAX_OPCODES} opcodes; no model needs that many"
    )


def _unpack(format: str) -> Callable[[BinaryIO], Any]:
    size = struct.calcsize(format)
    return lambda stream: struct.unpack(format, stream.read(size))[0]


def _read_text(stream: BinaryIO) -> str:
    return _read_exactly(stream, _unpack("<I")(stream)).decode()


def _read_long(stream: BinaryIO) -> int:
    return int.from_bytes(_read_exactly(stream, _unpack("<B")(stream)), "little", signed=True)


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError(f"{size} bytes are needed but only {len(data)} are left")
    return data


def _read_global(stream: BinaryIO) -> str:
    return " ".join(stream.readline().decode().removesuffix("\n") for _ in range(2))


# The action of each opcode, and the reader of its argument.
_OPCODES: dict[bytes, tuple[str, Callable[[BinaryIO], Any]]] = {
    b"\x80": ("protocol", _unpack("<B")),
    b"N": ("push", lambda _: None),
    b"\x88": ("push", lambda _: True),
    b"\x89": ("push", lambda _: False),
    b"K": ("push", _unpack("<B")),
    b"M": ("push", _unpack("<H")),
    b"J": ("push", _unpack("<i")),
    b"\x8a": ("push", _read_long),
    b"G": ("push", _unpack(">d")),
    b"X": ("push", _read_text),
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
    b"q": ("put", _unpack("<B")),
    b"r": ("put", _unpack("<I")),
    b"h": ("get", _unpack("<B")),
    b"j": ("get", _unpack("<I")),
    b"c": ("global", _read_global),
    b"Q": ("storage", lambda _: None),
    b"R": ("call", lambda _: None),
    b"b": ("state", lambda _: None),
}


class _Machine:
    """The state of the pickle machine: the stack, the stacks below each mark, and the memo."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def execute(self, action: str, argument: Any) -> None:
        stack = self.stack
        match action:
            case "push":
                stack.append(argument)
            case "put":
                self.memo[argument] = stack[-1]
            case "get":
                if argument not in self.memo:
                    raise LookupError(f"the memo has no entry {argument}")
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
            case "global":
                stack.append(self.global_(argument))
            case "storage":
                stack.append(self.storage(stack.pop()))
            case "call":
                function, arguments = self.pop(2)
                stack.append(self.call(function, arguments))
            case "state":
                # torch modules store their versions as an attribute of the state_dict.
                state = stack.pop()
                if not isinstance(state, dict) or set(state) - {"_metadata"}:
                    raise self.unsupported("sets attributes of an object")
                self.top(dict)
            case "protocol":
                if argument != 2:
                    raise self.unsupported(f"has protocol {argument}, not 2")

    def pop(self, count: int | None) -> list[Any]:
        """Pops the last `count` values; None pops all values above the last mark."""
        if count is None:
            items, self.stack = self.stack, self.below_marks.pop()
            return items
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise self.unsupported(f"fills a {type(value).__name__} like a {kind.__name__}")
        return value

    def set_items(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Large integers can be crafted to share one hash, and nested tuples to overflow the C stack.
            if type(key) is not str and not (type(key) is int and abs(key) < 1 << 31):
                raise self.unsupported(f"has a {type(key).__name__} as a key")
            target[key] = value

    def global_(self, name: str) -> Function | StorageType:
        if name not in _GLOBALS:
            raise self.unsupported(f"imports {quote(name.replace(' ', '.'))}")
        return _GLOBALS[name]

    def storage(self, reference: Any) -> Storage:
        match reference:
            case ("storage", StorageType(dtype), str(key), str(), length) if _are_sizes((length,)):
                return Storage(dtype, key, length)
        raise self.unsupported("refers to an object that is not a storage of floats")

    def call(self, function: Any, arguments: Any) -> Any:
        """Returns the result of a known torch function; nothing is actually called."""
        match function, arguments:
            case Function("dict"), ():
                return {}
            case Function("parameter"), (TensorView() as tensor, bool(), dict()):
                return tensor
            # The rest are backward hooks (code), and flags to negate or conjugate the values.
            case Function("tensor"), (Storage() as storage, offset, shape, strides, bool(), *rest):
                valid = _are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(strides)
                if valid and len(shape) == len(strides) <= _MAX_DIMENSIONS and not any(rest):
                    return TensorView(storage, offset, shape, strides)
        name = function.name if isinstance(function, Function) else type(function).__name__
        raise self.unsupported(f"calls {quote(name)} with unsupported arguments")

    def unsupported(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: its pickle {problem}, which is not supported: only floating-point tensors "
            "are read, as torch.save(state_dict, ...) writes them"
        )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and 0 <= v < _MAX_SIZE for v in values)
