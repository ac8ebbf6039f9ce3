"""torch pickles: code is refused and never run, and memory is bounded."""

from __future__ import annotations

import os
import pickle
import re
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llama_jax.errors import CheckpointError
from llama_jax.weights.torch_pickle import TensorView, read_torch_pickle
from tests.weights.test_load import one_line, problem
from tests.weights.test_torch_zip import GOLDEN, V2, archive, message, number, pickled, tensor, text


def pickle_message(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_torch_pickle(Path("some.pth"), data)
    assert str(caught.value).startswith("some.pth: ")
    return one_line(caught)


# Pickles that run code when unpickled.


class ReduceCall:
    """Pickles as a function call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hostile(canary: str) -> dict[str, bytes]:
    command = f"touch {canary}"
    import builtins
    import subprocess

    calls = {
        "os.system": ReduceCall(os.system, (command,)),
        "subprocess": ReduceCall(subprocess.getoutput, (command,)),
        "eval": ReduceCall(builtins.eval, (f"__import__('os').system({command!r})",)),
        "nested": [{"a": (1, ReduceCall(os.system, (command,)))}],
        "getattr": ReduceCall(getattr, (ReduceCall(__import__, ("os",)), "system")),
        "state": ReduceCall(Exception, ("x",), {"__setstate__": command}),
        "items": ReduceCall(dict, (), None, None, iter([("a", ReduceCall(os.system, (command,)))])),
    }
    dumped = {name: pickle.dumps(value, protocol=2) for name, value in calls.items()}
    dumped["torch.load"] = b"\x80\x02ctorch\nload\n(" + text(canary) + b"tR."
    dumped["nested torch"] = pickled(V2 + b"(cos\nsystem\n" + text(command) + b"tRtR")
    dumped["in the storage"] = pickled(tensor(key=b"cos\nsystem\n" + text(command) + b"\x85R"))
    dumped["in the hooks"] = pickled(tensor(hooks=b"cos\nsystem\n" + text(command) + b"\x85R"))
    dumped["instance"] = b"(ios\nsystem\n."
    dumped["object"] = b"(cos\nsystem\n" + text(command) + b"o."
    dumped["new object"] = b"\x80\x02cos\nsystem\n" + text(command) + b"\x85\x81."
    dumped["extension"] = b"\x80\x02\x82\x01."
    dumped["stack global"] = b"\x80\x02" + text("os") + text("system") + b"\x93."
    return dumped


@pytest.mark.parametrize("name", hostile("x"))
def test_code_in_pickles_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = hostile(str(canary))[name]
    error = message(archive(tmp_path / "a.pth", data))
    assert "its pickle" in error and "not supported" in error
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pth"]


def test_hostile_pickles_run_under_pickle() -> None:
    """Checks the test cases themselves with a harmless call."""
    path = pickle.loads(pickle.dumps(ReduceCall(os.path.join, ("a", "b")), protocol=2))
    assert path == os.path.join("a", "b")  # noqa: PTH118
    assert re.search("posix.system|nt.system", pickle_message(hostile("x")["os.system"]))


def test_globals_are_refused_without_import(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        error = pickle_message(b"\x80\x02cevil_module\nrun\n)R.")
    finally:
        sys.path.remove(str(tmp_path))
    assert "imports 'evil_module.run'" in error
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "is truncated"),
        (b"\x80\x02", "is truncated"),
        (b"\x80", "malformed"),
        (b"\x80\x04N.", "protocol 4"),
        (b"\x80\x02}.", None),
        (b"\x80\x02.", "malformed"),
        (b"\x80\x02q\0.", "malformed"),
        (b"\x80\x02h\5.", "malformed"),
        (b"\x80\x02tt.", "malformed"),
        (b"\x80\x02R.", "malformed"),
        (b"\x80\x02K\1\x86.", "malformed"),
        (b"\x80\x02}(K\1u.", "malformed"),
        (b"\x80\x02K\1K\2K\3s.", "fills a int"),
        (b"\x80\x02}K\2a.", "fills a dict"),
        (b"\x80\x02\xff.", r"has the opcode b'\\xff'"),
        (b"\x80\x02X\xff\xff\xff\x7fab.", "malformed"),
        (b"\x80\x02\x8a\xffab.", "malformed"),
        (b"\x80\x02X\1\0\0\0\xff.", "malformed"),
        (b"\x80\x02c\xff\n\xff\n.", "malformed"),
        (b"I" + b"9" * 100_000 + b"\n.", "has the opcode b'I'"),
        (b"S'\\d'\n.", "has the opcode b'S'"),
        (b"\x80\x02}}K\1K\1ss.", "dict as a key|fills|malformed"),
        (b"\x80\x02}N}s.", "NoneType as a key"),
        (b"\x80\x02})}s.", "tuple as a key"),
        (b"\x80\x02}\x8a\x09" + b"\xff" * 8 + b"\x7f" + b"}s.", "int as a key"),
        (b"\x80\x02}}" + text("__class__") + b"}sb.", "sets attributes"),
        (b"\x80\x02]}b.", "fills a list"),
        (b"\x80\x02K\1Q.", "refers to an object"),
        (b"\x80\x02K\1)R.", "calls 'int'"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\1tR.", "calls 'dict'"),
        (b"\x80\x02ctorch\nFloatStorage\n(K\1tR.", "calls 'StorageType'"),
        (pickled(tensor(kind=b"LongStorage")), "imports 'torch.LongStorage'"),
        (pickled(tensor(kind=b"..FloatStorage")), "imports"),
        (pickled(tensor(length=b"J\xff\xff\xff\xff")), "refers to an object"),
        (pickled(tensor(length=b"\x88")), "refers to an object"),
        (pickled(tensor(length=b"G" + bytes(8))), "refers to an object"),
        (pickled(tensor(length=number(1 << 70))), "refers to an object"),
        (pickled(tensor((1 << 70,), (1,))), "calls 'tensor'"),
        (pickled(tensor((-1, 3))), "calls 'tensor'"),
        (pickled(tensor(strides=(-3, 1))), "calls 'tensor'"),
        (pickled(tensor(strides=(1,))), "calls 'tensor'"),
        (pickled(tensor((1,) * 9, (1,) * 9)), "calls 'tensor'"),
        (pickled(tensor(offset=b"\x88")), "calls 'tensor'"),
        (pickled(tensor(hooks=b"](K\1e")), "calls 'tensor'"),
        (pickled(tensor(hooks=b"}K\1K\1s")), "calls 'tensor'"),
        (pickled(tensor(after=b"}" + text("neg") + b"\x88s")), "calls 'tensor'"),
    ],
)
def test_unsupported_pickles_are_refused(data: bytes, error: str | None) -> None:
    if error is None:
        read_torch_pickle(Path("some.pth"), data)
    else:
        assert re.search(error, pickle_message(data))


BOMBS = {
    "a large memo": b"\x80\x02Nr\xff\xff\xff\xff" + b"Nr\xfe\xff\xff\x7f" * 1000 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "doubling": b"\x80\x02K\1q\0" + b"h\0h\0\x86q\0" * 50_000 + b".",
    "recursion": b"\x80\x02}q\0" + text("a") + b"h\0s" + text("model") + b"h\0s.",
    "a recursive list": b"\x80\x02]q\0h\0a.",
    "a long number": b"\x80\x02\x8b" + (1 << 24).to_bytes(4, "little") + b"\x7f" * (1 << 24) + b".",
    "integers with one hash": b"\x80\x02}("
    + b"".join(number(index * ((1 << 61) - 1)) + b"N" for index in range(20_000))
    + b"u.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickle_bombs_use_bounded_memory(bomb: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", BOMBS[bomb])
    tracemalloc.start()
    error = message(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(error) < 400
    assert peak < 100_000_000


def test_number_of_opcodes_is_limited() -> None:
    assert "more than 1048576 opcodes" in pickle_message(b"\x80\x02" + b"N" * (1 << 21))


def test_damaged_pickles() -> None:
    """Every byte of a pickle, changed: an error, or still only named tensors."""
    with zipfile.ZipFile(GOLDEN) as file:
        good = file.read(file.namelist()[0])
    for at in range(len(good)):
        for bit in (at % 8, (at + 3) % 8):
            damaged = bytearray(good)
            damaged[at] ^= 1 << bit
            found: list[Any] = []
            error = problem(lambda: found.append(read_torch_pickle(Path("some.pth"), bytes(damaged))))  # noqa: B023
            assert "\n" not in error and len(error) < 400
            values = found[0].values() if found and isinstance(found[0], dict) else ()
            assert all(isinstance(view, TensorView | dict) for view in values)
