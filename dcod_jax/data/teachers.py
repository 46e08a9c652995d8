"""The teachers of a configuration, by name, and which of them a trace is of.

teacher.* and score.server name one teacher for all traces. score.teachers names several, and each
scores its own: the traces whose prepare.teacher_field says its name, or that come from its files.
"""

from __future__ import annotations

import fnmatch
import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dcod_jax.errors import DcodError, nearest

DIALECTS = ("vllm", "sglang", "llama_cpp", "llama_server")
TEACHER, WEIGHT = "teacher", "weight"  # in the meta of a prepared trace


class TeacherEntry(NamedTuple):
    """Where one teacher is: a path, or a server that knows it as `model`."""

    name: str  # empty: the only one, of all traces
    path: str = ""
    server: str = ""
    model: str = ""
    dialect: str = DIALECTS[0]
    revision: str = ""
    dtype: str = "bfloat16"
    files: str = ""  # pattern of the raw files whose traces are its own
    tokenizer: str = ""  # its directory; empty: beside the path; behind a server the student's
    chat_template: str = ""  # of a teacher whose tokenizer is not the student's
    template_kwargs: str = ""  # joined by commas


_EXAMPLE = '"a path=models/A", "b server=http://host:8000 model=Qwen/B files=traces/b*.jsonl"'


def parse_teacher(text: str) -> TeacherEntry:
    """The entry of "a path=models/A" or "b server=http://host:8000 model=Qwen/B dialect=vllm".

    Raises ValueError that names what is wrong in it.
    """
    name, *pairs = re.split(r"\s+(\w+)=", text.strip())
    keys = dict(zip(pairs[::2], map(str.strip, pairs[1::2]), strict=True))
    if len(keys) < len(pairs) // 2:
        raise ValueError(f"score.teachers: {text!r} has a key twice; leave one of the two")
    known = TeacherEntry._fields[1:]
    if not re.fullmatch(r"[\w.+/:-]{1,200}", name):
        raise ValueError(f"score.teachers: {text!r} has no name; expected entries as {_EXAMPLE}")
    for key, value in keys.items():
        if key not in known or not value:
            hint = nearest(key, known) if value else "; it is empty"
            raise ValueError(
                f"score.teachers: {text!r} has {key}={value}; behind the name come "
                f"{', '.join(f'{k}=' for k in known)}{hint}"
            )
    entry = TeacherEntry(name, **keys)
    if bool(entry.path) == bool(entry.server):
        raise ValueError(f"score.teachers: {text!r} must have either path= or server=")
    if entry.dialect not in DIALECTS:
        raise ValueError(
            f"score.teachers: {text!r}: dialect must be one of {', '.join(DIALECTS)}"
            f"{nearest(entry.dialect, DIALECTS)}"
        )
    if entry.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"score.teachers: {text!r}: dtype must be bfloat16 or float32")
    return entry._replace(model=entry.model or name) if entry.server else entry


def parse_weight(text: str) -> tuple[str, float]:
    """(name, weight) of "a=0.5"; raises ValueError where it is no finite number >= 0."""
    name, _, value = text.rpartition("=")
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not name or not 0 <= weight < math.inf:
        raise ValueError(
            f"loss.teacher_weights: {text!r} must be a teacher's name and a finite weight >= 0, "
            "such as a=0.5"
        )
    return name, weight


def _no_url(server: str) -> bool:
    """Whether a text is no http:// or https:// URL of a host that a request can be sent to."""
    try:
        parts, address = urllib.parse.urlsplit(server), re.fullmatch("[!-~]+", server)
        more = parts.query or parts.fragment or "@" in parts.netloc
        (parts.hostname or "").encode("idna")
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        return not known or not address or bool(more)
    except ValueError:  # of the port, of the host's name
        return True


def config_errors(flat: Mapping[str, Any]) -> list[str]:
    """What is wrong in score.teachers, score.server and loss.teacher_weights."""
    wrong: list[str] = []
    dialects = {flat["score.dialect"]} if flat["score.server"] else set()
    servers = [flat["score.server"]]
    names: dict[str, list[str]] = {"score.teachers": [], "loss.teacher_weights": []}
    for key, parse in (("score.teachers", parse_teacher), ("loss.teacher_weights", parse_weight)):
        for text in flat[key]:
            try:
                entry = parse(text)
                names[key].append(entry[0])
                dialects.add(getattr(entry, "dialect", ""))
                servers.append(getattr(entry, "server", ""))
            except ValueError as error:
                wrong.append(str(error))
        if twice := sorted({n for n in names[key] if names[key].count(n) > 1}):
            wrong.append(f"{key}: {', '.join(twice)} is named more than once")
    wrong += [
        f"{text!r} is no URL of a server (score.server, or server= in score.teachers); expected "
        "one such as http://host:8000"
        for text in filter(None, servers)
        if _no_url(text)
    ]
    server = flat["score.server"]
    if flat["score.teachers"] and (flat["teacher.path"] or server):
        wrong.append(
            "score.teachers and teacher.path (or score.server) are both set; name all teachers in "
            "score.teachers, or one in the others"
        )
    elif server and flat["teacher.path"]:
        wrong.append("score.server and teacher.path are both set; one of them scores the traces")
    elif server and not flat["teacher.name"]:
        wrong.append("score.server needs teacher.name, the name that the server has for the model")
    if flat["score.top_k"] and "llama_cpp" in dialects:
        wrong.append(
            f"score.top_k={flat['score.top_k']}: the dialect llama_cpp names the most probable "
            "tokens by their texts, and special tokens have none there; set score.top_k=0 (the "
            "trace token), or serve the model with llama-server, vLLM or SGLang"
        )
    return wrong


def teacher_entries(config: Any) -> list[TeacherEntry]:
    """The teachers that score the traces; [] where the config names none."""
    if config.score.teachers:
        return [parse_teacher(text) for text in config.score.teachers]
    teacher, score = config.teacher, config.score
    if not teacher.path and not score.server:
        return []
    return [
        TeacherEntry(
            "",
            path=teacher.path,
            server=score.server,
            model=teacher.name,
            dialect=score.dialect,
            revision=teacher.revision,
            dtype=teacher.dtype,
            tokenizer=teacher.tokenizer,
            chat_template=teacher.chat_template,
            template_kwargs=",".join(map(str, teacher.template_kwargs)),
        )
    ]


def teacher_paths(config: Any) -> dict[str, str]:
    """{"teacher": path}, or {"teacher-a": path, ...} of several; without those behind a server."""
    if not config.score.teachers:
        return {"teacher": config.teacher.path} if config.teacher.path else {}
    found = teacher_entries(config)
    return {f"teacher-{e.name.replace('/', '_')}": e.path for e in found if e.path}


def teacher_of_file(entries: Sequence[TeacherEntry], source: str) -> str:
    """The teacher whose files "traces/b-1.jsonl:17" is of, or ""; DcodError where it is several."""
    file = source.rpartition(":")[0] or source
    found = [e.name for e in entries if e.files and fnmatch.fnmatchcase(file, e.files)]
    if len(found) > 1:
        raise DcodError(f"{file} is of the files of {' and '.join(found)} in score.teachers")
    return found[0] if found else ""


def teacher_of_trace(trace_id: str, meta: Mapping[str, Any], names: Sequence[str]) -> str:
    """The teacher that a prepared trace names; DcodError where it is none of `names`."""
    name = meta.get(TEACHER, "")
    if name in names:
        return name
    said = f"names the teacher {name!r}" if name else "names no teacher"
    hint = nearest(str(name), names)
    raise DcodError(
        f"trace {trace_id!r} {said}, and score.teachers has {', '.join(names)}{hint}; give its "
        "record the field that prepare.teacher_field names (teacher), or a teacher "
        "files=PATTERN of the raw files that are its own, and prepare again"
    )
