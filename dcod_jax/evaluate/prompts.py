"""How a problem becomes a prompt: instruction, worked examples, chat turns or plain text."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from dcod_jax.data import chat
from dcod_jax.data.tokenizer import Tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.problems import Problem, ProblemSet, problem_sets, read_records
from dcod_jax.files import as_path
from dcod_jax.models.config import ModelConfig
from dcod_jax.sample.sampler import check_room

EXEMPLARS = pathlib.Path(__file__).parents[1] / "assets" / "evaluate" / "exemplars.jsonl"
PLAIN_STOP = "\nQuestion:"  # a base model in the plain form goes on with the next question


@dataclasses.dataclass(frozen=True)
class PromptForm:
    """How a problem becomes a prompt: chat turns, or plain "Question: … Answer:" text."""

    form: str = "chat"
    exemplars: tuple[tuple[str, str], ...] = ()  # (question, worked answer)
    instruction: str = ""  # behind every question

    def prompt(self, tokenizer: Tokenizer, problem: Problem) -> list[int]:
        """Token ids up to where the answer starts."""
        if self.form == "plain":
            return chat.encode_text(tokenizer, self._text(problem))
        return chat.encode_prompt(tokenizer, self._messages(problem))

    def _ask(self, question: str) -> str:
        return f"{question}\n{self.instruction}" if self.instruction else question

    def _messages(self, problem: Problem) -> list[dict[str, str]]:
        *before, last = problem.messages
        last = {**last, "content": self._ask(last["content"])}
        if not self.exemplars:
            return [*before, last]
        system = [m for m in before if m["role"] == "system"]
        talk = [m for m in before if m["role"] != "system"]
        pairs = [(("user", self._ask(q)), ("assistant", a)) for q, a in self.exemplars]
        shown = [{"role": role, "content": text} for pair in pairs for role, text in pair]
        return [*system, *shown, *talk, last]

    def _text(self, problem: Problem) -> str:
        lead = "".join(m["content"] + "\n\n" for m in problem.messages if m["role"] == "system")
        talk = [m for m in problem.messages if m["role"] != "system"]
        if [m["role"] for m in talk] != ["user"]:
            raise DcodError("evaluate.form=plain asks one question, this is a conversation")
        pairs = [f"Question: {self._ask(q)}\nAnswer: {a}\n\n" for q, a in self.exemplars]
        return lead + "".join(pairs) + f"Question: {self._ask(talk[0]['content'])}\nAnswer:"


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    *models: ModelConfig,
    form: PromptForm,
    key: str,
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of every prompt.

    Raises DcodError with the problem's place where one cannot be encoded, or leaves no room in a
    model for the max_new_tokens of this key.
    """
    prompts = []
    for problem in problems:
        try:
            prompts.append(form.prompt(tokenizer, problem))
        except DcodError as error:
            raise DcodError(f"{problem.source}: {error}") from error
    names = [f"{problem.source}: the prompt" for problem in problems]
    for model in models:
        check_room(model, prompts, names, max_new_tokens=max_new_tokens, key=key)
    return prompts


def set_prompts(
    config: Any, problem_set: ProblemSet, tokenizer: Tokenizer, model: ModelConfig
) -> list[list[int]]:
    """`encode_prompts` of a problem set in the form of evaluate.*."""
    key, most = "evaluate.max_new_tokens", config.evaluate.max_new_tokens
    options = {"form": prompt_form(config, problem_set), "key": key, "max_new_tokens": most}
    return encode_prompts(problem_set.problems, tokenizer, model, **options)


def check_sets(config: Any, tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise DcodError where evaluate.problems or a set cannot be read or leaves no room."""
    for one in problem_sets(config):
        set_prompts(config, one, tokenizer, model)


def prompt_form(config: Any, problem_set: ProblemSet) -> PromptForm:
    """The form that evaluate.form, .shots, .exemplars and .instruction ask for.

    Raises DcodError where an exemplar is one of the problems: it would give the answer away.
    """
    settings = config.evaluate
    exemplars = read_exemplars(settings.exemplars, settings.shots)
    asked = {p.messages[-1]["content"].strip(): p.source for p in problem_set.problems}
    for question, _ in exemplars:
        if source := asked.get(question.strip()):
            raise DcodError(
                f"an exemplar of evaluate.exemplars is the problem at {source}: {question[:60]!r}"
            )
    chosen = settings.instruction
    instruction = problem_set.instruction if chosen == "auto" else chosen
    return PromptForm(settings.form, exemplars, instruction)


def read_exemplars(path: str, shots: int) -> tuple[tuple[str, str], ...]:
    """The first `shots` pairs of a JSONL file {"prompt", "completion"}; "": those built in."""
    if not shots:
        return ()
    pairs = []
    for source, record in read_records(as_path(path) if path else EXEMPLARS):
        pair = record.get("prompt"), record.get("completion")
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise DcodError(f'{source}: an exemplar is {{"prompt": text, "completion": text}}')
        pairs.append(pair)
    if len(pairs) < shots:
        raise DcodError(
            f"evaluate.shots={shots}, but {path or 'the built-in file'} has {len(pairs)} exemplars;"
            " lower it or name a longer file in evaluate.exemplars"
        )
    return tuple(pairs[:shots])
