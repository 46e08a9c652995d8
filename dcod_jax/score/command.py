"""Add the teacher's log-probability of each completion token to a trace dataset.

Reads data.dataset (train/ and, where there is one, eval/). The teacher is teacher.path, or a server
(score.server), or several of both, each for its own traces (score.teachers); those with a path are
in memory together. An interrupted run goes on behind the finished shards and ends with the same
bytes. Of several processes each scores every n-th shard with the teacher on its own devices, where
it fits there; the first writes the manifest. With score.student the log-probs of student.path, the
start of the training, lie beside the teacher's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jax.sharding import Mesh

from dcod_jax.config import dataset_dir, dataset_lock
from dcod_jax.data.codec import bytes_per_token
from dcod_jax.data.dataset import TraceDataset, check_fingerprints, read_manifest, split_paths
from dcod_jax.data.scores import (
    KnownScores,
    add_scores,
    known_scores,
    score_blocks,
    scored_shards,
    tidy,
)
from dcod_jax.data.teachers import teacher_entries, teacher_of_trace
from dcod_jax.data.templates import template_of
from dcod_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    student_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, as_path
from dcod_jax.locks import locked
from dcod_jax.logs import track
from dcod_jax.parallel import hosts
from dcod_jax.prepare.command import check_settings, earlier_dataset, remove_earlier
from dcod_jax.score.alignment import ONLY_TEXT, score_aligned
from dcod_jax.score.scoring import score_settings, score_traces
from dcod_jax.score.server import ServedTeacher, open_server
from dcod_jax.score.teacher import (
    Teacher,
    joint_provenance,
    open_start,
    open_teacher,
    own_tokenizer,
)
from dcod_jax.types import Trace

log = logging.getLogger(__name__)

Scorer: TypeAlias = Callable[..., list[Trace]]


def score(config: Any) -> dict[str, dict[str, Any]]:
    """Score every split of the dataset; returns their manifests.

    Traces that these teachers scored with these settings before are left as they are. A
    teacher with another tokenizer scores the text (alignment.py), and no top-k. Raises DcodError
    when the dataset was prepared with other settings than the config's, and when another teacher's
    log-probs are there and score.overwrite is not set.
    """
    root = as_path(dataset_dir(config))
    splits = split_paths(root)
    check_settings(config, splits[0])
    teachers = _open_teachers(config)
    student, others = _other_tokenizers(config, splits, teachers)
    teachers |= others
    about = joint_provenance({name: teacher.provenance() for name, teacher in teachers.items()})
    start = open_start(config) if config.score.student else None
    stored = _stored_settings(config, splits, others, start)
    done = {}
    for split in splits:
        manifest = read_manifest(split)
        if (manifest.get("teacher"), manifest.get("score")) == (about, stored):
            log.info("%s: %s scored these traces before; nothing to do", split, about["name"])
            done[split.name] = manifest
    if len(done) == len(splits):
        if hosts.first():  # where another process reads the dataset: another time
            with contextlib.suppress(DcodError), locked(dataset_lock(config), what=str(root)):
                for split in splits:
                    tidy(split, done[split.name])
                remove_earlier(root)
        return done
    with locked(dataset_lock(config), what=f"data.dataset={root}"):
        hosts.barrier("the lock of data.dataset")
        mesh, *place = hosts.share(config)
        k = config.score.top_k
        scorers = {name: _scorer(config, one, mesh, top_k=k) for name, one in teachers.items()}
        for name, teacher in others.items():
            sides = {"student": student, "teacher": teacher.tokenizer}
            scorers[name] = functools.partial(score_aligned, score=scorers[name], **sides)
        own = _scorer(config, start, mesh, top_k=0) if start else None
        before = earlier_dataset(root)
        known = known_scores([before / s.name for s in splits], teacher=about, settings=stored)
        score_shard = functools.partial(_score_shard, scorers, start=own, known=known)
        for split in splits:
            if split.name not in done:
                done[split.name] = _score_split(config, split, about, stored, score_shard, *place)
            elif hosts.first():
                tidy(split, done[split.name])
        if hosts.first():
            remove_earlier(root)
    return done


def _stored_settings(
    config: Any,
    splits: list[Path],
    others: Mapping[str, Teacher | ServedTeacher],
    start: Teacher | None,
) -> dict[str, Any]:
    """What the manifest says of a scoring, beside its teachers."""
    stored: dict[str, Any] = {"top_k": config.score.top_k}
    if start is not None:
        stored["start"] = start.provenance()
        for split in splits:
            dataset = TraceDataset(split, verify=False)  # add_scores verifies
            check_fingerprints(dataset, tokenizer=tokenizer_fingerprint(start.tokenizer))
    for name, teacher in others.items():
        made = [tokenizer_fingerprint(teacher.tokenizer), template_fingerprint(teacher.tokenizer)]
        stored.setdefault("tokenizers", {})[name] = made
    return stored


def _open_teachers(config: Any) -> dict[str, Teacher | ServedTeacher]:
    """{name: teacher}, "" for one of all traces."""
    entries = teacher_entries(config)
    if not entries:
        raise DcodError(
            "teacher.path is empty; expected an HF directory or a .gguf file, or a server in "
            "score.server, or several teachers in score.teachers"
        )
    found: dict[str, Teacher | ServedTeacher] = {}
    for entry in entries:
        if entry.server:
            choice = template_of(config.student)
            named = entry.tokenizer and load_tokenizer(entry.tokenizer, template=choice)
            tokenizer = named or student_tokenizer(config.student)
            found[entry.name] = open_server(entry, config.score, tokenizer)
        else:
            named = entry if entry.name else config.teacher
            found[entry.name] = open_teacher(named, template=template_of(config.student))
    return found


def _other_tokenizers(
    config: Any, splits: Sequence[Path], teachers: Mapping[str, Teacher | ServedTeacher]
) -> tuple[Tokenizer | None, dict[str, Teacher | ServedTeacher]]:
    """The student's tokenizer, and the teachers with another one, with their own template."""
    datasets = [TraceDataset(split, verify=False) for split in splits]  # add_scores verifies
    made = {(data.manifest.get("tokenizer") or {}).get("fingerprint") for data in datasets}
    others = {
        name: teacher
        for name, teacher in teachers.items()
        if made != {tokenizer_fingerprint(teacher.tokenizer)}
    }
    if not others:
        return None, {}
    names = " and ".join(teacher.name for teacher in others.values())
    if not (config.student.tokenizer or config.student.path or config.student.config):
        raise DcodError(
            f"{splits[0]}: {names} has another tokenizer than the traces; set student.path or "
            "student.tokenizer, so that log-probs of the same text can be matched"
        )
    student = student_tokenizer(config.student)
    for dataset in datasets:
        check_fingerprints(dataset, tokenizer=tokenizer_fingerprint(student))
    if config.score.top_k:
        raise DcodError(
            f"score.top_k={config.score.top_k}, but {names} has another tokenizer than the "
            f"student: {ONLY_TEXT}. Set score.top_k=0"
        )
    for entry in teacher_entries(config):
        if teacher := others.get(entry.name):
            own = own_tokenizer(entry, date=config.student.template_date)
            others[entry.name] = dataclasses.replace(teacher, tokenizer=own)
    return student, others


def _scorer(config: Any, teacher: Teacher | ServedTeacher, mesh: Mesh, *, top_k: int) -> Scorer:
    """(traces, on_tokens) -> the traces with their log-probs."""
    if isinstance(teacher, ServedTeacher):
        return functools.partial(teacher.score, top_k=top_k)
    model_config, params = teacher.load(mesh)
    vocab, kernel = len(teacher.tokenizer), config.student.attention
    settings = score_settings(
        config, compute_dtype=teacher.dtype, valid_vocab=vocab, top_k=top_k, kernel=kernel
    )
    return functools.partial(score_traces, model_config, params, settings=settings, mesh=mesh)


def _score_shard(
    scorers: Mapping[str, Scorer],
    traces: Sequence[Trace],
    *,
    start: Scorer | None,
    known: KnownScores,
    on_tokens: Callable[[int], None],
) -> list[Trace]:
    """The traces, each scored by its own teacher (and `start`), or with the scores that it had."""
    found = {place: known.of(trace) for place, trace in enumerate(traces)}
    left: dict[str, list[int]] = {}
    for place, trace in enumerate(traces):
        if found[place] is None:
            name = "" if "" in scorers else teacher_of_trace(trace.id, trace.meta, tuple(scorers))
            left.setdefault(name, []).append(place)
        else:
            on_tokens(len(trace.token_ids))
    for name, places in sorted(left.items()):
        bare = [traces[place] for place in places]
        scored = scorers[name](bare, on_tokens=on_tokens)
        if start is not None:
            own = [trace.logprobs for trace in start(bare)]
            scored = [
                dataclasses.replace(trace, start_logprobs=logprobs)
                for trace, logprobs in zip(scored, own, strict=True)
            ]
        found |= dict(zip(places, scored, strict=True))
    return [trace for _, trace in sorted(found.items()) if trace is not None]


def _score_split(
    config: Any,
    split: Path,
    teacher: dict[str, Any],
    settings: dict[str, Any],
    score_shard: Callable[..., list[Trace]],
    process: int,
    processes: int,
) -> dict[str, Any]:
    """Score this process's shards, but for those that an interrupted run finished."""
    manifest, overwrite = read_manifest(split), config.score.overwrite
    shards = manifest["shards"]
    blocks = score_blocks(split, manifest, teacher, settings)
    finished = scored_shards(split, blocks, overwrite=overwrite)
    if finished:
        log.info("%s: going on behind %d of %d shards", split, len(finished), len(shards))
    tokens = {number: shards[number]["tokens"] for number in range(process, len(shards), processes)}
    before = sum(count for number, count in tokens.items() if number in finished)
    label, shown = f"scoring {split.name}", config.train.progress
    with track(label, sum(tokens.values()), done=before, enabled=shown) as advance:
        manifest = add_scores(
            split,
            teacher=teacher,
            settings=settings,
            score_shard=functools.partial(score_shard, on_tokens=advance),
            overwrite=overwrite,
            write=processes > 1 or hosts.first(),
            process=process,
            processes=processes,
        )
    _report(split, manifest)
    return manifest


def _report(path: Path, manifest: dict[str, Any]) -> None:
    tokens = manifest["totals"]["completion_tokens"]
    size = bytes_per_token(manifest["top_k"])
    text = (
        f"{path}: {tokens:,} completion tokens scored by {manifest['teacher']['name']}, mean "
        f"log-prob {manifest['mean_logprob']:.4f}, {size} bytes a token"
    )
    if "alignment" in manifest:
        spans, longest = (manifest["alignment"][name] for name in ("spans", "longest_span"))
        text += f", in {spans:,} spans of {tokens / spans:.2f} tokens, the longest of {longest}"
    if manifest["top_k"]:
        text += f", top-{manifest['top_k']} hold {manifest['captured_mass']:.2%} of the mass"
    print(text)
    by_teacher = manifest.get("by_teacher", {})
    for name in manifest["teacher"].get("teachers", {}):
        own = by_teacher.get(name)
        print(
            f"  {name}: no trace is its own"
            if own is None
            else f"  {name}: {own['traces']:,} traces, {own['completion_tokens']:,} completion "
            f"tokens, mean log-prob {own['mean_logprob']:.4f}"
        )
