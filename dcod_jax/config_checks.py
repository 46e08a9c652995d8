"""What can be refused in a config before a device or a file is touched."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dcod_jax.data.presets import PRESETS
from dcod_jax.data.teachers import DIALECTS
from dcod_jax.data.teachers import config_errors as teacher_errors
from dcod_jax.data.templates import choice_errors
from dcod_jax.errors import nearest
from dcod_jax.evaluate.benchmarks import parse_set
from dcod_jax.losses import distill
from dcod_jax.losses.distill import LossConfig
from dcod_jax.losses.divergences import DIVERGENCES
from dcod_jax.losses.weight_errors import auto_errors
from dcod_jax.losses.weights import AUTO, RATIOS, UNITS, WEIGHTS
from dcod_jax.models import remat
from dcod_jax.models.attention import KINDS
from dcod_jax.train import settings
from dcod_jax.train.optim import DECAYS
from dcod_jax.tune import grid

CHOICES = {
    "log_level": ("debug", "info", "warning", "error"),
    "student.compute_dtype": ("bfloat16", "float32"),
    "train.gradient_dtype": ("float32", "bfloat16"),
    "train.gradient_sums": ("placed", "plain"),
    "student.attention": KINDS,
    "teacher.dtype": ("bfloat16", "float32"),
    "export.dtype": ("bfloat16", "float32", "float16"),
    "score.dialect": DIALECTS,
    "prepare.form": ("auto", *PRESETS),
    "prepare.reasoning": ("auto", "keep", "drop"),
    "prepare.logprobs": ("ignore", "require"),
    "prepare.on_bad_record": ("error", "quarantine"),
    "generate.model": ("teacher", "student"),
    "loss.divergence": tuple(DIVERGENCES),
    "loss.teacher": ("cached", "live"),
    "loss.weights.name": (*WEIGHTS, AUTO),
    "loss.weights.ratio": RATIOS,
    "loss.weights.unit": UNITS,
    "loss.weights.scope": ("token", "prefix", "sequence"),
    "loss.weights.span": ("mean", "sum", "token"),
    "loss.weights.normalize": ("mean", "none", "sequence"),
    "optim.schedule": tuple(DECAYS),
    "train.on_damaged_checkpoint": ("stop", "previous"),
    "train.best_metric": ("", "eval/nll", "eval/loss", "eval/accuracy", "nll", "loss", "accuracy"),
    "optim.on_nonfinite": ("stop", "skip"),
    "hosts.cluster": ("auto", "none", "slurm", "ompi", "mpi4py", "k8s"),
    "evaluate.form": ("chat", "plain"),
}

# What must hold -> (the test, keys). A section that only some recipes have is checked where it is.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "be greater than 0": (
        lambda x: x > 0,
        "data.max_length data.seq_len data.batch_size data.prefetch "
        "prepare.overlap_ngram prepare.shard_records score.batch_tokens score.concurrency "
        "score.timeout loss.head_chunk "
        "optim.learning_rate optim.eps train.steps train.microbatches train.log_every train.keep "
        "generate.samples generate.max_new_tokens generate.batch_size evaluate.samples "
        "evaluate.max_new_tokens evaluate.batch_size export.max_shard_gb on_policy.max_new_tokens "
        "hosts.connect_timeout hosts.heartbeat hosts.timeout "
        "drift.samples drift.max_new_tokens drift.batch_size drift.resamples "
        "report.points plan.slices "
        "study.seeds study.tuning_seeds study.width study.layers study.start_learning_rate "
        "study.start_problems study.traces study.problems study.drift_length",
    ),
    "not be negative": (
        lambda x: x >= 0,
        "seed prepare.record_bytes score.top_k score.retries "
        "loss.weights.warmup_steps loss.anchor loss.router_balance "
        "optim.warmup_steps optim.max_skipped student.lora.rank "
        "optim.weight_decay optim.clip_norm optim.final_fraction train.eval_every "
        "train.eval_problems_every tune.budget "
        "train.eval_batches train.save_every train.local_every generate.temperature "
        "generate.top_k evaluate.limit evaluate.temperature evaluate.top_k evaluate.shots "
        "data.head_tokens on_policy.temperature drift.limit report.traces plan.hbm_gib "
        "hosts.processes "
        "study.start_steps study.teacher_steps study.noise study.drift_prompts",
    ),
    "be a finite number > 0": (
        lambda x: math.isfinite(x) and x > 0,
        "loss.temperature loss.weights.temperature loss.weights.clip student.lora.alpha",
    ),
    "be a finite number": (math.isfinite, "loss.weights.offset"),
    "be in [0, 1)": (
        lambda x: 0 <= x < 1,
        "optim.b1 optim.b2 data.eval_fraction loss.taid_start loss.taid_beta "
        "loss.weights.target_loss loss.weights.target_ess loss.weights.smoothing "
        "generate.min_p evaluate.min_p",
    ),
    "be in [0, 1]": (
        lambda x: 0 <= x <= 1,
        "loss.alpha loss.beta loss.taid_end loss.taid_alpha on_policy.fraction",
    ),
    "be 0 or a finite number > 1": (
        lambda x: x == 0 or (x > 1 and math.isfinite(x)),
        "optim.spike_factor",
    ),
    "be in (0, 1]": (lambda x: 0 < x <= 1, "generate.top_p evaluate.top_p loss.weights.threshold"),
    "be -1 or at least 1": (
        lambda x: x == -1 or x >= 1,
        "mesh.data mesh.fsdp mesh.expert mesh.tensor mesh.context mesh.slices",
    ),
    "be at least 2": (lambda x: x >= 2, "tune.factor"),
    "be -1 or more": (lambda x: x >= -1, "export.step hosts.process_id"),
    "be between 0 and 1": (lambda x: 0 < x < 1, "loss.skew loss.weights.target_mean"),
}
LARGEST = 2**31 - 1  # of a whole number: steps and sizes are int32 on the device
NAME = re.compile(r"\w[\w.+%=-]{0,99}")  # of a directory that a variant or a problem set gets
BECAUSE = {
    "optim.spike_factor": "0: no step is skipped for its size",
    "loss.skew": "at the ends skew KL is a plain KL (loss.divergence=forward_kl or reverse_kl) or "
    "nothing",
    "loss.weights.target_loss": "0: it is not what is aimed at",
    "loss.weights.target_ess": "0: it is not what is aimed at",
    "loss.weights.smoothing": "0: this step's own value",
    "loss.weights.warmup_steps": "0: no warmup",
}


def _range_errors(flat: dict[str, Any]) -> Iterator[str]:
    for must, (holds, names) in RANGES.items():
        for key in names.split():
            value = flat.get(key, AUTO) if key.startswith("study.") else flat[key]
            # A text is AUTO, or refused with the weights.
            if not isinstance(value, str) and not holds(value):
                why = f"; {BECAUSE[key]}" if key in BECAUSE else ""
                yield f"{key}={value} must {must}{why}"


def _value_errors(flat: dict[str, Any]) -> Iterator[str]:
    """Values that no key can have: not finite, beyond int32, no text of a path, mixed tuples."""
    for key, value in flat.items():
        parts = value if isinstance(value, tuple) else (value,)
        texts = all(isinstance(part, str) for part in parts)
        numbers = key.startswith("study.") and all(type(part) in (int, float) for part in parts)
        fault = "name a directory" if key == "run_dir" and not str(value).strip() else ""
        if value is None:
            fault = (
                "have a value: its comment in dcod_jax/configs/base.py says which one means none"
            )
        if isinstance(value, tuple) and not texts and not numbers:
            fault = "hold texts"
        for part in parts:
            if isinstance(part, float) and not math.isfinite(part):
                fault = "be a finite number"
            elif isinstance(part, int) and not -LARGEST <= part <= LARGEST:
                fault = f"be a whole number from {-LARGEST} to {LARGEST}"
            elif isinstance(part, str) and (
                "\0" in part or part != part.encode(errors="ignore").decode()
            ):
                fault = "be a text without NUL characters and half surrogates"
        if fault:
            yield f"{key}={str(value)[:80]!r} must {fault}"


def _variant_errors(flat: dict[str, Any]) -> Iterator[str]:
    """Variants of `compare` that would not get a directory of their own in run_dir."""
    names, exports = [], []
    for text in flat["compare"]:
        name, *changes = text.split() or [""]
        names.append(name)
        paths = [change for change in changes if change.startswith("export.path=")]
        exports += [path.rstrip("/") for path in paths if path.partition("=")[2].strip("'\"")]
        if re.fullmatch("dataset|start|teacher(-.*)?", name):
            yield f"compare: the name {name} is taken by what else run_dir and the tables hold"
        if not NAME.fullmatch(name):
            yield (
                f"compare: {text[:80]!r} must begin with a name of letters, digits and ._+-%, "
                'which is its directory in run_dir: "sft loss.weights.name=uniform"'
            )
        for change in changes:
            if change.partition("=")[0] in ("run_dir", "compare"):
                yield f"compare: {name} must not change {change}; its directory is its name"
    yield from _twice("compare", names + exports)


def _twice(key: str, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    return [f"{key}: {', '.join(twice)} is named more than once"] if twice else []


def _teacher_errors(flat: dict[str, Any], loss: LossConfig) -> Iterator[str]:
    """Losses whose teacher cannot give what they need, with the command that makes it."""
    if loss.teacher == "live" and not flat["teacher.path"]:
        yield "loss.teacher=live needs teacher.path (an HF directory or a .gguf file)"
    if loss.needs_top_k and not flat["score.top_k"]:
        yield (
            f"loss.divergence={loss.divergence} needs the teacher's distribution; log-probs of the "
            "trace tokens (score.top_k=0) are not enough. Set score.top_k=64 in the recipe and run "
            "`python -m dcod_jax.score --config ... --config.score.overwrite=true`, or set "
            "loss.teacher=live"
        )
    own = "study.seeds" in flat  # a study scores with each seed's own start
    elsewhere = flat["train.init_from"] or not flat["student.path"]
    if loss.weights.needs_start and elsewhere and not own:
        yield (
            f"loss.weights.ratio={loss.weights.ratio} compares with the start, student.path as "
            f"score.student=True scored it; got student.path={flat['student.path']!r} and "
            f"train.init_from={flat['train.init_from']!r}: the training must begin at student.path"
        )
    if loss.weights.needs_start and flat["on_policy.fraction"]:
        yield (
            f"loss.weights.ratio={loss.weights.ratio} needs the start's log-probs, which are not "
            "known of completions sampled on the way; set on_policy.fraction=0"
        )
    if flat["on_policy.fraction"] and (
        loss.teacher != "live" or loss.divergence == "nll" or loss.alpha != 1
    ):
        yield (
            "on_policy.fraction > 0 needs loss.teacher=live (only a live teacher knows the "
            "student's own completions), a loss.divergence other than nll, and loss.alpha=1 (nll "
            "on own samples teaches nothing); got "
            f"teacher={loss.teacher}, divergence={loss.divergence}, alpha={loss.alpha}"
        )


def _hosts_errors(flat: dict[str, Any]) -> Iterator[str]:
    """hosts.* that cannot describe a run of several processes."""
    address, count, own = (flat[f"hosts.{k}"] for k in ("coordinator", "processes", "process_id"))
    host, _, port = address.rpartition(":")
    if not address and (count or own != -1):
        yield (
            f"hosts.processes={count} and hosts.process_id={own} need hosts.coordinator="
            "host:port of process 0; leave all three out where hosts.cluster knows them"
        )
    if address and not (host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 1 << 16):
        yield f"hosts.coordinator={address!r} must be host:port of process 0"
    if address and not 0 <= own < count:
        yield (
            f"hosts.process_id={own} must be one of 0 to {count - 1} (hosts.processes={count}), a "
            "different one on each host"
        )


def _profile_errors(text: str, steps: int) -> list[str]:
    found = re.fullmatch(r"([1-9]\d{0,9}):([1-9]\d{0,9})", text)
    if not text or (found and int(found[1]) <= int(found[2]) <= steps):
        return []
    return [
        f"profile.steps={text!r} must be first:last, such as 10:13, with "
        f"1 <= first <= last <= train.steps={steps}"
    ]


def _local_errors(flat: dict[str, Any]) -> Iterator[str]:
    """train.local_* that could not give a checkpoint, or would put it in the wrong place."""
    names = ("local_dir", "local_every", "save_every")
    directory, every, save_every = (flat[f"train.{name}"] for name in names)
    if "://" in directory:
        yield (
            f"train.local_dir={directory} must be a directory on each host's own disk, such as "
            "/mnt/disk/dcod_jax; for more frequent checkpoints in run_dir lower train.save_every"
        )
    elif bool(directory) != (every > 0):
        yield (
            f"train.local_dir={directory!r} and train.local_every={every} need each other: the "
            "directory on each host's own disk, and the steps between checkpoints in it"
        )
    elif 0 < save_every <= every:
        yield (
            f"train.local_every={every} must be less than train.save_every={save_every}, or the "
            "checkpoints in run_dir would be the newer ones"
        )


def _lora_errors(flat: dict[str, Any]) -> Iterator[str]:
    """student.lora.* that names no adapters, or adapters without a base."""
    base = flat["student.path"]
    rank, targets = (flat[f"student.lora.{name}"] for name in ("rank", "targets"))
    for target in targets:
        try:
            re.compile(target)
        except re.error as error:
            yield f"student.lora.targets: {target!r} is no regular expression ({error})"
    if flat["export.adapter"] and not rank:
        yield "export.adapter needs student.lora.rank > 0: there are no adapters to write"
    if flat["export.adapter"] and base.endswith(".gguf"):
        yield "export.adapter: PEFT has no adapters beside a .gguf file; set export.adapter=false"
    if rank and not targets:
        yield "student.lora.targets is empty; name linear maps, such as ('.*_proj',)"
    if rank and not base:
        yield "student.lora.rank > 0 needs student.path: the frozen base of the adapters"
    if rank and "study.seeds" in flat:
        yield "study trains all parameters of its students: leave student.lora.rank=0"


def _sampling_errors(flat: dict[str, Any]) -> Iterator[str]:
    """Of generate.* and evaluate.*: stop strings, greedy samples, and sets that are not known."""
    for key in ("generate.stop", "evaluate.stop"):
        if not all(isinstance(text, str) and text for text in flat[key]):
            yield f"{key}={flat[key]!r} must be non-empty texts"
    if flat["evaluate.samples"] > 1 and flat["evaluate.temperature"] == 0:
        yield (
            f"evaluate.samples={flat['evaluate.samples']} with evaluate.temperature=0 would ask "
            "for the same greedy answer again; set a temperature such as 0.6"
        )
    names = []
    for entry in flat["evaluate.sets"]:
        try:
            name, place, *_ = parse_set(entry)
        except ValueError as error:
            yield str(error)
            continue
        names.append(name)
        if place and not NAME.fullmatch(name):
            yield f"evaluate.sets: {name!r} must be of letters, digits and ._+-%"
    yield from _twice("evaluate.sets", names)


def _shape_errors(flat: dict[str, Any]) -> Iterator[str]:
    """Sizes of rows, batches and the mesh that do not fit together."""
    longest, length, context = flat["data.max_length"], flat["data.seq_len"], flat["mesh.context"]
    rows, pieces = flat["data.batch_size"], flat["train.microbatches"]
    if longest > length:
        yield (
            f"data.max_length={longest} must not exceed data.seq_len={length}: a trace has to fit "
            "into one packed row"
        )
    axes = [f"mesh.{axis}" for axis in ("data", "fsdp", "expert", "tensor", "context")]
    free = [f"{key}=-1" for key in axes if flat[key] == -1]
    if len(free) > 1:
        yield (
            f"{' and '.join(free)}: only one may take the devices that are left; give the others a "
            "number"
        )
    if context > 1 and length % (2 * context):
        yield (
            f"data.seq_len={length} must be a multiple of {2 * context} = 2 * mesh.context="
            f"{context}: each device holds an early and a late chunk of a row"
        )
    if pieces > 0 and rows % pieces:
        yield f"data.batch_size={rows} must be a multiple of train.microbatches={pieces}"


def _conflicts(flat: dict[str, Any]) -> Iterator[str]:
    """Settings that exclude each other."""
    skips = flat["optim.on_nonfinite"] != "stop" or flat["optim.spike_factor"]
    if "study.seeds" in flat and skips:
        yield (
            "study compares runs that take every step: leave optim.on_nonfinite=stop and "
            "optim.spike_factor=0"
        )
    if flat["train.gradient_dtype"] == "bfloat16" != flat["student.compute_dtype"]:
        yield (
            "train.gradient_dtype=bfloat16 needs student.compute_dtype=bfloat16: float32 gradients "
            "are not rounded for their sum"
        )
    if flat["student.path"] and flat["student.config"]:
        yield "student.path and student.config are both set: weights from one or none"


def config_errors(flat: dict[str, Any], loss: LossConfig) -> list[str]:
    """What is wrong in {dotted key: value} and its loss record; empty if all is well."""
    if wrong := list(_value_errors(flat)):
        return wrong  # the other checks compute with the values
    wrong += _variant_errors(flat)
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            hint = nearest(str(flat[key]), allowed)
            wrong.append(f"{key}={flat[key]!r} must be one of {', '.join(allowed)}{hint}")
    if not any(error.startswith("loss.") for error in wrong):
        wrong += distill.config_errors(loss)
        wrong += auto_errors(flat)
        wrong += _teacher_errors(flat, loss)
    if (kept := flat["student.remat"]) != "auto" and (must := remat.fault(kept)):
        wrong.append(f"student.remat={kept!r} must be auto, {must}")
    wrong += _profile_errors(flat["profile.steps"], flat["train.steps"])
    variables = {key: flat[key] for key in ("student.template_kwargs", "teacher.template_kwargs")}
    wrong += choice_errors(variables, flat["student.template_date"])
    return wrong + [error for check in _CHECKS for error in check(flat)]


_CHECKS: tuple[Callable[[dict[str, Any]], Iterable[str]], ...] = (
    *(_range_errors, _shape_errors, _conflicts, _hosts_errors, _local_errors),
    *(_lora_errors, _sampling_errors, teacher_errors),
    *(settings.held_out_errors, grid.config_errors),
)
