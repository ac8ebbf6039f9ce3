"""Ctrl-C at any moment of a process: status 130 and no traceback; nothing goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each ends only by the signal that it gets once it has printed "ready".
RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes without
from llama_jax.console.exit_status import exit_status
{program}
sys.exit(exit_status(program, ends_process=True))
"""
IN_AN_IMPORT = """
def program():
    import slow  # one that would break if it ended in the middle
    time.sleep(60)
"""
IN_A_CALLBACK = """
import gc
def callback(phase, info):
    if phase == "start":
        print("ready", flush=True)
        for _ in range(3000): time.sleep(0.01)
def program():
    gc.callbacks.append(callback)
    gc.collect()
    for _ in range(6000): time.sleep(0.01)
"""
IN_A_LIBRARY = """
def program():
    print("ready", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt as error:
        raise ImportError("the extension cannot be initialized") from error
"""
AT_THE_END = """
import atexit
def at_exit():
    print("ready", flush=True)
    time.sleep(60)
def program():
    atexit.register(at_exit)
"""


def interrupted(*command: str, times: int = 1, path: Path = ROOT) -> tuple[int, str]:
    """Starts Python, sends SIGINT once it prints "ready"; returns its status and stderr."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env={"PYTHONPATH": f"{ROOT}:{path}", "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.parametrize("program", [IN_AN_IMPORT, IN_A_CALLBACK, IN_A_LIBRARY, AT_THE_END])
def test_ctrl_c_ends_the_program(program, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nprint('ready', flush=True)\ntime.sleep(0.3)\nopen(__file__ + '.done', 'x').close()\n"
    )
    status, err = interrupted("-c", RUN.format(program=program), path=tmp_path)
    assert status == 130
    assert err.strip() == ""
    assert (tmp_path / "slow.py.done").exists() == (program is IN_AN_IMPORT)


def test_a_second_ctrl_c_does_not_wait_for_an_import(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\nprint('ready', flush=True)\n"
        "for _ in range(6000): time.sleep(0.01)\n"
    )
    status, err = interrupted("-c", RUN.format(program=IN_AN_IMPORT), path=tmp_path)
    assert (status, err.strip()) == (130, "")


def test_ctrl_c_while_jax_is_imported(tmp_path):
    """JAX's own start: the extension modules that it loads report KeyboardInterrupt as an ImportError."""
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'jaxlib': print('ready', flush=True)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    command = ("generate", str(tmp_path / "nothing.gguf"), "--prompt", "x")
    status, err = interrupted("-m", "llama_jax", *command, path=tmp_path)
    assert (status, err.strip()) == (130, "")
