"""What can be refused in a config before a device or a file is touched."""

from __future__ import annotations

import difflib
from typing import Any

from dcod_jax.losses import distill
from dcod_jax.losses.distill import LossConfig
from dcod_jax.losses.divergences import DIVERGENCES

CHOICES = {
    "student.compute_dtype": ("bfloat16", "float32"),
    "student.remat": ("none", "dots", "full"),
    "teacher.dtype": ("bfloat16", "float32"),
    "export.dtype": ("bfloat16", "float32", "float16"),
    "prepare.logprobs": ("ignore", "require"),
    "prepare.on_bad_record": ("error", "quarantine"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "hosts.cluster": ("auto", "none", "slurm", "ompi", "mpi4py", "k8s"),
    "hosts.collectives": ("gloo", "mpi"),
}

POSITIVE = (
    "data.max_length data.seq_len data.batch_size data.prefetch prepare.grade_timeout "
    "prepare.overlap_ngram prepare.shard_records score.batch_tokens "
    "optim.learning_rate optim.eps train.steps "
    "train.microbatches train.log_every train.keep generate.samples generate.max_new_tokens "
    "generate.batch_size evaluate.max_new_tokens evaluate.batch_size export.max_shard_gb "
    "on_policy.max_new_tokens hosts.connect_timeout hosts.heartbeat hosts.timeout "
    "drift.samples drift.max_new_tokens drift.batch_size drift.resamples "
    "report.points report.histogram_traces"
).split()

NOT_NEGATIVE = (
    "seed prepare.workers score.top_k optim.warmup_steps "
    "optim.weight_decay optim.clip_norm optim.final_fraction train.eval_every train.eval_batches "
    "train.save_every generate.temperature evaluate.limit data.eval_fraction data.head_tokens "
    "on_policy.temperature drift.limit report.traces"
).split()


def _teacher_errors(flat: dict[str, Any], loss: LossConfig) -> list[str]:
    """Losses whose teacher cannot give what they need, with the command that makes it."""
    wrong: list[str] = []
    if loss.divergence not in DIVERGENCES:
        return []
    if loss.teacher == "live" and not flat["teacher.path"]:
        wrong.append("loss.teacher=live needs teacher.path (an HF directory or a .gguf file)")
    if distill.needs_distribution(loss) and loss.teacher == "cached" and not flat["score.top_k"]:
        wrong.append(
            f"loss.divergence={loss.divergence} needs the teacher's distribution; log-probs of the "
            "trace tokens (score.top_k=0) are not enough. Set score.top_k=64 in the recipe and run "
            "`python -m dcod_jax.score --config ... --config.score.overwrite=true`, or set "
            "loss.teacher=live"
        )
    if not 0 <= flat["on_policy.fraction"] <= 1:
        wrong.append(f"on_policy.fraction={flat['on_policy.fraction']} must be in [0, 1]")
    if flat["on_policy.fraction"] and (
        loss.teacher != "live" or loss.divergence == "nll" or loss.alpha != 1
    ):
        wrong.append(
            "on_policy.fraction > 0 needs loss.teacher=live (only a live teacher knows the "
            "student's own completions), a loss.divergence other than nll, and loss.alpha=1 (nll "
            "on own samples teaches nothing); got "
            f"teacher={loss.teacher}, divergence={loss.divergence}, alpha={loss.alpha}"
        )
    return wrong


def _hosts_errors(flat: dict[str, Any]) -> list[str]:
    """hosts.* that cannot describe a run of several processes."""
    address, count, own = (flat[f"hosts.{k}"] for k in ("coordinator", "processes", "process_id"))
    if not address:
        if count or own != -1:
            return [
                f"hosts.processes={count} and hosts.process_id={own} need hosts.coordinator="
                "host:port of process 0; leave all three out where hosts.cluster knows them"
            ]
        return []
    wrong = []
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        wrong.append(f"hosts.coordinator={address!r} must be host:port of process 0")
    if not 0 <= own < count:
        wrong.append(
            f"hosts.process_id={own} must be one of 0 to {count - 1} (hosts.processes={count}), a "
            "different one on each host"
        )
    return wrong


def config_errors(flat: dict[str, Any], loss: LossConfig) -> list[str]:
    """What is wrong in {dotted key: value} and its loss record; empty if all is well."""
    wrong: list[str] = []
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            hint = nearest(str(flat[key]), allowed)
            wrong.append(f"{key}={flat[key]!r} must be one of {', '.join(allowed)}{hint}")
    wrong += [f"{k}={flat[k]} must be greater than 0" for k in POSITIVE if not flat[k] > 0]
    wrong += [f"{k}={flat[k]} must not be negative" for k in NOT_NEGATIVE if not flat[k] >= 0]
    for key in ("optim.b1", "optim.b2", "data.eval_fraction"):
        if not 0 <= flat[key] < 1:
            wrong.append(f"{key}={flat[key]} must be in [0, 1)")
    wrong += [str(error) for error in distill.config_errors(loss)]
    wrong += _teacher_errors(flat, loss)
    wrong += _hosts_errors(flat)
    if flat["data.max_length"] > flat["data.seq_len"]:
        wrong.append(
            f"data.max_length={flat['data.max_length']} must not exceed "
            f"data.seq_len={flat['data.seq_len']}: a trace has to fit into one packed row"
        )
    if flat["mesh.context"] > 1 and flat["data.seq_len"] % (2 * flat["mesh.context"]):
        wrong.append(
            f"data.seq_len={flat['data.seq_len']} must be a multiple of "
            f"{2 * flat['mesh.context']} = 2 * mesh.context={flat['mesh.context']}: each device "
            "holds an early and a late chunk of a row"
        )
    if flat["data.batch_size"] % flat["train.microbatches"]:
        wrong.append(
            f"data.batch_size={flat['data.batch_size']} must be a multiple of "
            f"train.microbatches={flat['train.microbatches']}"
        )
    if flat["student.path"] and flat["student.config"]:
        wrong.append("student.path and student.config are both set: weights from one or none")
    save, evaluate = flat["train.save_every"], flat["train.eval_every"]
    if save and evaluate and flat["train.best_metric"] and save % evaluate:
        wrong.append(
            f"train.save_every={save} must be a multiple of train.eval_every={evaluate}, or the "
            f"best checkpoint by {flat['train.best_metric']} could not be told; or set "
            "train.best_metric=''"
        )
    return wrong


def nearest(key: str, known: Any) -> str:
    """'; did you mean "x"?' for the closest known dotted key or leaf name, or nothing."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    if not close:
        by_leaf = {name.rpartition(".")[2]: name for name in known}
        leaf = difflib.get_close_matches(key.rpartition(".")[2], list(by_leaf), n=1, cutoff=0.7)
        close = [by_leaf[leaf[0]]] if leaf else []
    return f"; did you mean {close[0]!r}?" if close else ""
