"""Make everything in dcod_jax/assets/quickstart from nothing.

    python tools/make_quickstart_assets.py            # all of it: a quarter of an hour
    python tools/make_quickstart_assets.py data       # or one stage

data:      problems -> assets/quickstart, worked solutions and model shapes -> build/quickstart
teacher:   trains configs/quickstart_teacher.py, copies its export -> assets/quickstart/teacher
competent: trains configs/quickstart_competent.py -> assets/quickstart/competent/model, the start
           of the quickstart: it solves most problems, in one style of its own
student:   trains configs/quickstart_student.py -> assets/quickstart/student, half learned in the
           teacher's three styles: the start of quickstart_lacking

The problems of quickstart_lacking come from reasoning-gym's chain_sum. A template is a problem's
operator sequence ("+-") and, apart from it, its phrasing; both are divided over the splits, so no
problem, no operator sequence and no phrasing of a split occurs in another one. The problems of the
quickstart are the study's (dcod_jax/study/domain.py): no problem is in two sets, and those of
longer.jsonl have more terms than any prompt.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dcod_jax.configs.study import get_config as study_recipe
from dcod_jax.errors import DcodError
from dcod_jax.study import domain
from dcod_jax.study.arithmetic import Chain, worked_traces
from dcod_jax.study.domain import StudyProblem

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "dcod_jax" / "assets" / "quickstart"
BUILD = ROOT / "build" / "quickstart"

SEED = 7
DRAWS = 100_000  # expressions drawn from chain_sum, repetitions included
# Pieces of the shuffled training problems; the other splits keep the first ones drawn of each
# operator sequence, in equal shares as far as a sequence has that many.
TEACHER, STUDENT, PROMPTS = 14_000, 5_000, 2_500
VALIDATION, EVAL = 500, 500
EVERY_STYLE = {"equations": 1.0, "words": 1.0, "groups": 1.0}
COMPETENT_STYLE = {"equations": 1.0}
COMPETENT, COMPETENT_PROMPTS, COMPETENT_SET = 6_000, 3_000, 500
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
SHAPES["competent"] = SHAPES["student"]
HOMES = {"teacher": "teacher", "student": "student", "competent": "competent/model"}

# Operator sequences and phrasings that only this split has; "train" has all the other sequences.
# A held-out sequence is never the longest: a tiny model that saw no chain with these signs at
# these places fails on it, while one that ends where it never saw one end is within its reach.
# Several of several lengths, because how a model takes to one or two sequences is luck.
OPERATORS: dict[str, tuple[str, ...]] = {
    "validation": ("-", "-+-", "++-+", "+--+", "-++-"),
    "eval": ("+-", "+-+", "--+", "+-++", "-+-+", "++--"),
}
# Many training phrasings of many lengths: with twenty of them even a good teacher lost half of its
# accuracy on an unseen one, because it found the numbers by their distance from the start.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "train": (
        *("{}=", "{}.", "{}?", "Add {}.", "Do {}.", "Get {}.", "Now {}.", "So {}?", "Sum {}."),
        *("Find {}.", "Give {}.", "Make {}.", "Next {}.", "Say {}.", "Tell {}.", "Then {}?"),
        *("Count {}.", "Guess {}.", "I need {}.", "Once more {}.", "Show me {}.", "Take {}."),
        *("Bring me {}.", "Compute {}.", "I want {}.", "Quickly {}.", "Reckon {}.", "Write {}."),
        *("Do the sum {}.", "Please do {}.", "Tell me {}.", "The sum {}?", "Try it {}."),
        *("Can you do {}?", "How about {}?", "How much is {}?", "Now what is {}?", "What is {}?"),
        *("Figure out {}.", "Let us see {}.", "The result {}?", "What makes {}?", "Work out {}."),
        *("I have to find {}.", "My sum is {}.", "Who can tell me {}?", "Which number is {}?"),
        *("Give me the total {}.", "Here is one more {}.", "Would you work out {}?"),
    ),
    "validation": ("Solve {}.", "Value of {}?", "Determine {}."),
    "eval": ("Calculate {}.", "Evaluate {}.", "How big is {}?"),
}
TERMS = (2, 6)  # shortest and longest chain

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))

EXPORTED = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def split_of(operators: str) -> str:
    """The split an operator sequence belongs to: "+-" -> "eval", "++" -> "train"."""
    return next((name for name, own in OPERATORS.items() if operators in own), "train")


def parse_expression(expression: str) -> tuple[tuple[int, ...], str]:
    """ "8 + 5 - 4" -> ((8, 5, 4), "+-")."""
    if not re.fullmatch(r"\d+( ?[+-] ?\d+)+", expression):
        raise DcodError(f'expected a chain such as "8 + 5 - 4", got {expression!r}')
    numbers = tuple(int(number) for number in re.findall(r"\d+", expression))
    return numbers, "".join(re.findall(r"[+-]", expression))


def make_problems(expressions: Iterable[str], *, seed: int) -> Iterator[Chain]:
    """Distinct problems in the order of their expressions, each phrased as its split allows.

    Chains whose value falls below zero on the way are left out: a tiny model then needs a third
    of the facts.
    """
    seen: set[str] = set()
    for expression in expressions:
        numbers, operators = parse_expression(expression)
        key = "".join(expression.split())
        if key in seen:
            continue
        seen.add(key)
        phrasings = PHRASINGS[split_of(operators)]
        problem = Chain(numbers, operators, random.Random(f"{seed} {key}").choice(phrasings))
        if min(problem.running_values()) >= 0:
            yield problem


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character (printable ASCII and newline) with a chat template.

    "<|end|>" ends a turn and the text; padding has a token of its own. 101 tokens.
    """
    names = [*SPECIAL_TOKENS, *ALPHABET]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=None,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


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
        by_split[split_of(problem.operators)].append(problem)
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


def shipped_problems(
    made: dict[str, list[Chain]], competent: dict[str, list[StudyProblem]]
) -> dict[str, str]:
    """{file name in the assets: content}."""
    names = ("prompts", "validation", "eval")
    files: dict[str, Sequence[StudyProblem]] = {f"{name}.jsonl": made[name] for name in names}
    for name in (*names, "longer"):
        files[f"competent/{name}.jsonl"] = competent[name]
    return {name: jsonl(p.record() for p in problems) for name, problems in files.items()}


def competent_problems() -> dict[str, list[StudyProblem]]:
    """Problems of the quickstart: held out, to sample the teacher on, and of the start."""
    config = study_recipe()
    config.study.problems = COMPETENT_SET
    held_out = domain.held_out(config)
    found = {"validation": held_out["validation"], "eval": held_out["in"]}
    found["longer"] = held_out["longer"]
    prompts = domain.training_problems(config, "traces", config.study.terms)
    worked = domain.training_problems(config, "start", config.study.start_terms)
    found["prompts"] = distinct(prompts, COMPETENT_PROMPTS)
    return found | {"worked": list(itertools.islice(worked, COMPETENT))}


def distinct(problems: Iterator[StudyProblem], count: int) -> list[StudyProblem]:
    """The first `count` problems that differ; their expressions are ids."""
    found: dict[str, StudyProblem] = {}
    while len(found) < count:
        problem = next(problems)
        found.setdefault(problem.expression, problem)
    return list(found.values())


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
    competent = competent_problems()
    (ASSETS / "competent").mkdir(exist_ok=True)
    for name, content in shipped_problems(made, competent).items():
        (ASSETS / name).write_text(content)
    solved: dict[str, Sequence[StudyProblem]] = {**made, "competent": competent["worked"]}
    for name in SHAPES:
        styles = COMPETENT_STYLE if name == "competent" else EVERY_STYLE
        traces = worked_traces(solved[name], styles, seed=SEED)
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
    target = ASSETS / HOMES[name]
    target.mkdir(parents=True, exist_ok=True)
    for file in EXPORTED:
        shutil.copyfile(run / "export" / file, target / file)


def main(stages: list[str]) -> None:
    for stage in stages or ["data", *SHAPES]:
        if stage == "data":
            make_data()
        elif stage in SHAPES:
            make_model(stage)
        else:
            raise SystemExit(f"unknown stage {stage!r}: expected data, {', '.join(SHAPES)}")


if __name__ == "__main__":
    main(sys.argv[1:])
