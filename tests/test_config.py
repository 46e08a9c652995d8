"""Recipes and the command line: precedence, types, and messages that name the mistake."""

import dataclasses
import functools
import re

import pytest

from dcod_jax import config, config_checks
from dcod_jax.errors import DcodError, TerminatedError
from dcod_jax.losses import weight_errors
from dcod_jax.models import remat
from dcod_jax.train import settings

BASE = ["--config", str(config.BASE)]


def load(*words):
    return config.load([*BASE, *words], verb="train")


def recipe(tmp_path, body):
    head = ["from dcod_jax.configs.base import get_config as base", "", "def get_config():"]
    inside = ["c = base()", *body, "return c"]
    path = tmp_path / "mine.py"
    path.write_text("\n".join([*head, *(f"    {line}" for line in inside), ""]))
    return ["--config", str(path)]


def test_precedence_is_base_then_recipe_then_command_line(tmp_path):
    words = recipe(tmp_path, ["c.seed = 3", "c.train.steps = 7"])
    loaded = config.load([*words, "--config.train.steps=9", "--config.seed", "4"], verb="train")
    assert (loaded.seed, loaded.train.steps, loaded.train.keep) == (4, 9, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--config.data.verify_checksums=false", False),
        ("--config.data.verify_checksums=1", True),
        ("--config.prepare.overlap_files=a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("--config.prepare.overlap_files=('a.jsonl',)", ("a.jsonl",)),
        ("--config.optim.learning_rate=3e-4", 3e-4),
        ("--config.train.best_metric=", ""),
    ],
)
def test_values_are_read_as_the_type_of_their_key(text, expected):
    key = text.partition("=")[0].removeprefix("--config.")
    assert config.keys(load(text))[key] == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.loss.weights.temprature=2"], "did you mean 'loss.weights.temperature'?"),
        (["--config.learning_rate=2"], "did you mean 'optim.learning_rate'?"),
        (["--config.train.steps=many"], "expected a whole number, such as 1000"),
        (["--config.mesh.fsdp=-1"], "mesh.data=-1 and mesh.fsdp=-1: only one may take"),
        (["--config.student.template_kwargs=x"], "expected name=value"),
        (["--config.prepare.form=openr2"], "prepare.form='openr2' must be one of auto, openr1"),
        (["--config.train.steps=1.5"], "expected a whole number, such as 1000"),
        (["--config.train.progress=maybe"], "expected true or false"),
        (
            ["--config.loss.weights.name=sigmod"],
            "loss.weights.name='sigmod' must be one of uniform, sigmoid",
        ),
        (["--config.train.steps=0"], "train.steps=0 must be greater than 0"),
        (["--config.optim.b1=1.0"], "optim.b1=1.0 must be in [0, 1)"),
        (["--config.data.seq_len=64"], "data.max_length=2048 must not exceed data.seq_len=64"),
        (["--config.train.microbatches=3"], "must be a multiple of train.microbatches=3"),
        (["--config.train.save_every=150"], "must be a multiple of train.eval_every=100"),
        (["--seed=1"], "unknown argument '--seed=1'; did you mean --config.seed?"),
        (["train.steps=5"], "did you mean --config.train.steps?"),
        (["mine.py"], "did you mean --config mine.py?"),
        (["--seeds=1"], "unknown argument '--seeds=1': expected --config FILE"),
        (["--config.optim.lr=1"], "did you mean 'optim.learning_rate'?"),
        (["--config.evaluate.bs=1"], "did you mean 'evaluate.batch_size'?"),
        (["--config.compare=(sft, discord)"], "expected texts in parentheses or with commas"),
        (["--config.compare=('sft')"], "expected texts in parentheses or with commas"),
        ([f"--config.compare=({'-' * 9999}1,)"], "expected texts in parentheses or with commas"),
        (["--config.profile.steps=1:" + "9" * 5000], "must be first:last, such as 10:13"),
        (["--config", "/"], "--config /: a directory; a recipe is a Python file"),
        (["--config.train.local_dir=/disk"], "train.local_every=0 need each other"),
        (["--config.train.local_every=5"], "train.local_dir='' and train.local_every=5 need each"),
        (
            ["--config.train.local_dir=/disk", "--config.train.local_every=100"],
            "train.local_every=100 must be less than train.save_every=100",
        ),
        (
            ["--config.train.local_dir=gs://b/x", "--config.train.local_every=5"],
            "train.local_dir=gs://b/x must be a directory on each host's own disk",
        ),
        (["--config.seed"], "--config.seed needs a value"),
        (["--config", "no/such.py"], "no such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(words, said):
    with pytest.raises(DcodError) as caught:
        load(*words)
    assert said in str(caught.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(DcodError) as caught:
        load("--config.train.steps=0", "--config.loss.divergence=kl")
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            ["c.loss.weights.temprature = 2"],
            "mine.py:5: unknown key 'loss.weights.temprature'; did",
        ),
        (
            ["c.train.stepz = 2"],
            "mine.py:5: unknown key 'train.stepz'; did you mean 'train.steps'?",
        ),
        (
            ["c.training.steps = 2"],
            "mine.py:5: unknown key 'training.steps'; did you mean 'train.s",
        ),
        (["", "c.seed = 'x'"], "mine.py:6: seed='x': expected a whole number"),
        (["c.train.steps = 1e3"], "mine.py:5: train.steps='1000.0': expected a whole number"),
        (["c.compare = 'a'"], "mine.py:5: compare='a': expected texts in parentheses"),
        (["c.teacher.path = None"], "teacher.path='None' must have a value"),
        (["c.seed ="], "mine.py:5:"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_its_line(tmp_path, monkeypatch, body, said):
    words = recipe(tmp_path, body)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DcodError) as caught:
        config.load(["--config", "mine.py"], verb="train")
    with pytest.raises(DcodError, match=re.escape(said)):
        config.load(words, verb="train")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (["1 / 0"], "mine.py:5: division by zero (ZeroDivisionError)"),
        (["raise RuntimeError('no disk')"], "mine.py:5: no disk (RuntimeError)"),
        (["open('/no/such/file')"], "mine.py:5: [Errno 2] No such file"),
        (["raise SystemExit(3)"], "mine.py:5: 3 (SystemExit)"),
        (["assert c.seed == 7"], "mine.py:5:  (AssertionError)"),
        (["def f(): return f()", "f()"], "(RecursionError)"),
        (
            ["from ml_collections import ConfigDict", "c = ConfigDict()"],
            "returned a config without",
        ),
        (["return 3"], "get_config() returned int, not a ConfigDict; begin it with"),
        (["c.run_dir = 'a\\0b'"], "must be a text without NUL characters"),
        (["with c.unlocked(): c.train.stpes = 3"], "unknown key 'train.stpes'; did you mean 'trai"),
        (["with c.unlocked(): c.more = {1: 2}"], "unknown key 'more.1'"),
        (["with c.ignore_type(): c.train.steps = 'x'"], "train.steps='x': expected a whole number"),
        (["with c.ignore_type(): c.run_dir = 3"], "run_dir='3': expected a text"),
        (["with c.ignore_type(): c.compare = 'abc'"], "compare='abc': expected texts"),
        (["c.seed = True"], "seed='True': expected a whole number"),
        (["class Odd(BaseException): pass", "raise Odd('why')"], "why (Odd)"),
        (
            ["class Odd(Exception):", "    def __str__(self): raise ValueError", "raise Odd"],
            ": Odd",
        ),
        (["class Odd(Exception):", "    __str__ = lambda s: exit()", "raise Odd"], ": Odd"),
        (["c.loss.weights.temperature = True"], "loss.weights.temperature='True': expected a num"),
        (["from ml_collections import FrozenConfigDict", "c = FrozenConfigDict(c)"], "FrozenConf"),
    ],
)
def test_a_recipe_may_raise_anything(tmp_path, body, said):
    with pytest.raises(DcodError) as caught:
        config.load(recipe(tmp_path, body), verb="train")
    assert said in str(caught.value)
    assert "mine.py" in str(caught.value) or "run_dir" in str(caught.value)


def test_what_ends_the_process_is_no_mistake_of_the_recipe(tmp_path):
    for name in ("KeyboardInterrupt", "TerminatedError"):
        body = ["from dcod_jax.errors import TerminatedError", f"raise {name}"]
        with pytest.raises((KeyboardInterrupt, TerminatedError)):
            config.load(recipe(tmp_path, body), verb="train")


def test_a_recipe_may_change_the_path_of_imports(tmp_path):
    config.load(recipe(tmp_path, ["import sys", "sys.path.pop(0)"]), verb="train")


def test_a_recipe_without_get_config_or_with_a_broken_import_is_named(tmp_path):
    file = tmp_path / "mine.py"
    for text, said in (
        ("", r"no function get_config\(\); begin it with"),
        ("\0", "null bytes"),
        ("import nowhere", "nowhere"),
    ):
        file.write_text(text)
        with pytest.raises(DcodError, match=rf"mine\.py.*{said}"):
            config.load(["--config", str(file)], verb="train")


NO_NUMBERS = (float("nan"), float("inf"), -float("inf"))
NO_NAMES = ("../../x", "..", ".", "a/b", "/a", "a\\b", ".hidden", "", "x" * 200)


def test_every_number_of_the_config_has_a_range_and_refuses_nonsense():
    flat = config.keys(config.load_recipe(config.STUDY))
    ranged = {key for _, keys in config_checks.RANGES.values() for key in keys.split()}
    for key, value in flat.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        assert key in ranged, f"{key} is in no range of config_checks.RANGES"
        wrong = NO_NUMBERS if isinstance(value, float) else (10**20, -(10**20), 2**31)
        for one in wrong:
            assert any(key in text for text in errors(flat, {key: one})), (key, one)
        if key in config_checks.RANGES["be greater than 0"][1].split():
            assert [text for text in errors(flat, {key: 0}) if text.startswith(f"{key}=0 must")]
    for key in ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "mesh.slices"):
        assert errors(flat, {key: 0}) == [f"{key}=0 must be -1 or at least 1"]
        assert errors(flat, {key: -2})
    assert errors(flat, {"export.step": -2})
    assert not errors(flat, {})


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_of_directories_are_names(name):
    flat = config.keys(config.load_recipe(config.STUDY))
    assert any("compare" in text for text in errors(flat, {"compare": (name,)}))
    assert any("sets" in text for text in errors(flat, {"evaluate.sets": (f"{name}=f.jsonl",)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compare": ("a seed=1", "a seed=2")}, "compare: a is named more than once"),
        ({"compare": ("a run_dir=/etc",)}, "a must not change run_dir=/etc"),
        ({"compare": ("start seed=1",)}, "the name start is taken"),
        ({"compare": ("teacher-a seed=1",)}, "the name teacher-a is taken"),
        ({"compare": ("a export.path=x", "b export.path=x/")}, "export.path=x is named more than"),
        ({"compare": (3,)}, ""),
        ({"report.runs": (["a"],)}, "report.runs"),
        ({"evaluate.stop": ("a", 3)}, "hold texts"),
        ({"prepare.overlap_files": ("a\0",)}, "prepare.overlap_files"),
        ({"student.path": "a\ud800"}, "half surrogates"),
        ({"run_dir": " "}, "name a directory"),  # else the working directory is filled
    ],
)
def test_texts_and_lists_of_texts_are_checked(change, said):
    flat = config.keys(config.load_recipe(config.STUDY))
    found = errors(flat, change)
    assert found
    assert said in found[0]


def test_variants_may_all_export_where_they_do_by_default():
    flat = config.keys(config.load_recipe(config.STUDY))
    assert errors(flat, {"compare": ("a export.path=", "b export.path=")}) == errors(flat, {})


@functools.cache
def base_loss():
    return settings.loss_config(config.to_config(config.load_recipe(config.BASE).to_dict()))


def errors(flat, change):
    return config_checks.config_errors(flat | change, base_loss())


def test_a_default_that_a_record_repeats_is_that_of_the_base_config():
    base = config.load_recipe(config.BASE)
    loss = settings.loss_config(base)
    taid = dataclasses.replace(loss.taid, steps=1)  # of the run, no key of loss
    for record in (loss, loss.weights, taid, settings.optim_config(base)):
        for field in dataclasses.fields(record):
            if field.default is not dataclasses.MISSING:
                assert getattr(record, field.name) == field.default, field.name
    assert {name: base.loss.weights[name] for name in weight_errors._USUAL} == weight_errors._USUAL


def test_help_lists_every_key_with_its_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        load("--config.seed=41", "--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--config.seed=41" in text
    notes = config.comments()
    for key in config.keys(config.load_recipe(config.BASE)):
        assert f"--config.{key}=" in text
        assert notes.get(key), f"{key} has no comment in configs/base.py"
        assert all(line in text for line in notes[key].splitlines())
    names = [name for name in notes if f"--config.{name}=" in text]
    assert re.findall(r"--config\.([\w.]+)=.*\n", text.partition("usage")[2])[1:] == names


@pytest.mark.parametrize("key", ["loss.divergence", "loss.weights.name", "student.remat"])
def test_the_comment_of_a_choice_names_all_of_it(key):
    words = re.findall(r"\w+", config.comments()[key])
    choices = config_checks.CHOICES | {"student.remat": ("auto", *remat.NAMES)}
    assert set(choices[key]) <= set(words)


def test_some_layers_may_be_kept_and_another_remat_is_refused():
    config.load(["--config", "quickstart", "--config.student.remat=dots:12"], verb="train")
    text = "must be auto, none, dots, attention, full, offload, or dots:K or none:K"
    with pytest.raises(DcodError, match=f"student.remat='dots:x' {text}"):
        config.load(["--config", "quickstart", "--config.student.remat=dots:x"], verb="train")


@pytest.mark.parametrize("path", sorted(config.BASE.parent.glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_recipe_is_valid_with_each_of_its_variants(path):
    loaded = config.load(["--config", str(path)], verb="train")
    assert all(variant.run_dir for _, variant in config.variants(loaded))


def test_variants_change_only_what_they_say(tmp_path):
    words = recipe(tmp_path, ["c.compare = ('a seed=1', 'b seed=2 loss.weights.name=uniform')"])
    base = config.load([*words, "--config.run_dir=out"], verb="train")
    (name_a, a), (name_b, b) = config.variants(base)
    assert (name_a, a.seed, a.run_dir, a.data.dataset) == ("a", 1, "out/a", "out/dataset")
    assert (name_b, b.seed, b.run_dir, b.loss.weights.name) == ("b", 2, "out/b", "uniform")
    into = config.replace(base, {"export.path": "models"})
    assert [v.export.path for _, v in config.variants(into)] == ["models/a", "models/b"]
    assert b.export.path == ""
    different = {k for k, v in config.keys(a).items() if config.keys(b)[k] != v}
    assert different == {"seed", "run_dir", "loss.weights.name"}


def test_a_variant_with_a_wrong_key_is_refused(tmp_path):
    base = config.load(recipe(tmp_path, ["c.compare = ('a sed=1',)"]), verb="train")
    with pytest.raises(DcodError, match="did you mean 'seed'"):
        list(config.variants(base))
