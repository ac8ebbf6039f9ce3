"""Templates as programs: their environment, malicious and broken templates, and the worker process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_jax.chat import process, render_chat
from llama_jax.errors import InputError, TokenizerError
from tests.messages import jinja, user

# The environment


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),  # trim_blocks, lstrip_blocks
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "<é>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% set n = namespace(x=1) %}{% for i in 'ab' %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "3"),
        ("{{ strftime_now('%d') | length }}", "2"),
        (
            "{{ tools is none }} {{ documents is none }} {{ nothing is defined }}{{ nothing }}",
            "True True False",
        ),
        ("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}", "<s>True"),
    ],
)
def test_environment_of_transformers(source, text):
    assert render_chat(jinja(source, bos_token="<s>"), [user("<é>")]) == text


# Malicious and broken templates


@pytest.fixture
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "RENDER_TIMEOUT", 0.3)


NESTED = "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "comparing": NESTED + "{% set a = n.x %}" + NESTED + "{{ a == n.x }}",
    "writing": NESTED + "{{ n.x }}",
    "a huge power": "{{ messages | length * 3 ** (3 ** 20) }}",
}
BROKEN = {
    "a long text": ("{{ 'a' * 10 ** 10 }}", "it takes more than 512 MB of memory"),
    "a wide text": ("{{ 'a'.center(10 ** 10) }}", "it takes more than 512 MB of memory"),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "it takes more than 512 MB of memory",
    ),
    "much text": ("{{ 'a' * 5000000 }}", "it writes 5000000 characters; the limit is 4194304"),
    "a long range": ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "deep brackets": ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "RecursionError"),
    "a class": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
    "globals": ("{{ raise_exception.__globals__.x }}", "SecurityError: access to attribute '__globals__'"),
    "format": ("{{ '{0.__class__.x}'.format(1) }}", "SecurityError: access to attribute '__class__'"),
    "a namespace": (
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "SecurityError: a namespace may not",
    ),
    "changing messages": ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("a\n{% if %}", "line 2: Expected an expression"),
    "undefined": ("{{ foo() }}", "UndefinedError: 'foo' is undefined"),
    "undefined deep": ("{{ messages[0].a.b }}", "UndefinedError"),
    "a bad format": ("{{ '%d' % 'a' }}", "TypeError"),
}


def assert_one_line(error: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
@pytest.mark.usefixtures("_short_timeout")
def test_endless_templates_are_stopped(source):
    with pytest.raises(
        TokenizerError, match=r"the chat template took more than 0.3 s and was stopped; "
    ) as error:
        render_chat(jinja(source), [user("a")])
    assert_one_line(error)
    assert render_chat(jinja("{{ messages[0].content }}"), [user("fine")]) == "fine"


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_templates_are_one_line(source, message):
    with pytest.raises(
        TokenizerError, match=rf"the chat template does not render: .*{re.escape(message)}"
    ) as error:
        render_chat(jinja(source), [user("a")])
    assert_one_line(error)
    assert "; fix it, or give another template" in str(error.value)


def test_raise_exception():
    source = "{{ raise_exception('roles must\n alternate' + 'e' * 1000) }}"
    with pytest.raises(
        InputError, match="the chat template refuses these messages: roles must alternateee"
    ) as error:
        render_chat(jinja(source), [user("a")])
    assert_one_line(error)


# The worker process


def test_process_is_reused():
    render_chat(jinja("a"), [user("a")])
    first = process.RENDERER._worker._process
    for i in range(20):
        assert render_chat(jinja("{{ messages[0].content }}"), [user(str(i))]) == str(i)
    assert process.RENDERER._worker._process is first


def test_threads_get_their_own_responses():
    def render(i: int) -> str:
        return render_chat(jinja("{{ messages[0].content }}"), [user(str(i))])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(render, range(200))) == [str(i) for i in range(200)]


@pytest.fixture
def ctrl_c():
    """Python's default SIGINT handler: shells start background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_no_stale_response():
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        render_chat(jinja(ENDLESS["loops"]), [user("a")])
    timer.join()
    assert render_chat(jinja("{{ messages[0].content }}"), [user("next")]) == "next"


def test_dead_process_is_restarted():
    render_chat(jinja("a"), [user("a")])
    first = process.RENDERER._worker._process
    first.kill()
    first.wait()
    assert render_chat(jinja("b"), [user("a")]) == "b"


def test_fork_has_its_own_process():
    code = (
        "import os\n"
        "from llama_jax.chat.process import RENDERER\n"
        "def render(n): return [RENDERER.render('t', '{{ n }}', {'n': n + i}) for i in range(50)]\n"
        "assert render(0)[0] == '0'\n"
        "first, child = RENDERER._worker._process, os.fork()\n"
        "n = 100 if child else 500\n"
        "assert render(n) == [str(n + i) for i in range(50)]\n"
        "assert (RENDERER._worker._process is first) == bool(child)\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_cannot_be_started(monkeypatch):
    process.RENDERER.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TokenizerError, match=r"'/nowhere/python' cannot be started .*check sys.executable"):
        render_chat(jinja("a"), [user("a")])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TokenizerError, match="exited at startup; check that it can `import jinja2`"):
        render_chat(jinja("a"), [user("a")])
