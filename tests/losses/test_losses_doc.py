"""docs/losses.md against the registry, the configuration and its messages."""

import importlib.util
import re
from pathlib import Path

import pytest

from dcod_jax import config as configs
from dcod_jax.errors import DcodError
from dcod_jax.losses import weights
from dcod_jax.losses.divergences import DIVERGENCES
from dcod_jax.train.settings import loss_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
RECIPES = [line for line in re.search(r"```\n(.*?)```", PAGE, re.S)[1].splitlines() if line]
REFUSED = re.findall(r"^\| `(\S+=[^`]*)` \| (.*) \|$", PAGE, re.M)


def maker():
    """tools/make_losses_doc.py as a module."""
    path = ROOT / "tools" / "make_losses_doc.py"
    spec = importlib.util.spec_from_file_location("make_losses_doc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base(**changes):
    """A configuration with a teacher and a top-k cache, and then the changes."""
    config = configs.load_recipe(configs.BASE)
    for key, text in ({"teacher.path": "T", "score.top_k": "64"} | changes).items():
        configs.assign(config, key, text)
    return config


def test_the_tables_are_those_of_the_registries():
    assert maker().updated(PAGE) == PAGE, "run python tools/make_losses_doc.py"


@pytest.mark.parametrize("registry", ["DIVERGENCES", "WEIGHTS"])
def test_another_registry_makes_another_page(monkeypatch, registry):
    module = maker()
    first, *_ = getattr(module, registry).items()
    monkeypatch.setattr(module, registry, dict([first]))
    assert module.updated(PAGE) != PAGE


def test_every_recipe_is_a_configuration_and_every_divergence_and_weight_named():
    config = base()
    config.compare = tuple(" ".join(line.split()) for line in RECIPES)
    losses = {name: loss_config(made) for name, made in configs.variants(config)}
    assert len(losses) == len(RECIPES)
    assert {loss.divergence for loss in losses.values()} == set(DIVERGENCES)
    assert all(f"`{name}`" in PAGE for name in weights.WEIGHTS)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_the_page_calls_refused_is_refused_in_these_words(changes, message):
    config = base(**dict(change.split("=", 1) for change in changes.split()))
    with pytest.raises(DcodError) as error:
        configs.check(config)
    assert message in str(error.value)


def test_the_page_has_refusals():
    assert len(REFUSED) >= 8
