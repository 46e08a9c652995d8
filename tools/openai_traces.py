"""Sample traces from an OpenAI-compatible server (vLLM, SGLang, an API): JSONL that prepare reads.

    vllm serve Qwen/Qwen2.5-7B-Instruct &
    python tools/openai_traces.py prompts.jsonl traces.jsonl --model Qwen/Qwen2.5-7B-Instruct --n 4

Each prompt ({"prompt" | "question" | "problem" | "messages", "answer"?, "id"?}) is asked n times,
one request for each sample, --concurrency at a time. Refused (429), failed (5xx), dropped and
unreadable answers are asked again with growing pauses. Every answer is one appended line in the
form of a batch output, with the request beside it: prepare reads prompt, completion, answer and,
with --logprobs, the token log-probs. The same command again asks for what is missing only; a last
line that was cut off is removed first. Standard library only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import http.client
import json
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PROMPT_FIELDS = ("prompt", "question", "problem", "instruction")
REASONING = ("reasoning_content", "reasoning", "thinking")  # beside a content that may be null
AGAIN = (408, 409, 425, 429)  # and every 5xx: the server may answer the same request later
REFUSED = (401, 403, 404, 405)  # the same for every request
LONGEST_PAUSE = 60.0  # seconds between two attempts, whatever the server asks for


class MistakeError(Exception):
    """An argument or a file that must be mended first."""


class RefusedError(Exception):
    """No request will be answered: a wrong key, model or URL."""


class BadRequestError(Exception):
    """This one request will never be answered, such as a prompt that is too long."""


class UnavailableError(Exception):
    """An attempt that failed; `pause` is how long the server asks to wait, if it does."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


# ---------------------------------------------------------------- prompts and what is answered


def read_prompts(path: Path, *, system: str, field: str) -> list[dict[str, Any]]:
    """{"id", "messages", the record's other fields} of each line; MistakeError for a bad one."""
    prompts, seen = [], {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MistakeError(f"{path}: {error.strerror}; expected a JSONL file of prompts") from None
    except UnicodeDecodeError as error:
        raise MistakeError(f"{path}: not UTF-8 at byte {error.start}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MistakeError(f"{where}: not JSON: {error}") from None
        messages = _messages(record, field=field, where=where)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        key = str(number - 1 if record.get("id") is None else record["id"])
        if key in seen:
            raise MistakeError(f"{where}: id {key!r} was used before at {seen[key]}")
        seen[key] = where
        rest = {k: v for k, v in record.items() if k not in (*PROMPT_FIELDS, "messages", "id")}
        prompts.append({"id": key, "messages": messages, "rest": rest})
    if not prompts:
        raise MistakeError(f"{path}: no prompts; expected one JSON object a line")
    return prompts


def _messages(record: Any, *, field: str, where: str) -> list[dict[str, Any]]:
    """The chat messages of a prompt; text is one user message."""
    names = (field,) if field else (*PROMPT_FIELDS, "messages")
    values = record if isinstance(record, dict) else {}
    name = next((n for n in names if values.get(n) is not None), None)
    if name is None:
        raise MistakeError(
            f"{where}: no prompt; expected one of {', '.join(names)}, got {str(record)[:60]}; "
            "--prompt-field names another one"
        )
    value = values[name]
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    turns = value if isinstance(value, list) else []
    if turns and all(isinstance(m, dict) and m.get("role") and m.get("content") for m in turns):
        return turns
    raise MistakeError(
        f'{where}: {name} must be non-empty text or a list of {{"role", "content"}} messages, '
        f"got {str(value)[:60]!r}"
    )


def repair(path: Path) -> int:
    """Remove a last line that was cut off by a crash; returns the bytes removed."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        size = keep = file.seek(0, os.SEEK_END)
        while keep:  # back to the end of the last whole line
            start = max(0, keep - (1 << 16))
            file.seek(start)
            block = file.read(keep - start)
            place = block.rfind(b"\n")
            if place >= 0:
                keep = start + place + 1
                break
            keep = start
        file.truncate(keep)
    return size - keep


def answered(path: Path, bodies: dict[str, dict[str, Any]]) -> set[str]:
    """The custom_ids that the file has, without a last line that was cut off.

    MistakeError when it is not a file of this tool, or one was asked with another request.
    """
    found: set[str] = set()
    if not path.exists():
        return found
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (found or _begins_a_record(line)):
                break
            try:
                record = json.loads(line)
                name, body = record["custom_id"], record["request"]["body"]
            except (ValueError, KeyError, TypeError) as error:
                raise MistakeError(
                    f"{path}:{number}: not a line of this tool ({error!r}); name another output"
                ) from None
            if name in bodies and body != bodies[name]:
                changed = [
                    k for k in {**body, **bodies[name]} if body.get(k) != bodies[name].get(k)
                ]
                raise MistakeError(
                    f"{path}:{number}: {name} was asked with other {', '.join(changed)}; name "
                    "another output, or give what it was begun with"
                )
            found.add(name)
    return found


def _begins_a_record(line: bytes) -> bool:
    """Whether a file's only line may be one of ours that was cut off: an unfinished object."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b'{"')
    return False


# ---------------------------------------------------------------- one request


def body_of(options: argparse.Namespace, messages: list[dict[str, str]], seed: int) -> dict:
    """The chat completion request of one sample."""
    body: dict[str, Any] = {
        "model": options.model,
        "messages": messages,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "seed": seed,
    }
    body |= {
        name: value
        for name, value, default in (
            ("top_p", options.top_p, 1.0),
            ("top_k", options.top_k, 0),
            ("min_p", options.min_p, 0.0),
            ("stop", options.stop, []),
        )
        if value != default
    }
    if options.logprobs:
        body |= {"logprobs": True}
    return body | json.loads(options.extra)


def ask(options: argparse.Namespace, body: dict[str, Any]) -> dict[str, Any]:
    """One attempt; raises UnavailableError, BadRequestError or RefusedError."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(options.key_variable, "")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    url = options.url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=options.timeout) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read()[:500].decode("utf-8", "replace")
        if error.code in AGAIN or error.code >= 500:
            raise UnavailableError(f"{error.code} {text}", _wait(error.headers)) from None
        kind = RefusedError if error.code in REFUSED else BadRequestError
        raise kind(f"{error.code} {text}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from None
    if not isinstance(answer, dict) or not answer.get("choices"):
        raise UnavailableError(f"an answer without choices: {str(answer)[:200]}")
    _check(answer["choices"][0], body)
    return answer


def _check(choice: Any, body: dict[str, Any]) -> None:
    """Refuse what prepare could not read, before a night of it is on the disk."""
    message = choice.get("message") if isinstance(choice, dict) else None
    said = message if isinstance(message, dict) else {}
    text = said.get("content")
    if not isinstance(text, str | list) and not any(said.get(key) for key in REASONING):
        raise BadRequestError(f"an answer without text: {str(choice)[:200]}")
    if body.get("logprobs") and text and not choice.get("logprobs"):
        raise RefusedError("its answers have no log-probs; leave --logprobs out and run score")


def _wait(headers: Any) -> float | None:
    """Seconds of a Retry-After header."""
    try:
        return float(headers.get("Retry-After", ""))
    except ValueError:
        return None


def ask_until_answered(
    options: argparse.Namespace, body: dict[str, Any], stopped: threading.Event
) -> dict[str, Any]:
    """Attempts with pauses that double, each shortened at random by up to a half."""
    for attempt in range(options.retries + 1):
        if stopped.is_set():
            raise UnavailableError("stopped")
        try:
            return ask(options, body)
        except UnavailableError as error:
            if attempt == options.retries:
                raise
            pause = min(options.pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            stopped.wait(min(max(pause, error.pause or 0.0), LONGEST_PAUSE))
    raise AssertionError("unreachable")


# ---------------------------------------------------------------- all of them


def seed_of(options: argparse.Namespace, name: str) -> int:
    """Follows from --seed and the sample's name: the order of answers does not matter."""
    return int.from_bytes(hashlib.sha256(f"{options.seed}/{name}".encode()).digest()[:4]) >> 1


def jobs(
    options: argparse.Namespace, prompts: list[dict[str, Any]]
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """{custom_id: (prompt, request body)} of every sample."""
    found = {}
    for prompt in prompts:
        for sample in range(options.n):
            name = f"{prompt['id']}-{sample}"
            body = body_of(options, prompt["messages"], seed_of(options, name))
            found[name] = (prompt, body)
    return found


def run(options: argparse.Namespace) -> int:
    """Ask for everything that is missing; returns the number of samples that failed."""
    prompts = read_prompts(options.prompts, system=options.system, field=options.prompt_field)
    wanted = jobs(options, prompts)
    if options.output.is_dir() or options.output.resolve() == options.prompts.resolve():
        raise MistakeError(f"{options.output}: the output must be a file of its own")
    done = answered(options.output, {name: body for name, (_, body) in wanted.items()})
    # Only now: a file that is not this tool's stays as it is, to the last byte.
    if removed := repair(options.output):
        print(f"{options.output}: removed a last line that was cut off ({removed} bytes)")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    missing = [name for name in wanted if name not in done]
    print(f"{len(wanted) - len(missing)} samples are there, {len(missing)} missing", flush=True)
    stopped, failed, shown = threading.Event(), 0, time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(options.concurrency)
    try:
        with open(options.output, "ab") as file:
            waiting = {
                pool.submit(ask_until_answered, options, wanted[name][1], stopped): name
                for name in missing
            }
            for count, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                name = waiting.pop(future)
                try:
                    _append(file, name, *wanted[name], future.result())
                except (UnavailableError, BadRequestError) as error:
                    failed += 1
                    print(f"{name}: gave up: {error}", file=sys.stderr)
                if time.monotonic() - shown > 15:
                    shown = time.monotonic()
                    print(f"{count} of {len(missing)}, {failed} failed", flush=True)
    finally:  # also after a refusal and Ctrl-C: nothing new is begun
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"{options.output}: {len(wanted) - failed} of {len(wanted)} samples, {failed} failed")
    return failed


def _append(
    file: Any, name: str, prompt: dict[str, Any], body: dict[str, Any], answer: dict[str, Any]
) -> None:
    record = {
        **prompt["rest"],
        "custom_id": name,
        "request": {"body": body},
        "response": {"status_code": 200, "body": answer},
        "error": None,
    }
    file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
    file.flush()
    os.fsync(file.fileno())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompts", type=Path, help="JSONL of prompts")
    add("output", type=Path, help="JSONL to append the answers to")
    add("--model", required=True, help="the name the server knows the model by")
    add("--url", default="http://localhost:8000/v1", help="base URL (default %(default)s)")
    add("--key-variable", default="OPENAI_API_KEY", help="environment variable with the API key")
    add("--n", type=int, default=1, help="samples for each prompt (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="of sampling (default %(default)s)")
    add("--top-p", type=float, default=1.0, help="nucleus (default: off)")
    add("--top-k", type=int, default=0, help="vLLM and SGLang (default: off)")
    add("--min-p", type=float, default=0.0, help="vLLM and SGLang (default: off)")
    add("--max-tokens", type=int, default=2048, help="of a completion (default %(default)s)")
    add("--stop", action="append", default=[], help="text that ends a completion; repeatable")
    add("--seed", type=int, default=0, help="each sample's seed follows from it")
    add("--logprobs", action="store_true", help="ask for the log-probs of the sampled tokens")
    add("--system", default="", help="system message for prompts that have none")
    add("--prompt-field", default="", help="name of the prompt field")
    add(
        "--extra",
        default="{}",
        help="JSON object of further request fields, such as "
        '{"return_token_ids": true} (vLLM: exact token ids beside the log-probs)',
    )
    add("--concurrency", type=int, default=32, help="requests at a time (default %(default)s)")
    add("--retries", type=int, default=8, help="further attempts (default %(default)s)")
    add("--pause", type=float, default=1.0, help="seconds before the first of them; it doubles")
    add("--timeout", type=float, default=600.0, help="seconds for one answer")
    options = parser.parse_args(argv)
    if options.n < 1 or options.concurrency < 1 or options.retries < 0:
        parser.error("--n and --concurrency must be at least 1, --retries not negative")
    if options.max_tokens < 1 or options.timeout <= 0 or options.temperature < 0:
        parser.error("--max-tokens and --timeout must be above 0, --temperature not negative")
    if not options.url.startswith(("http://", "https://")):
        parser.error(f"--url {options.url}: expected http://HOST:PORT/v1 or https://...")
    try:
        if not isinstance(json.loads(options.extra), dict):
            parser.error("--extra must be a JSON object")
    except json.JSONDecodeError as error:
        parser.error(f"--extra: {error}")
    return options


def main(argv: list[str]) -> int:
    """0: everything answered; 1: some samples failed (run again); 2: something must be mended."""
    try:
        return 1 if run(parse(argv)) else 0
    except MistakeError as error:
        print(error, file=sys.stderr)
        return 2
    except RefusedError as error:
        print(f"the server refuses the request: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # requests under way are not waited for; what was answered is on the disk


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
