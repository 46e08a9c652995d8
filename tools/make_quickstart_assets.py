"""Make everything in dcod_jax/assets/quickstart from nothing.

    python tools/make_quickstart_assets.py            # data, teacher, student: a quarter of an hour
    python tools/make_quickstart_assets.py data       # or one of them

data:    prompts, validation and eval problems from reasoning-gym's chain_sum -> assets/quickstart,
         worked solutions and model shapes -> build/quickstart
teacher: trains configs/quickstart_teacher.py and copies its export -> assets/quickstart/teacher
student: trains configs/quickstart_student.py and copies its export -> assets/quickstart/student
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcod_jax.study.arithmetic import TERMS, Chain, build_tokenizer, make_problems, worked_traces

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "dcod_jax" / "assets" / "quickstart"
BUILD = ROOT / "build" / "quickstart"

SEED = 7
DRAWS = 100_000  # expressions drawn from chain_sum, repetitions included
# Pieces of the shuffled training problems; the other splits keep the first ones drawn of each
# operator sequence, in equal shares as far as a sequence has that many.
TEACHER, STUDENT, PROMPTS = 14_000, 5_000, 2_500
VALIDATION, EVAL = 500, 500
TEACHER_STYLES = {"equations": 1.0, "words": 1.0, "groups": 1.0}
STUDENT_STYLES = {"equations": 1.0, "words": 1.0, "groups": 1.0}
SHAPES = {
    "teacher": {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "head_dim": 24,
    },
    "student": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "head_dim": 16,
    },
}

EXPORTED = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def chain_sum_expressions() -> list[str]:
    """Expressions such as "8 + 5 - 4" of reasoning-gym's chain_sum, in its order."""
    import reasoning_gym  # in the test extra only

    shortest, longest = TERMS
    items = reasoning_gym.create_dataset(
        "chain_sum",
        seed=SEED,
        size=DRAWS,
        min_digits=1,
        max_digits=1,
        min_terms=shortest,
        max_terms=longest,
    )
    return [item["metadata"]["expression"] for item in items]


def pieces() -> dict[str, list[Chain]]:
    """Problems of every piece; no problem is in two of them."""
    by_split: dict[str, list[Chain]] = {"train": [], "validation": [], "eval": []}
    for problem in make_problems(chain_sum_expressions(), seed=SEED):
        by_split[problem.split].append(problem)
    train = by_split["train"]
    # The few short chains all turn up among the first draws: without this one piece had them all.
    random.Random(SEED).shuffle(train)
    if len(train) < TEACHER + STUDENT + PROMPTS:
        raise SystemExit(f"only {len(train)} training problems; raise DRAWS")
    return {
        "teacher": train[:TEACHER],
        "student": train[TEACHER : TEACHER + STUDENT],
        "prompts": train[TEACHER + STUDENT : TEACHER + STUDENT + PROMPTS],
        "validation": in_equal_shares(by_split["validation"], VALIDATION),
        "eval": in_equal_shares(by_split["eval"], EVAL),
    }


def in_equal_shares(problems: list[Chain], count: int) -> list[Chain]:
    """The first `count` problems in rounds that take one of every operator sequence left."""
    queues: dict[str, list[Chain]] = {}
    for problem in problems:
        queues.setdefault(problem.operators, []).append(problem)
    rounds = itertools.zip_longest(*queues.values())
    taken = [problem for turn in rounds for problem in turn if problem is not None]
    if len(taken) < count:
        raise SystemExit(f"only {len(taken)} of {count} held-out problems; raise DRAWS")
    return taken[:count]


def jsonl(records: Iterable[dict[str, str]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


def shipped_problems(made: dict[str, list[Chain]]) -> dict[str, str]:
    """{file name in the assets: content}."""
    names = ("prompts", "validation", "eval")
    return {f"{name}.jsonl": jsonl(p.record() for p in made[name]) for name in names}


def hf_config(shape: dict[str, int]) -> dict[str, Any]:
    """config.json of a small Qwen3 over the character tokenizer."""
    tokenizer = build_tokenizer()
    heads = shape["hidden_size"] // shape["head_dim"]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 512,
        "rope_theta": 100.0,  # sequences have fewer than 100 tokens
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **shape,
    }


def make_data() -> None:
    """Write the shipped problems, the worked solutions and the shapes to train from."""
    made = pieces()
    ASSETS.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    for name, content in shipped_problems(made).items():
        (ASSETS / name).write_text(content)
    for name, styles in (("teacher", TEACHER_STYLES), ("student", STUDENT_STYLES)):
        traces = worked_traces(made[name], styles, seed=SEED)
        (BUILD / f"{name}_traces.jsonl").write_text(jsonl(traces))
        start = BUILD / f"{name}_init"
        build_tokenizer().save_pretrained(str(start))
        (start / "config.json").write_text(json.dumps(hf_config(SHAPES[name]), indent=2) + "\n")
    print({name: len(problems) for name, problems in made.items()})


def make_model(name: str) -> None:
    """Run the model's recipe from the start and copy what it exported into the assets."""
    run = BUILD / name
    shutil.rmtree(run, ignore_errors=True)
    recipe = ["--config", f"configs/quickstart_{name}.py"]
    subprocess.run([sys.executable, "-m", "dcod_jax.train", *recipe], cwd=ROOT, check=True)
    target = ASSETS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in EXPORTED:
        shutil.copyfile(run / "export" / file, target / file)


def main(stages: list[str]) -> None:
    for stage in stages or ["data", "teacher", "student"]:
        if stage == "data":
            make_data()
        elif stage in SHAPES:
            make_model(stage)
        else:
            raise SystemExit(f"unknown stage {stage!r}: expected data, teacher or student")


if __name__ == "__main__":
    main(sys.argv[1:])
