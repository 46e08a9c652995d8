"""Chat templates as text, rendered by template_process.py, which a hostile one can only end."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from dcod_jax.data import template_process
from dcod_jax.errors import DcodError
from dcod_jax.files import as_path

CPU_SECONDS, WALL_SECONDS = 5.0, 120.0  # for one text


# Ready templates that keep the reasoning of every turn; student.chat_template takes their names.
READY = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "deepseek_r1": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "<｜Assistant｜>{{ message['content'] }}{{ eos_token }}{% elif message['role'] == 'user' %}"
        "<｜User｜>{{ message['content'] }}{% else %}{{ message['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    ),
}
DATE = "2024-07-26"  # what a template's clock shows, so that a trace has the same tokens every day
_DATED = re.compile(r"\{# dcod_jax: date (\S+) #\}")
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


class TemplateError(DcodError):
    """A template that refuses the messages, fails, or does not end within its limits."""


class _Renderer:
    """The process, started with the first request and again after a template ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.known: dict[str, dict[str, Any]] = {}  # the replies to what was asked for ahead
        self.template = ""  # of `known`
        self.lock = threading.Lock()

    def ask(self, template: str, text: str) -> dict[str, Any]:
        known = self.known if template == self.template else {}
        return known.get(text) or self._exchange(template, [text])[0]

    def ask_ahead(self, template: str, texts: Sequence[str]) -> None:
        """One exchange for texts not all known; where it fails, each will be asked by itself."""
        if template != self.template or not self.known.keys() >= set(texts):
            replies = self._exchange(template, texts)
            whole = not any("limit" in reply for reply in replies)
            self.known = dict(zip(texts, replies, strict=True)) if whole else {}
            self.template = template

    def _exchange(self, template: str, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The reply to each text; {"limit"} where the process ended."""
        shared = json.dumps({"template": template, "date": _date(template)})
        content = f"[{shared}, [{', '.join(texts)}]]\n".encode()
        code = -signal.SIGKILL
        for _ in range(2):  # the kernel, short of memory, may have killed it for another's
            with self.lock:
                process = self.process = self.process or _start()
                stdin, stdout = _pipes(process)
                try:
                    stdin.write(content)
                    stdin.flush()
                    reply = stdout.readline()
                except BrokenPipeError:
                    reply = b""
                if reply.endswith(b"\n"):
                    return json.loads(reply)
                code = process.wait()
                self._close()
            if code != -signal.SIGKILL:
                break
        limits = {
            -signal.SIGPROF: f"{CPU_SECONDS:g} s of CPU",
            -signal.SIGALRM: f"{WALL_SECONDS:g} s",
        }
        reason = limits.get(code, f"its process can do (it ended with {code})")
        return [{"limit": reason} for _ in texts]

    def close(self) -> None:
        with self.lock:
            self._close()

    def _close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in _pipes(self.process):
                with contextlib.suppress(BrokenPipeError):  # of what was not sent to it
                    pipe.close()
            self.process = None


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """(its input, its output)."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the template process was started without pipes")
    return process.stdin, process.stdout


def _start() -> subprocess.Popen[bytes]:
    file = str(template_process.__file__)
    return subprocess.Popen(
        # -P: this directory hides no module of the library.
        [sys.executable, "-P", file, str(CPU_SECONDS), str(WALL_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


@functools.lru_cache(maxsize=1)
def _renderer(process: int) -> _Renderer:
    """The renderer of the process with this id: a forked child needs its own."""
    renderer = _Renderer()
    atexit.register(renderer.close)
    return renderer


@dataclasses.dataclass(frozen=True)
class TemplateChoice:
    """What stands in place of a tokenizer's own template, and the values of its variables."""

    file: str = ""  # a Jinja file or a name of READY; empty: the tokenizer's own
    variables: tuple[str, ...] = ()  # "enable_thinking=false"
    date: str = DATE

    @property
    def given(self) -> bool:
        """Whether it is anything but the tokenizer's own template."""
        return self != OWN


OWN = TemplateChoice()


def template_of(student: Any) -> TemplateChoice:
    """The choice of config.student."""
    return TemplateChoice(
        student.chat_template, tuple(map(str, student.template_kwargs)), student.template_date
    )


def choice_errors(variables: Mapping[str, Sequence[Any]], date: str) -> list[str]:
    """What is wrong in the template_kwargs, by their keys, and in student.template_date."""
    wrong = [
        f"{key} has {text!r}; expected name=value, as in enable_thinking=false"
        for key, texts in variables.items()
        for text in texts
        if "=" not in str(text) or not _VARIABLE.fullmatch(str(text).partition("=")[0])
    ]
    if not _DAY.fullmatch(date) or not _is_day(date):
        wrong.append(f"student.template_date={date!r} must be a day such as {DATE}")
    return wrong


def _is_day(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def with_choice(own: str | None, choice: TemplateChoice) -> str | None:
    """The template's text with the choice written into it, so that it goes where the text goes."""
    template = own
    if choice.file in READY:
        template = READY[choice.file]
    elif choice.file:
        try:
            template = as_path(choice.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DcodError(
                f"student.chat_template={choice.file}: {error}; expected a Jinja file, or one of "
                f"{', '.join(READY)}"
            ) from error
    lead = "".join(map(_assignment, choice.variables))
    if choice.date != DATE:
        lead = f"{{# dcod_jax: date {choice.date} #}}{lead}"
    if lead and not template:
        raise DcodError(
            "student.template_kwargs and .template_date need a chat template, and the tokenizer "
            "has none; set student.chat_template"
        )
    return template if not template or template.startswith(lead) else lead + template


def clock(template: str) -> dict[str, Any]:
    """The names under which a template finds the date, as transformers would give them."""
    day = datetime.datetime.fromisoformat(_date(template))
    return {"strftime_now": day.strftime, "date_string": day.strftime("%d %b %Y")}


def _date(template: str) -> str:
    return dated[1] if (dated := _DATED.match(template)) else DATE


def _assignment(text: str) -> str:
    """enable_thinking=false as Jinja that a caller's own value still overrides."""
    name, _, value = text.partition("=")
    words = {"true": "true", "false": "false", "none": "none", "null": "none"}
    plain = words.get(value.lower()) or (value if re.fullmatch(r"-?\d+(\.\d+)?", value) else None)
    literal = json.dumps(value) if plain is None else plain
    return f"{{% set {name} = {name} if {name} is defined else {literal} +%}}"


def render_ahead(
    template: str, texts: Sequence[tuple[Sequence[dict[str, Any]], dict[str, Any]]]
) -> None:
    """Have what `render` will be asked for, (messages, names) each, rendered in one exchange.

    Nothing is done where that of the last call is asked for again, in part or whole.
    """
    _renderer(os.getpid()).ask_ahead(template, [json.dumps(text) for text in texts])


def render(
    template: str, messages: Sequence[dict[str, Any]], names: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """(text, the characters [start, end) in generation markers) of messages.

    names are further variables of the template, such as add_generation_prompt; its clock shows
    DATE, or the date that `with_choice` wrote into it. Raises TemplateError when the template
    refuses the messages, fails, or passes its limits of time, memory and length.
    """
    reply = _renderer(os.getpid()).ask(template, json.dumps((messages, names)))
    if "text" not in reply:
        why = f"needs more than {reply.get('limit')} for one conversation"
        why = f"refuses them: {reply['refused']}" if "refused" in reply else why
        raise TemplateError(f"the chat template {why}; give another one (student.chat_template)")
    return reply["text"], [(start, end) for start, end in reply["spans"]]
