"""Add the teacher's log-probability of each completion token to a trace dataset.

Reads teacher.path and data.dataset (train/ and, where there is one, eval/); an interrupted run goes
on behind the finished shards and ends with the same bytes. Of several processes each scores every
n-th shard with the teacher on its own devices, where it fits there; the first writes the manifest.
"""

from __future__ import annotations

import functools
from typing import Any

from dcod_jax.config import dataset_dir, dataset_lock
from dcod_jax.data.codec import bytes_per_token
from dcod_jax.data.dataset import TraceDataset, check_fingerprints, read_manifest
from dcod_jax.data.scores import add_scores, score_blocks, scored_shards
from dcod_jax.data.templates import template_of
from dcod_jax.data.tokenizer import tokenizer_fingerprint
from dcod_jax.errors import DcodError
from dcod_jax.files import Path, as_path
from dcod_jax.locks import locked
from dcod_jax.logs import track
from dcod_jax.parallel import hosts
from dcod_jax.score.scoring import ScoreSettings, score_traces
from dcod_jax.score.teacher import Teacher, open_teacher

SPLITS = ("train", "eval")


def score(config: Any) -> dict[str, dict[str, Any]]:
    """Score every split of the dataset; returns their manifests.

    Traces that this teacher scored with these settings before are left as they are. Raises
    DcodError when the teacher's tokenizer is another one than the dataset's, and when another
    teacher's log-probs are there and score.overwrite is not set.
    """
    root = as_path(dataset_dir(config))
    splits = [root / name for name in SPLITS if (root / name).is_dir()]
    if not splits:
        read_manifest(root)  # a dataset of one split, or the error that says what is missing
        splits = [root]
    teacher = open_teacher(config.teacher, template=template_of(config.student))
    for split in splits:
        _check_tokenizer(split, teacher)
    stored = {"top_k": config.score.top_k}
    done = {}
    for split in splits:
        manifest = read_manifest(split)
        if (manifest.get("teacher"), manifest.get("score")) == (teacher.provenance(), stored):
            print(f"{split}: {teacher.name} scored these traces before; nothing to do")
            done[split.name] = manifest
    if len(done) == len(splits):
        return done
    with locked(dataset_lock(config), what=f"data.dataset={root}"):
        hosts.barrier("the lock of data.dataset")
        mesh, process, processes = hosts.share(config)
        model_config, params = teacher.load(mesh)
        settings = ScoreSettings(
            top_k=config.score.top_k,
            batch_tokens=config.score.batch_tokens,
            head_chunk=config.loss.head_chunk,
            compute_dtype=config.teacher.dtype,
            valid_vocab=len(teacher.tokenizer),
            kernel=config.student.attention,
        )
        for split in splits:
            if split.name in done:
                continue
            work = _work(config, split, teacher, stored, process=process, processes=processes)
            label = f"scoring {split.name}"
            with track(label, work[0], done=work[1], enabled=config.train.progress) as advance:
                options = {"settings": settings, "mesh": mesh, "on_tokens": advance}
                done[split.name] = add_scores(
                    split,
                    teacher=teacher.provenance(),
                    settings=stored,
                    score_shard=functools.partial(score_traces, model_config, params, **options),
                    overwrite=config.score.overwrite,
                    write=processes > 1 or hosts.first(),
                    process=process,
                    processes=processes,
                )
            _report(split, done[split.name])
    return done


def _work(
    config: Any,
    split: Path,
    teacher: Teacher,
    settings: dict[str, Any],
    *,
    process: int,
    processes: int,
) -> tuple[int, int]:
    """Tokens of this process's shards, and those that an interrupted run has behind it."""
    manifest = read_manifest(split)
    shards = manifest["shards"]
    blocks = score_blocks(split, manifest, teacher.provenance(), settings)
    finished = scored_shards(split, blocks, overwrite=config.score.overwrite)
    if finished:
        print(f"{split}: going on behind {len(finished)} of {len(shards)} shards")
    own = range(process, len(shards), processes)
    total = sum(shards[number]["tokens"] for number in own)
    return total, sum(shards[number]["tokens"] for number in own if number in finished)


def _check_tokenizer(split: Path, teacher: Teacher) -> None:
    """Only the padded vocabulary may differ; token ids must mean the same."""
    dataset = TraceDataset(split, verify=False)  # extend verifies
    try:
        check_fingerprints(dataset, tokenizer=tokenizer_fingerprint(teacher.tokenizer))
    except DcodError as error:
        raise DcodError(
            f"{error}\nThe teacher {teacher.name} can only score token ids of its own tokenizer: "
            "prepare the traces with it (student and teacher must share one)"
        ) from None


def _report(path: Path, manifest: dict[str, Any]) -> None:
    tokens = manifest["totals"]["completion_tokens"]
    size = bytes_per_token(manifest["top_k"])
    text = (
        f"{path}: {tokens:,} completion tokens scored by {manifest['teacher']['name']}, mean "
        f"log-prob {manifest['mean_logprob']:.4f}, {size} bytes a token"
    )
    if manifest["top_k"]:
        text += f", top-{manifest['top_k']} hold {manifest['captured_mass']:.2%} of the mass"
    print(text)
