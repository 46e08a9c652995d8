"""The command line: verbs, their help without array libraries, exit codes."""

import subprocess
import sys

import pytest

from dcod_jax import __version__, cli, config

HEAVY = ("jax", "numpy", "transformers", "orbax", "grain", "flax", "torch", "datasets")


def test_the_overview_lists_the_verbs_in_the_order_of_the_work(capsys):
    cli.main(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n  {verb} ") for verb in cli.VERBS]
    assert places == sorted(places)
    assert all(verb.about in text for verb in cli.VERBS.values())
    assert ", ".join(config.shipped_recipes()) in text


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"dcod_jax {__version__}\n"


def test_an_unknown_verb_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian"])
    assert ended.value.code == 2
    assert "unknown verb 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_a_shipped_recipe_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(["--config", "quickstart"], verb="train").run_dir == "runs/quickstart"
    (tmp_path / "quickstar.py").write_text("")
    with pytest.raises(config.DcodError, match=r"no such file.*quickstart.*did you mean 'quicks"):
        config.load(["--config", "quickstrat"], verb="train")


def test_flags_of_a_verb_are_config_keys(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run_config_verb", lambda verb, function, argv: seen.append(argv))
    words = ["--config", "r.py", "--topology", "v5e:4x4", "--num-slices=2", "--config.seed=3"]
    cli.run("plan", words)
    assert seen == [
        ["--config", "r.py", "--config.plan.topology", "v5e:4x4", "--config.plan.slices=2",
         "--config.seed=3"]
    ]  # fmt: skip


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_loads_no_array_library(verb):
    """Each verb as `python -m`, in a process that says at its end which modules it has."""
    script = (
        "import atexit, runpy, sys;"
        f"heavy = set({HEAVY!r});"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr));"
        f"sys.argv = ['dcod_jax.{verb}', '--help'];"
        f"runpy.run_module('dcod_jax.{verb}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: dcod" in done.stdout
    assert done.stderr == "[]\n"


def test_output_whose_reader_left_ends_without_a_traceback():
    command = f"{sys.executable} -m dcod_jax train --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("Distil a student")
