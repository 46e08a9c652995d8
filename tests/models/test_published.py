"""Configs that families publish (published.json): parsed, and as many parameters as published.

They are written down from memory of their config.json; counts are those of the files on the hub.
"scans" are [layers in a period, periods] of each scan. tools/bench_aot.py compiles their steps, and
docs/models.md has a table of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcod_jax.models import config as configs
from dcod_jax.models import counts
from dcod_jax.models.layer_kinds import groups

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen3-30B-A3B", 3.3), ("Mixtral-8x7B-v0.1", 12.9), ("OLMoE-1B-7B-0924", 1.3)],
)
def test_a_token_uses_as_many_parameters_as_published(name, billions):
    config = configs.from_hf(PUBLISHED[name]["config"])
    active = counts.num_params(config, active=True) / 1e9
    assert active == pytest.approx(billions, abs=0.06)  # published to one digit, cut or rounded


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_published_number_of_parameters(name):
    config = configs.from_hf(PUBLISHED[name]["config"])
    assert counts.num_params(config) == PUBLISHED[name]["parameters"]
    found = [[len(kinds), periods] for kinds, periods in groups(config.kinds)]
    assert found == PUBLISHED[name]["scans"]
    assert configs.from_hf(configs.to_hf(config, dtype="bfloat16")) == config


def test_the_table_of_families_names_their_published_configs_and_files():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")][1:]  # without the head
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0].strip("`"): row for row in rows}
    assert list(table) == list(configs.FAMILIES)
    for name, row in table.items():
        own = [key for key, model in PUBLISHED.items() if model["config"]["model_type"] == name]
        assert row[3] == (", ".join(own) or "none")
        assert all(f"`{file}`" in row[6] for file in configs.FAMILIES[name].gguf)
