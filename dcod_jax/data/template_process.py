"""Renders chat templates under limits of time and memory; templates.py runs it, by path.

A template comes with a model that somebody published. It runs in jinja2's sandbox, in this process
alone, with the environment of transformers (the same filters, globals and generation markers), so
a good template gives the same text. The kernel ends the process at a limit.
"""

import functools
import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of this process
LONGEST_TEMPLATE, LONGEST_TEXT = 1 << 20, 1 << 26  # characters


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: the places of the text that it wraps."""

    tags = {"generation"}  # noqa: RUF012, of the base class

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(written=0, spans=[])

    def parse(self, parser: Any) -> Any:
        """The block between {% generation %} and its end, whose text is marked."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text, environment = caller(), vars(self.environment)
        environment["spans"].append((environment["written"], environment["written"] + len(text)))
        return text


class PlainDict:
    """dict(...) without the methods and attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """namespace(...), whose attributes cannot begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > LONGEST_TEMPLATE:
        raise jinja2.TemplateError(f"it has {len(template)} characters, not {LONGEST_TEMPLATE}")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "dict": PlainDict(), "namespace": Namespace}
    return environment.from_string(template)


_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def render(
    template: str, messages: list[dict[str, Any]], names: dict[str, Any], date: str
) -> dict[str, Any]:
    """{"text", "spans"}: the text, and the characters [start, end) in generation markers.

    date (ISO) is the day that the template's clock shows.
    """
    day = datetime.fromisoformat(date)
    compiled = _compiled(template)
    state = vars(compiled.environment)
    state["written"], state["spans"] = 0, []
    parts = []
    values = {"messages": list(map(_with_reasoning, messages)), "tools": None, "documents": None}
    values |= {"strftime_now": day.strftime, "date_string": day.strftime("%d %b %Y")}
    for part in compiled.generate(**(values | names)):
        parts.append(part)
        state["written"] += len(part)
        if state["written"] > LONGEST_TEXT:
            raise jinja2.TemplateError(f"its text has more than {LONGEST_TEXT} characters")
    return {"text": "".join(parts), "spans": state["spans"]}


def answer(
    messages: list[dict[str, Any]], names: dict[str, Any], *, template: str, date: str
) -> dict[str, Any]:
    """The reply to one text; {"refused": ...} for what the template or the sandbox refuses."""
    try:
        return render(template, messages, names, date)
    except jinja2.TemplateError as error:
        return {"refused": str(error) or type(error).__name__}
    except MemoryError:
        return {"limit": f"{MEMORY >> 20} MiB of memory"}
    # Whatever Python raises in a stranger's template is a finding about that template.
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    """Answer the lines of stdin, each text within limits of memory and time (argv: seconds)."""
    cpu_seconds, wall_seconds = map(float, sys.argv[1:])
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one

    def limited(text: list[Any], shared: dict[str, str]) -> bytes:
        # At the end of a timer its signal's default action ends the process.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds)
        reply = json.dumps(answer(*text, **shared)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return reply

    for line in sys.stdin.buffer:  # [{"template", "date"}, [[messages, names], ...]]
        shared, texts = json.loads(line)
        replies = [limited(text, shared) for text in texts]
        sys.stdout.buffer.write(b"[%b]\n" % b",".join(replies))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
