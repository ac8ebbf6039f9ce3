"""Renders chat templates in a worker process (`sandbox`), which process.py kills after a timeout.

A template is an untrusted program. jinja2's sandbox keeps it from the machine, but cannot interrupt one long
operation of the interpreter (`'a' * 10**10`, comparing lists nested fifty deep): that takes a process that
can be killed.

A request has `source`, the template, and `variables`. The response has one key: `text`; `refused`, the
message of the template's `raise_exception`; or `error`.
"""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_MEMORY = 1 << 29  # bytes of address space
MAX_CHARACTERS = 1 << 22  # of a rendered text; longer than any context


class RefusedError(jinja2.TemplateError):
    """Raised by a template through `raise_exception`."""


class GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}` of transformers, which marks the assistant's text; renders its body."""

    tags = {"generation"}  # noqa: RUF012  # declared like this in jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Namespace(jinja2.utils.Namespace):
    """jinja2's `namespace`, without names that begin with an underscore, such as `__class__`."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: a template may use that name
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
        raise jinja2.exceptions.SecurityError(f"a namespace may not contain {name!r}")


def _raise_exception(message: object) -> None:
    raise RefusedError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> jinja2.Environment:
    """Returns a sandboxed jinja2 environment with the settings of Hugging Face's transformers."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    env.globals["namespace"] = Namespace
    return env


@functools.lru_cache(maxsize=8)
def _compile_template(source: str) -> jinja2.Template:
    return environment().from_string(source)


def respond(request: dict[str, Any]) -> dict[str, str]:
    """Renders the template of one request."""
    try:
        text = _compile_template(request["source"]).render(request["variables"])
    except MemoryError:
        return {"error": f"it takes more than {MAX_MEMORY >> 20} MB of memory"}
    except RefusedError as error:
        return {"refused": str(error)[:300]}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:300]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it writes {len(text)} characters; the limit is {MAX_CHARACTERS}"}
    return {"text": text}
