"""What a run measures on held-out data as it goes: the loss on traces, and answers to problems.

Nothing here touches the train state, the data's position or random numbers of the training, so a
run with these measurements has the bits of one without them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from dcod_jax.data import pipeline
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.teachers import parse_weight
from dcod_jax.data.tokenizer import Tokenizer
from dcod_jax.evaluate.generations import Sampling, answer, evaluation_sampling
from dcod_jax.evaluate.problems import Problem, problem_file
from dcod_jax.evaluate.prompts import set_prompts
from dcod_jax.evaluate.statistics import wilson
from dcod_jax.losses import reduce
from dcod_jax.losses.reduce import Sums
from dcod_jax.models import lora
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel import hosts
from dcod_jax.sample.decoding import DecodingParams
from dcod_jax.sample.sampler import decoding_params
from dcod_jax.train.settings import loss_config
from dcod_jax.types import Params, TrainState

Question = tuple[Problem, list[int]]  # and the token ids of its prompt


def questions(config: Any, model: ModelConfig, tokenizer: Tokenizer) -> list[Question]:
    """What train.eval_problems asks in the form of evaluate.*; [] where it is empty."""
    if not config.train.eval_problems:
        return []
    found = problem_file(config, config.train.eval_problems)
    prompts = set_prompts(config, found, tokenizer, model)
    return list(zip(found.problems, prompts, strict=True))


class HeldOut:
    """The measurements of one run; each is taken at its own steps and at the last one."""

    def __init__(
        self,
        config: Any,
        model: ModelConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        dataset: TraceDataset | None,
        eval_step: Callable[..., Sums],
        base: tuple[Params, ...] = (),
    ):
        """dataset: the held-out traces, if there are any; base: as copy_to_sample has it."""
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self.eval_step = eval_step
        self.decoding = functools.partial(
            copy_to_sample, config, model, mesh, base=base, valid_vocab=len(tokenizer)
        )
        self._measures: dict[str, tuple[int, Callable[[TrainState], dict[str, float]]]] = {}
        if dataset is not None and (every := config.train.eval_every):
            self._measures["eval/nll"] = every, functools.partial(self._loss, dataset)
        if asked := questions(config, model, tokenizer):
            every = config.train.eval_problems_every or config.train.eval_every
            self._measures["eval/accuracy"] = every, functools.partial(self._accuracy, asked)

    def known(self, name: str) -> str:
        """The metric's name where the run measures it (eval/loss with eval/nll), else ""."""
        return name if name.replace("loss", "nll") in self._measures else ""

    def due(self, step: int, found: dict[str, float], *, last: bool) -> list[str]:
        """The metrics to measure at this step, without those that were found at it before."""
        return [
            name
            for name, (every, _) in self._measures.items()
            if name not in found and (last or step % every == 0)
        ]

    def measure(self, names: list[str], state: TrainState) -> dict[str, float]:
        """These metrics and what is measured with them, such as an interval."""
        found: dict[str, float] = {}
        for name in names:
            found |= self._measures[name][1](state)
        return found

    def _loss(self, dataset: TraceDataset, state: TrainState) -> dict[str, float]:
        """nll per token and the weighted objective, on the traces of the held-out split."""
        config = self.config

        def parts() -> Iterator[Sums]:
            batches = pipeline.eval_batches(dataset, **reading(config, self.mesh))
            for host_batch, _ in itertools.islice(batches, config.train.eval_batches or None):
                yield self.eval_step(state, pipeline.to_device(host_batch, self.mesh))
                hosts.moved()

        total = functools.reduce(reduce.add, parts())
        return {
            "eval/nll": float(reduce.mean_nll(total)),
            "eval/loss": float(reduce.finish(total, config.loss.weights.normalize)),
            "eval/tokens": float(total.count),
        }

    def _accuracy(self, asked: list[Question], state: TrainState) -> dict[str, float]:
        """Right greedy answers with a 95 % interval (Wilson); all processes decode together."""
        settings, count = self.config.evaluate, len(asked)
        given = answer(
            self.decoding(state),
            self.tokenizer,
            [(problem, 0) for problem, _ in asked],
            [prompt for _, prompt in asked],
            indices=range(count),
            sampling=Sampling(stop=evaluation_sampling(self.config).stop),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            grade_truncated=settings.grade_truncated,
            on_batch=lambda sequences, tokens: hosts.moved(),
        )
        own = [sum(g.correct for g in given), sum(not g.finished for g in given)]
        correct, unfinished = hosts.exchange("the grades", own)[0]
        low, high = wilson(correct, count)
        return {
            "eval/accuracy": correct / count,
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/unfinished": unfinished / count,
        }


def copy_to_sample(
    config: Any,
    model: ModelConfig,
    mesh: Mesh,
    state: TrainState,
    *,
    base: tuple[Params, ...],
    valid_vocab: int,
) -> DecodingParams:
    """A copy of the state's parameters, beside `base` if there is any, to sample with."""
    params = lora.join(state.params, *base) if base else state.params
    dtype = config.student.compute_dtype
    return decoding_params(model, params, valid_vocab=valid_vocab, compute_dtype=dtype, mesh=mesh)


def reading(config: Any, mesh: Mesh, *, whole: bool = False) -> dict[str, Any]:
    """The fields of pipeline.Reading for this host's rows, or for all rows of the batch."""
    loss = loss_config(config)
    process, processes = (0, 1) if whole else pipeline.host_slice(mesh, config.data.batch_size)
    return {
        "seq_len": config.data.seq_len,
        "batch_size": config.data.batch_size,
        "head_tokens": config.data.head_tokens,
        "prefetch": config.data.prefetch,
        "require_scores": loss.needs_cache,
        "require_top_k": loss.needs_top_k,
        "require_start": loss.weights.needs_start,
        "teacher_weights": tuple(map(parse_weight, config.loss.teacher_weights)),
        "process_index": process,
        "process_count": processes,
    }
