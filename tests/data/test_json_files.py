"""A JSON file that nests 100,000 deep is named, whichever file it is."""

import pytest

from dcod_jax.data import dataset
from dcod_jax.errors import DcodError
from dcod_jax.evaluate import problems
from dcod_jax.files import read_json
from dcod_jax.models import hf
from dcod_jax.study import conditions
from dcod_jax.train import metrics


def _manifest(path):
    return dataset.read_manifest(path.parent)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("any.json", read_json),
        ("manifest.json", _manifest),
        ("config.json", hf.load_config),
        ("problems.jsonl", lambda path: list(problems.read_records(path))),
        ("metrics.jsonl", metrics.read_metrics),
        ("results.jsonl", conditions.read_results),
    ],
)
def test_deep_nesting_is_named(tmp_path, name, read) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DcodError, match="nested too deep"):
        read(path)
