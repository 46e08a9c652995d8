"""What a run learns from, kept in its checkpoints: going on with something else is refused.

The record of a checkpoint has {"parts": {what: its hash or number}, "changes": [{step, part, then,
now}, ...]}; a change is one that train.accept_changed_data allowed.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from dcod_jax.bounds import check, text, whole
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.tokenizer import Tokenizer, template_fingerprint, tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.files import Path
from dcod_jax.models import hf
from dcod_jax.train.checkpoint_reader import ADAPTER_BASE
from dcod_jax.train.checkpointer import Record

log = logging.getLogger(__name__)


def parts(
    config: Any, tokenizer: Tokenizer, train_set: TraceDataset, eval_set: TraceDataset | None
) -> dict[str, Any]:
    """Hashes and numbers of all that the parameters follow from, beside the config."""
    teacher = train_set.manifest.get("teacher") or {}
    found: dict[str, Any] = {
        "training traces": _traces(train_set),
        "held-out traces": _traces(eval_set) if eval_set else "none",
        "teacher of the log-probs": teacher.get("weights", "none"),
        "top-k of the log-probs": train_set.top_k,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat template": template_fingerprint(tokenizer),
    }
    if start := train_set.manifest.get("start"):
        found["start of the log-probs"] = start.get("weights", "none")
    if config.loss.teacher == "live":
        found["live teacher"] = hf.weights_fingerprint(config.teacher.path)
    if config.student.lora.rank:
        found[ADAPTER_BASE] = hf.weights_fingerprint(config.student.path)
    return found


def _traces(dataset: TraceDataset) -> str:
    """Hash of the checksums of the shards, in their order."""
    checksums = " ".join(shard["sha256"] for shard in dataset.manifest["shards"])
    return hashlib.sha256(checksums.encode()).hexdigest()


def goes_on_with(
    now: dict[str, Any], found: Record, directory: Path, *, accept: bool, steps: int
) -> dict[str, Any]:
    """The record of a run that goes on from `found` with `now`, if that is equal or `accept`."""
    then = found.data["parts"]
    changes = [
        {"step": found.step, "part": part, "then": then.get(part), "now": now.get(part)}
        for part in [*now, *(then.keys() - now.keys())]
        if then.get(part) != now.get(part)
    ]
    if not changes:
        return found.data
    lines = "".join("\n  {part}: {then} then, {now} now".format(**change) for change in changes)
    if found.step >= steps:
        log.info("%s: all steps were done with other data than is there now:%s", directory, lines)
        return found.data
    if not accept:
        raise DcodError(
            f"{directory}: the run learned from other data up to step {found.step}:{lines}\n"
            "set data.dataset, teacher.path, student.path and student.tokenizer to what they were, "
            "or choose another run_dir (train.init_from starts from this one); "
            "train.accept_changed_data=True goes on with the new data and records the change"
        )
    log.warning("%s: going on from step %d with other data:%s", directory, found.step, lines)
    return {"parts": now, "changes": found.data["changes"] + changes}


def position(state: dict[str, Any], stream: str, *, accept: bool) -> dict[str, Any]:
    """Where the pipeline goes on: in other traces, if accepted, at the start of the next epoch."""
    wanted = {"epoch": whole(0, 1 << 53), "row": whole(0, 1 << 53), "stream": text()}
    check(state, wanted, source="the checkpoint's position in the data")
    if state["stream"] == stream or not accept:
        return state
    log.warning("other traces: going on at the beginning of epoch %d", state["epoch"] + 1)
    return {"epoch": state["epoch"] + 1, "row": 0, "stream": stream}
