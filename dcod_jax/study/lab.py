"""One run of the study: a warm start, training with the package's train step, and the measurements.

Runs share the teacher, the trace datasets, the warm starts, and one compiled train step for each
loss, whose state holds the learning rate.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcod_jax import config as configs
from dcod_jax.copies import read_arrays
from dcod_jax.data import pipeline
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.drift.curves import drift_curves
from dcod_jax.drift.scores import DriftModel, DriftSettings, draw_samples, measure
from dcod_jax.errors import DcodError
from dcod_jax.files import atomic_write
from dcod_jax.models import hf, transformer
from dcod_jax.models.config import ModelConfig
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.study import domain
from dcod_jax.study.conditions import to_hex
from dcod_jax.study.domain import SETS, StudyModel
from dcod_jax.train.forward import TeacherModel, make_forward
from dcod_jax.train.held_out import reading
from dcod_jax.train.metrics import StepMetrics
from dcod_jax.train.on_policy import OnPolicy
from dcod_jax.train.optim import OptimConfig, Schedule, make_optimizer
from dcod_jax.train.settings import loss_config, optim_config
from dcod_jax.train.setup import Student
from dcod_jax.train.step import init_state, make_train_step
from dcod_jax.types import Params, TrainState

TrainStep = Callable[..., tuple[TrainState, StepMetrics]]


def adjustable_optimizer(
    cfg: OptimConfig, steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """The package's optimizer with its peak rate in the state, and the schedule relative to it."""

    def build(learning_rate: Any) -> optax.GradientTransformation:
        return make_optimizer(dataclasses.replace(cfg, learning_rate=learning_rate), steps)[0]

    optimizer = optax.inject_hyperparams(build)(learning_rate=cfg.learning_rate)
    return optimizer, make_optimizer(dataclasses.replace(cfg, learning_rate=1.0), steps)[1]


def with_rate(state: TrainState, rate: float) -> TrainState:
    """The state of an adjustable optimizer with this peak learning rate."""
    hyper = dict(state.opt_state.hyperparams)
    hyper["learning_rate"] = jnp.full_like(hyper["learning_rate"], rate)
    opt_state = state.opt_state._replace(hyperparams=hyper)
    return dataclasses.replace(state, opt_state=opt_state)


def start_config(config: Any, steps: int) -> Any:
    """The config of a warm start: plain training at a constant rate, whatever the arm's loss is."""
    changes = "loss.divergence=nll loss.teacher=cached loss.anchor=0 on_policy.fraction=0 "
    changes += "loss.weights.name=uniform loss.weights.temperature=1 loss.weights.offset=0 "
    changes += "loss.weights.unit=nats loss.weights.ratio=student/teacher optim.schedule=constant "
    changes += f"optim.learning_rate={config.study.start_learning_rate} train.steps={steps}"
    return configs.with_changes(config, changes.split())


class Lab:
    """All that runs share; `directory` keeps traces and starts between processes."""

    def __init__(self, config: Any, directory: Path, starts: dict[tuple[int, int], set[int]]):
        """starts: for each (width, layers) the numbers of warm-start steps that are wanted."""
        self.directory, self.wanted = directory, starts
        self.mesh = make_mesh(1, devices=jax.devices()[:1])
        self.tokenizer: Any = load_tokenizer(config.teacher.path)
        teacher_config, params = hf.load_model(config.teacher.path, dtype=jnp.float32, mesh=None)
        params = jax.device_put(params, jax.devices()[0])
        self.teacher = StudyModel(teacher_config, params, self.tokenizer)
        self.problems = domain.held_out(config)
        self.prompts = {
            name: [domain.prompt_ids(self.tokenizer, p) for p in problems]
            for name, problems in self.problems.items()
        }
        self._steps: dict[Any, tuple[optax.GradientTransformationExtraArgs, TrainStep]] = {}
        self._teacher_samples: dict[tuple[int, int], Any] = {}
        self._datasets: dict[Path, TraceDataset] = {}
        self._start_correct: dict[Path | str, dict[str, str]] = {}
        if config.study.teacher_steps:  # no teacher of this domain is shipped
            own = domain.teacher_recipe(config, teacher_config)
            self.teacher = StudyModel(self.model_config(own), self.start(own, 0), self.tokenizer)

    # ------------------------------------------------------------ what is shared

    def model_config(self, config: Any) -> ModelConfig:
        """The teacher's architecture at the study's width (heads of 16) and depth."""
        width = config.study.width
        if width % 16:
            raise DcodError(f"study.width={width} must be a multiple of 16, the size of a head")
        return dataclasses.replace(
            self.teacher.config,
            hidden_size=width,
            intermediate_size=3 * width,
            num_layers=config.study.layers,
            num_heads=width // 16,
            num_kv_heads=width // 16,
            head_dim=16,
        )

    def traces(self, config: Any, *, start: bool = False) -> TraceDataset:
        """The teacher's traces of a condition, or with `start` those of the warm start."""
        path = domain.dataset_path(self.directory / "traces", config, start=start)
        if path not in self._datasets:
            teacher = None if start else self.teacher
            self._datasets[path] = domain.open_traces(path, config, teacher, self.tokenizer)
        return self._datasets[path]

    def _trained_on(self, config: Any, seed: int, *, start: bool) -> TraceDataset:
        """Those that study.select keeps, with the start's log-probs where the loss needs them."""
        whole = self.traces(config, start=start)
        scored = loss_config(config).weights.needs_start
        if start or not (config.study.select or scored):
            return whole
        steps = config.study.start_steps
        begin = str(self._start_file(config, steps, seed) if steps else config.student.path)
        of = [str(whole.directory), config.study.select, scored, Path(begin).name]
        name = f"of-start-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]}"
        path = self.directory / "traces" / name
        if path not in self._datasets:
            self._datasets[path] = domain.open_of_start(
                path,
                config,
                whole,
                lambda: self._student(config, self.start(config, seed)),
                self.teacher,
                scored=scored,
            )
        return self._datasets[path]

    def start(self, config: Any, seed: int) -> Params:
        """The seed's warm start, which all arms share; without study.start_steps student.path."""
        if not config.study.start_steps:
            return self._given_start(config)
        shape = (config.study.width, config.study.layers)
        path = self._start_file(config, config.study.start_steps, seed)
        if not path.exists():
            wanted = self.wanted.get(shape, set()) | {config.study.start_steps}
            self._train_starts(config, sorted(wanted), seed)
        model_config = self.model_config(config)
        leaves, tree = jax.tree.flatten(transformer.param_shapes(model_config))
        mend = "remove it, and it is trained again"
        stored = read_arrays(path, mend=mend)
        if [x.shape for x in stored.values()] != [leaf.shape for leaf in leaves]:
            raise DcodError(f"{path}: not the parameters of this model; {mend}")
        return jax.tree.unflatten(tree, [jnp.asarray(x) for x in stored.values()])

    def _given_start(self, config: Any) -> Params:
        """The parameters of student.path; raises DcodError for another shape than study.*."""
        if not config.student.path:
            raise DcodError("study.start_steps=0 takes the start from student.path, which is empty")
        found, params = hf.load_model(config.student.path, dtype=jnp.float32, mesh=None)
        if transformer.param_shapes(found) != transformer.param_shapes(self.model_config(config)):
            raise DcodError(
                f"student.path={config.student.path} is not of study.width={config.study.width}, "
                f"study.layers={config.study.layers} with heads of 16; set them to its own"
            )
        return params

    def _start_file(self, config: Any, steps: int, seed: int) -> Path:
        study, data = config.study, config.data
        optimizer = dataclasses.asdict(optim_config(config))
        # The warm start has its own rate and schedule, and the study skips no step.
        for name in "learning_rate schedule on_nonfinite spike_factor max_skipped".split():
            del optimizer[name]
        of = [study.width, study.layers, study.start_learning_rate, study.start_problems]
        of += [list(study.start_styles), list(study.start_terms), config.seed, seed]
        of += [data.seq_len, data.batch_size, data.head_tokens, optimizer]
        of += [study.domain] * (study.domain != "arithmetic")
        name = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]
        return self.directory / "starts" / f"{name}-{steps}.npz"

    def _train_starts(self, config: Any, wanted: list[int], seed: int) -> None:
        """One training at a constant rate, which saves the wanted steps on its way."""
        model_config = self.model_config(config)
        rate = config.study.start_learning_rate
        plain = start_config(config, wanted[-1])
        params = transformer.init_params(model_config, jax.random.key(seed))
        kept: dict[int, Params] = {}

        def keep(step: int, state: TrainState) -> None:
            if step in wanted:
                kept[step] = jax.device_get(state.params)

        self.train(plain, params, rate=rate, seed=seed, start=True, after_step=keep)
        for steps, snapshot in kept.items():
            path = self._start_file(config, steps, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = {f"{i}": leaf for i, leaf in enumerate(jax.tree.leaves(snapshot))}
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)

    # ------------------------------------------------------------ training

    def _shared_step(self, config: Any) -> tuple[optax.GradientTransformationExtraArgs, TrainStep]:
        """Optimizer and train step of this loss and shape; the rate is in the state."""
        live = config.loss.teacher == "live"
        forward = make_forward(
            config,
            self.model_config(config),
            mesh=self.mesh,
            valid_vocab=len(self.tokenizer),
            teacher=TeacherModel(self.teacher.config, jnp.float32) if live else None,
            remat="none",
        )
        forward = dataclasses.replace(forward, compute_dtype=jnp.float32)
        cfg = dataclasses.replace(optim_config(config), learning_rate=1.0)
        sizes = (config.data.batch_size, config.data.seq_len, config.train.steps)
        key = (forward, cfg, sizes)
        if key not in self._steps:
            optimizer, schedule = adjustable_optimizer(cfg, config.train.steps)
            step = make_train_step(forward, optimizer, schedule, batch_size=config.data.batch_size)
            self._steps[key] = optimizer, step
        return self._steps[key]

    def train(
        self,
        config: Any,
        params: Params,
        *,
        rate: float,
        seed: int,
        start: bool = False,
        steps: int = 0,
        after_step: Callable[[int, TrainState], None] | None = None,
    ) -> tuple[Params, dict[str, np.ndarray], dict[str, Any]]:
        """(parameters, {metric: its value at each step}, costs) of `steps` steps from `params`.

        steps=0 is train.steps. The order of the traces follows from `seed`. Costs are the tokens
        trained on, those generated on the way, and CPU-seconds without compilation.
        """
        known = len(self._steps)
        optimizer, train_step = self._shared_step(config)
        if len(self._steps) > known:  # a step that counts for nothing, so no run pays to compile
            sampled = ["on_policy.fraction=1"] if config.on_policy.fraction else []
            warm = configs.with_changes(config, sampled)
            self.train(warm, params, rate=rate, seed=seed, start=start, steps=1)
        model_config = self.model_config(config)
        copy = jax.tree.map(jnp.array, params)  # the step donates its state
        state = init_state(copy, optimizer, mesh=self.mesh, model_config=model_config)
        state = with_rate(state, rate)
        live = (self.teacher.params,) if config.loss.teacher == "live" else ()
        traces = self._trained_on(config, seed, start=start)
        batches = pipeline.train_batches(traces, seed=seed, **reading(config, self.mesh))
        student = Student(model_config, self.tokenizer, len(self.tokenizer))
        own = configs.replace(config, {"seed": seed})
        policy = OnPolicy(own, student, self.mesh, spent={})
        history: list[StepMetrics] = []
        jax.block_until_ready(state)
        before = time.process_time()
        for step in range(steps or config.train.steps):
            host_batch, _, _ = policy(step, state, *next(batches))
            state, values = train_step(state, pipeline.to_device(host_batch, self.mesh), *live)
            history.append(values)
            if after_step is not None:
                after_step(step + 1, state)
        jax.block_until_ready(state)
        spent = round(time.process_time() - before, 2)
        stacked = jax.device_get(history)
        curves = {key: np.array([values[key] for values in stacked]) for key in stacked[0]}
        if not np.isfinite(curves["loss"]).all():
            raise DcodError(
                f"the loss is not finite at step {int(np.argmin(np.isfinite(curves['loss']))) + 1} "
                f"with learning rate {rate}; take it out of study.learning_rates"
            )
        tokens = int(curves["tokens/completion"].sum())
        costs = {"tokens": tokens, "generated": policy.spent["tokens"], "train_cpu": spent}
        return state.params, curves, costs

    # ------------------------------------------------------------ measuring

    def reference(self, config: Any) -> dict[str, Any]:
        """What the runs of a condition share: the teacher's accuracy and its traces."""
        manifest = self.traces(config).manifest
        return {
            "teacher": _shares(self._graded(config, self.teacher, SETS)),
            "counts": manifest["counts"],
            "styles": manifest["styles"],
        }

    def start_correct(self, config: Any, seed: int) -> dict[str, str]:
        """{set: to_hex of the problems that the seed's start solves}."""
        steps = config.study.start_steps
        where = self._start_file(config, steps, seed) if steps else config.student.path
        if where not in self._start_correct:
            graded = self._graded(config, self._student(config, self.start(config, seed)), SETS)
            self._start_correct[where] = {name: to_hex(graded[name]) for name in SETS}
        return self._start_correct[where]

    def _student(self, config: Any, params: Params) -> StudyModel:
        return StudyModel(self.model_config(config), params, self.tokenizer)

    def _graded(
        self, config: Any, model: StudyModel, names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """{set: [problems] bool} of a model's greedy answers."""
        found = {}
        for name in names:
            drawn = model.answers(self.prompts[name], config, temperature=0.0, seed=0)
            pairs = zip(self.problems[name], map(model.text, drawn), strict=True)
            found[name] = np.array([domain.is_correct(problem, text) for problem, text in pairs])
        return found

    def run(self, config: Any, *, kind: str, rate: float, seed: int) -> dict[str, Any]:
        """Everything measured in one run, as it goes into results.jsonl."""
        params, curves, costs = self.train(config, self.start(config, seed), rate=rate, seed=seed)
        before = time.process_time()
        names = ("validation",) if kind == "tune" else SETS
        correct = self._graded(config, self._student(config, params), names)
        measured = costs | {"accuracy": _shares(correct), "curves": _summary(curves)}
        if kind == "test":
            measured["correct"] = {name: to_hex(values) for name, values in correct.items()}
            measured["start"] = self.start_correct(config, seed)
            if config.study.drift_prompts:
                measured["drift"] = self.drift(config, params)
        measured["eval_cpu"] = round(time.process_time() - before, 2)
        return measured

    def drift(self, config: Any, params: Params) -> dict[str, float | None]:
        """ExAccErr over the first study.drift_length tokens on problems of the set "in".

        Both models continue the same prompts at temperature 1; KL in nats, whole vocabulary.
        None where no sequence is that long.
        """
        length = config.study.drift_length
        teacher = DriftModel(self.teacher.config, self.teacher.params, "float32")
        student = DriftModel(self.model_config(config), params, "float32")
        prompts = self.prompts["in"][: config.study.drift_prompts]
        settings = DriftSettings(
            mesh=self.mesh,
            max_new_tokens=config.generate.max_new_tokens,
            seed=config.seed,
            eos_ids=(self.tokenizer.eos_token_id,),
            valid_vocab=len(self.tokenizer),
            samples=1,
            batch_size=config.generate.batch_size,
            batch_tokens=config.score.batch_tokens,
            head_chunk=config.loss.head_chunk,
        )
        key = (len(prompts), config.generate.max_new_tokens)
        if key not in self._teacher_samples:
            self._teacher_samples[key] = draw_samples(teacher, prompts, settings)
        known = self._teacher_samples[key]
        measured = measure(teacher, student, prompts, settings, teacher_samples=known)
        curves = drift_curves(*measured.kls(), resamples=1)
        names = ("excess", "accumulated", "reference")
        found = {name: float(getattr(curves, name).value[length - 1]) for name in names}
        return {k: round(value, 4) if math.isfinite(value) else None for k, value in found.items()}


def _shares(correct: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: round(float(values.mean()), 4) for name, values in correct.items()}


def _summary(curves: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the last tenth of the steps (at least one), and of the weights over all steps."""
    last = max(len(curves["loss"]) // 10, 1)
    found: dict[str, float] = {
        "nll": curves["nll"][-last:].mean(),
        "ess": curves["weights/ess"].mean(),
    }
    if "weights/temperature" in curves:
        found["temperature"] = np.exp(np.log(curves["weights/temperature"][1:]).mean())
    unknown = 1 - curves["weights/confident_tokens"]
    share = (1 - curves["weights/confident_mass"]) / np.maximum(unknown, 1e-6)
    found["unknown_weight"] = share[unknown > 0].mean() if (unknown > 0).any() else math.nan
    return {key: round(float(value), 4) for key, value in found.items() if math.isfinite(value)}
