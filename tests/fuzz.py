"""Mutated files of every kind that is read, and what reads them; only DcodError may come out."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import tiny
from fake_traces import make_traces

from dcod_jax.config import BASE, load_recipe
from dcod_jax.data import chat
from dcod_jax.data.dataset import DatasetWriter, TraceDataset
from dcod_jax.data.presets import Fields
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.data.traces import find_sources, read_traces
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.problems import read_problems
from dcod_jax.files import file_entry, to_json
from dcod_jax.models import gguf, gguf_tokenizer, hf
from dcod_jax.report import command as report
from dcod_jax.report import data as report_data

MESSAGES = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]
JUNK = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, 4_000_000_000, 2**53, 10**30, math.nan, math.inf),
    *("", "x", "../../x", "/etc/passwd", "\ud800", "\0", "9" * 400, "a" * 1000, [], {}, [[]]),
    *([1], ["x"], {"a": 1}, {"": None}, [None], {"4000000000": {"content": "x"}}, [1] * 100),
    json.loads("[" * 200 + "]" * 200),
)


def mutated_json(value: Any, dice: random.Random) -> Any:
    """The value with one to three places replaced, removed or doubled."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        todo = [value] if isinstance(value, dict | list) else []
        while todo:
            one = todo.pop()
            inner = list(one.items()) if isinstance(one, dict) else list(enumerate(one))
            # Of a long list or vocabulary some places stand for all.
            for key, part in dice.sample(inner, min(len(inner), 12)):
                places.append((one, key))
                if isinstance(part, dict | list):
                    todo.append(part)
        if not places:
            return dice.choice(JUNK)
        parent, key = dice.choice(places)
        action = dice.random()
        if action < 0.15:
            del parent[key]
        elif action < 0.25 and isinstance(parent, list):
            parent.append(parent[key])
        elif action < 0.3 and isinstance(parent, dict):
            parent[str(dice.choice(JUNK))[:50]] = parent.pop(key)
        else:
            parent[key] = json.loads(json.dumps(dice.choice(JUNK)))
    return value


def mutated(content: bytes, suffix: str, dice: random.Random) -> bytes:
    """A file's bytes, of JSON mostly mutated as JSON, of JSONL one line, else as bytes."""
    if suffix in (".json", ".jsonl") and dice.random() < 0.85:
        lines = content.splitlines() if suffix == ".jsonl" else [content]
        place = dice.randrange(len(lines))
        lines[place] = json.dumps(mutated_json(json.loads(lines[place]), dice)).encode()
        return b"\n".join([*lines, b""])
    whole = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(len(whole) + 1)
        kind = dice.random()
        if kind < 0.4 and place < len(whole):
            whole[place] ^= 1 << dice.randrange(8)
        elif kind < 0.6:
            number = dice.choice(
                (0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60, (1 << 64) - 1)
            )
            whole[place : place + 8] = struct.pack("<Q", number)
        elif kind < 0.7:
            del whole[place:]
        elif kind < 0.8:
            del whole[place : place + dice.randrange(1, 64)]
        else:
            whole[place:place] = dice.choice((b"[", b"{", b"\xff", b"\0" * 8, b'"', b"\n", b"%}"))
    return bytes(whole)


# ---------------------------------------------------------------- what is read


def _write_traces(home: Path) -> None:
    """One record of every form that needs no key of the config, and problems."""
    lines = (Path(__file__).parent / "data/cases/trace_forms.jsonl").read_text().splitlines()
    cases = [case for case in map(json.loads, lines) if case["right"].get("dropped") == {}]
    cases = [case for case in cases if "records" in case and not case["keys"]]
    records = [row for case in cases for row in (*case.get("requests", []), *case["records"])]
    tiny.write_jsonl(home / "traces.jsonl", records)
    (home / "traces.csv").write_text('prompt,completion,answer\n1+2?,"It is\n3",3\n')
    tiny.write_jsonl(home / "problems.jsonl", tiny.sums(2))


def _write_gguf(file: Path) -> None:
    writer = package.GGUFWriter(file, "llama")
    for name, value in (
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
    ):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<s>", "</s>", *"abcdefgh", "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}</s>")
    shapes = {"token_embd": (12, 32), "output": (12, 32), "output_norm": (32,)}
    layer = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    layer |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    layer |= {"attn_norm": (32,), "ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(home: Path) -> None:
    gguf.read_gguf(home / "model.gguf")
    gguf_tokenizer.export_tokenizer(home / "model.gguf", home / "out")


def _read_model(home: Path) -> None:
    config, _ = hf.load_config(home)
    hf.load_params(home, config)


def _read_tokenizer(home: Path) -> None:
    tokenizer = load_tokenizer(home)
    chat.encode(tokenizer, MESSAGES)
    chat.encode_prompt(tokenizer, MESSAGES[:1])


def _read_dataset(home: Path) -> None:
    dataset = TraceDataset(home)
    dataset.read(range(len(dataset)))


def _read_traces(home: Path) -> None:
    for name in READERS["traces"][1]:
        list(read_traces(find_sources(str(home / name)), Fields()))
    read_problems(home / "problems.jsonl")


def _read_report(home: Path) -> str:
    """The page's notes, which say what it does not show."""
    settings = load_recipe(BASE).report
    settings.traces = 0
    runs = report_data.find_runs([home])
    found = report.collect(runs, settings=settings)
    report.page(found).encode(errors="backslashreplace")
    return "".join(found["notes"])


def fit_manifest(home: Path) -> None:
    """Make the manifest fit the mutated files: of a stranger's dataset, not of a damaged one."""
    manifest = json.loads((home / "manifest.json").read_text())
    for entry in (*manifest["shards"], manifest["lengths"]):
        entry |= file_entry(home / entry["file"])
    (home / "manifest.json").write_text(json.dumps(manifest))


READERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "traces": (_read_traces, ("traces.jsonl", "traces.csv", "problems.jsonl")),
    "gguf": (_read_gguf, ("model.gguf",)),
    "model": (
        _read_model,
        (
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
        ),
    ),
    "tokenizer": (_read_tokenizer, ("tokenizer.json", "tokenizer_config.json")),
    "template": (_read_tokenizer, ("chat_template.jinja",)),
    "dataset": (_read_dataset, ("manifest.json",)),
    "shard": (_read_dataset, ("traces-00000.array_record", "lengths.npy")),
    "report": (
        _read_report,
        (
            "metrics.jsonl",
            "config.json",
            "goodput.json",
            "drift.json",
            "evaluation/results.json",
        ),
    ),
}


def write_all(root: Path) -> dict[str, Path]:
    """A good directory for each reader."""
    homes = {name: root / name for name in READERS}
    for home in homes.values():
        home.mkdir(parents=True)
    _write_gguf(homes["gguf"] / "model.gguf")
    model = homes["model"]
    tiny.write_model(model, num_hidden_layers=1)
    config, _ = hf.load_config(model)
    params = hf.load_params(model, config)
    hf.save_params(model, config, params, dtype=jnp.float32, max_shard_bytes=30_000)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    _write_traces(homes["traces"])
    for name in ("tokenizer", "template"):
        tiny.write_tokenizer(homes[name])
    for name in ("dataset", "shard"):
        with DatasetWriter(homes[name], shard_records=2, manifest={}) as writer:
            for trace in make_traces(4):
                writer.write(trace)
    run = homes["report"]
    (run / "config.json").write_bytes(to_json(load_recipe(BASE).to_dict()))
    lines = [{"step": i, "loss": 1.0 / i, "weights/position_0000": 1.0} for i in range(1, 9)]
    tiny.write_jsonl(run / "metrics.jsonl", lines)
    total = {f"{part}_seconds": 1.0 for part in report_data.GOODPUT_PARTS} | {"goodput": 0.5}
    (run / "goodput.json").write_text(json.dumps({"attempts": [{}], "total": total}))
    curve = {"value": [1.0, 2.0], "low": [None, 1.0], "high": [2.0, 3.0]}
    row = dict.fromkeys(("accumulated", "reference", "excess", "difference"), curve)
    row |= {"reach": 2, "student_alive": [2, 2], "teacher_alive": [2, 1]}
    row |= {"log_ratio": {"student": curve, "teacher": curve}}
    (run / "drift.json").write_text(json.dumps({"models": {"student": row}}))
    (run / "evaluation").mkdir()
    details = {"pass_at_k": {"1": [0.5, 0.4, 0.6]}, "by_length": [{"from": 0, "accuracy": 0.5}]}
    scores = {"models": {"student": {"accuracy": 0.5, "low": 0.4, "details": details}}}
    (run / "evaluation" / "results.json").write_text(json.dumps(scores))
    return homes


def try_one(name: str, good: Path, work: Path, seed: int) -> str:
    """Read a mutation of a good directory; what was said, or "" where it was read."""
    dice = random.Random(seed)
    reader, files = READERS[name]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good, work)
    file = work / dice.choice(files)
    file.write_bytes(mutated(file.read_bytes(), file.suffix, dice))
    if name == "shard":
        fit_manifest(work)
    try:
        return reader(work) or ""
    except DcodError as error:
        return str(error)


def main(root: Path, name: str, first: int, count: int, memory: int) -> None:
    """`count` seeds with `memory` bytes beyond what the process has now; prints what it found."""
    import resource

    good = write_all(root / "good")[name]
    try_one(name, good, root / "work", first)
    jax.block_until_ready(jnp.zeros(1))
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    said = 0
    for seed in range(first, first + count):
        print("seed", seed, flush=True)
        said += bool(try_one(name, good, root / "work", seed))
    print("done", count, "refused", said, flush=True)
