"""The program that renders chat templates, in a process of its own that can be stopped.

A template is a program that came with a model. jinja2's sandbox keeps it from the machine, but nothing
inside a process can cut short one long operation of its interpreter (`'a' * 10**10`, comparing lists nested
fifty deep), so process.py starts this file, gives it a deadline, and kills it when that has passed.

Each line of stdin is a JSON object with `source`, the template, and `variables`; each is answered by a line
on stdout with one of `text`; `refused`, what the template itself says is wrong with the messages; `error`.
"""

from __future__ import annotations

import datetime
import functools
import json
import signal
import sys
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

try:
    import resource
except ImportError:  # Windows: the deadline alone bounds memory
    resource = None  # type: ignore[assignment]

MEMORY = 1 << 29  # bytes that this process may take
LONGEST = 1 << 22  # characters of a rendered text, more than any context holds


class Refused(jinja2.TemplateError):
    """What a template raises about the messages it was given."""


class GenerateOutput(jinja2.ext.Extension):
    """`{% generation %}`, which marks for trainers what the assistant says, and changes no text."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Namespace(jinja2.utils.Namespace):
    """jinja2's `namespace`, without the names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be the name of a variable
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _refuse(message: object) -> None:
    raise Refused(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> jinja2.Environment:
    """Returns what chat templates expect of jinja2: the settings of Hugging Face's transformers."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerateOutput, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    made.globals["namespace"] = Namespace
    return made


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Renders one request."""
    try:
        text = _compiled(request["source"]).render(request["variables"])
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MB of memory"}
    except Refused as error:
        return {"refused": str(error)[:300]}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:300]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text)} characters; at most {LONGEST} can be used"}
    return {"text": text}


def _limit(kind: int, most: int) -> None:
    """Lowers the limit of one resource to `most`, if it is above."""
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or hard > most:
        resource.setrlimit(kind, (most, hard))


def main() -> None:
    """Answers requests until stdin ends; its argument is how many seconds one may take."""
    seconds = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C here, too
    if resource:
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_AS, MEMORY)
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        if resource:  # for the case that nobody is left to keep the deadline
            usage = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + seconds + 2)
        out.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
