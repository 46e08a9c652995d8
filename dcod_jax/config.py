"""Recipe and command line -> one checked, frozen config; the only file that knows ConfigDict."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict

from dcod_jax.copies import local_copy
from dcod_jax.errors import DcodError, TerminatedError, nearest
from dcod_jax.files import Location, Path, as_path

BASE = pathlib.Path(__file__).resolve().parent / "configs" / "base.py"
STUDY = BASE.with_name("study.py")  # the recipe that adds the section `study`
AUTO = "auto"
AUTOMATIC = ("loss.weights.temperature", "loss.weights.offset")  # a number or "auto"


# ---------------------------------------------------------------- reading


def load(argv: Sequence[str], *, verb: str) -> Any:
    """Config of `python -m dcod_jax.<verb> --config recipe.py [--config.key=value ...]`.

    Precedence: configs/base.py < the recipe < the command line, left to right. Raises DcodError
    naming the nearest key on an unknown key, and key, expected type and value on a wrong type.
    `--help` prints every key with its comment and the value it has in the given recipe, and exits.
    """
    recipe, overrides, wants_help = _parse(argv)
    config = load_recipe(recipe or (STUDY if verb == "study" else BASE))
    _check_types(recipe, keys(config))
    for key, text in overrides:
        assign(config, key, text)
    if wants_help:
        print(help_text(verb, config))
        raise SystemExit(0)
    if not recipe:
        raise DcodError(
            f"no recipe given: dcod {verb} --config RECIPE [--config.key=value ...]; RECIPE is a "
            f"Python file or one of {', '.join(shipped_recipes())}; --help lists the keys"
        )
    check(config)
    return FrozenConfigDict(config)


def _check_types(recipe: str, found: dict[str, Any]) -> None:
    """Raise DcodError where a recipe took keys away, added some, or unlocked their types."""
    known = keys(load_recipe(STUDY))
    lacking = {key for key in known if not key.startswith("study.")} - found.keys()
    if wrong := lacking or found.keys() - known.keys():
        what = "without" if lacking else "with the unknown key"
        key = min(wrong)
        hint = "" if lacking else nearest(key, known)
        raise DcodError(f"{recipe}: get_config() returned a config {what} {key!r}{hint}; {_BEGIN}")
    for key, value in found.items():
        kinds = {type(known[key])} | ({int} if type(known[key]) is float else set())
        if value is not None and type(value) not in kinds | ({str} if key in AUTOMATIC else set()):
            expected = _EXPECTED[type(known[key]).__name__]
            raise DcodError(f"{recipe}: {key}={str(value)[:80]!r}: expected {expected}")


def _parse(argv: Sequence[str]) -> tuple[str, list[tuple[str, str]], bool]:
    recipe, overrides, wants_help = "", [], False
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            wants_help = True
            continue
        flag, equals, value = word.partition("=")
        if flag != "--config" and not flag.startswith("--config."):
            name = flag.lstrip("-")
            recipes = word.endswith(".py") or word in shipped_recipes()
            meant = f"--config {word}" if recipes else f"--config.{name}" * (name in comments())
            raise DcodError(
                f"unknown argument {word!r}{f'; did you mean {meant}?' if meant else ''}: expected "
                "--config FILE or --config.key=value, a value with spaces in quotes; --help lists "
                "the keys"
            )
        if not equals:
            if not words:
                raise DcodError(f"{flag} needs a value: {flag}=VALUE")
            value = words.pop(0)
        if flag == "--config":
            recipe = value
        else:
            overrides.append((flag.removeprefix("--config."), value))
    return recipe, overrides, wants_help


def load_recipe(path: Location) -> Any:
    """Run a recipe file's get_config(); mistakes in it are reported with its line."""
    path = _find_recipe(as_path(path))
    path = local_copy(path)
    spec = importlib.util.spec_from_file_location(f"dcod_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise DcodError(f"--config {path}: not a Python file (.py) with get_config()")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # a recipe may import its neighbours, as a script may
    try:
        spec.loader.exec_module(module)
        if "get_config" not in vars(module):
            raise DcodError(f"{path}: it has no function get_config(); {_BEGIN}")
        config = module.get_config()
    except (DcodError, KeyboardInterrupt, TerminatedError):
        raise
    # A recipe is the user's own code and may raise anything.
    except BaseException as error:
        raise DcodError(_recipe_error(path, error)) from error
    finally:
        with contextlib.suppress(ValueError):  # a recipe may change the path
            sys.path.remove(str(path.parent))
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        raise DcodError(
            f"{path}: get_config() returned {type(config).__name__}, not a ConfigDict; {_BEGIN}"
        )
    return config


_BEGIN = (
    "begin it with `from dcod_jax.configs.base import get_config as base` and `c = base()`, change "
    "keys of c and end it with `return c`"
)


def _find_recipe(path: Path) -> Path:
    """The file, or the recipe of the package with this name."""
    shipped = BASE.with_name(f"{path.name}.py")
    if str(path) == path.stem and shipped.is_file():
        return shipped
    if path.is_file():
        return path
    names = shipped_recipes()
    what = "a directory" if path.is_dir() else "no such file"
    raise DcodError(
        f"--config {path}: {what}; a recipe is a Python file, or one of {', '.join(names)}"
        f"{nearest(path.stem, names)}"
    )


def shipped_recipes() -> list[str]:
    """Names of the recipes in dcod_jax/configs, which --config finds by name."""
    return sorted(file.stem for file in BASE.parent.glob("[a-z]*.py") if file != BASE)


def _recipe_error(path: Path, error: BaseException) -> str:
    """The file, the line, and of the config's own refusals the whole key."""
    own = str(path.absolute()) if isinstance(path, pathlib.Path) else str(path)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    line, code = (frames[-1].lineno, frames[-1].line or "") if frames else (None, "")
    if isinstance(error, SyntaxError) and error.filename == own:
        line = error.lineno
    try:
        text = f"{error} ({type(error).__name__})"
    except BaseException:  # whatever its __str__ raises
        text = type(error).__name__
    if found := _REFUSED.search(text):
        name = found[1] or found[2] or found[3]
        place = re.search(rf"\w+\.((?:\w+\.)*{name}(?:\.\w+)*)\s*[-+*/]?=", code)
        key = place[1] if place else name
        text = f"unknown key {key!r}{nearest(key, comments())}"
        if found[3]:
            text = f"{key}={found[4]!r}: expected {_EXPECTED[found[5]]}"
    return f"{path}{f':{line}' if line else ''}: {text}"


# What ConfigDict says of a key or a section that is not there, and of a value of another type.
_REFUSED = re.compile(
    r'Key "(\w+)" does not exist|instead of "(\w+)"'
    r"|field '(\w+)'.*\. (.*) is of original type.*type <class '(bool|int|float|str|tuple)'>"
)
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "tuple": "texts in parentheses or with commas between: ('a', 'b'), ('a',) or a,b",
}


def assign(config: Any, key: str, text: str) -> None:
    """Set one dotted key from command-line text, read as the type that the key has now."""
    known = keys(config)
    if key not in known:
        raise DcodError(f"unknown key --config.{key}{nearest(key, known)}; --help lists the keys")
    parent, leaf = _parent(config, key)
    parent[leaf] = _read(key, text, 1.0 if key in AUTOMATIC else parent[leaf])


def _parent(config: Any, key: str) -> tuple[Any, str]:
    """The section that holds a dotted key, and the key's last name."""
    *sections, leaf = key.split(".")
    for name in sections:
        config = config[name]
    return config, leaf


def _read(key: str, text: str, old: Any) -> Any:
    kind = type(old)
    such = f", such as {old!r}" if kind in (int, float) else ""
    wrong = DcodError(f"--config.{key}={text!r}: expected {_EXPECTED[kind.__name__]}{such}")
    if key in AUTOMATIC:
        wrong = DcodError(f"--config.{key}={text!r}: expected a number or '{AUTO}'")
        if text == AUTO:
            return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind is tuple:
            if text.startswith(("(", "[")):
                found = ast.literal_eval(text)
                if not isinstance(found, tuple | list):  # of ('a') tuple() would make letters
                    raise wrong
                return tuple(found)
            element = type(old[0]) if old else str
            return tuple(element(part.strip()) for part in text.split(",") if part.strip())
    except (KeyError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise wrong from None
    return text


def keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of the leaves."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (ConfigDict, FrozenConfigDict)):
            flat |= keys(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def variants(config: Any) -> Iterator[tuple[str, Any]]:
    """The runs named by config.compare, each in run_dir/<name>; without any, the config itself.

    Each has the dataset of all, and its export in export.path/<name> where that is set.
    """
    if not config.compare:
        yield "", config
        return
    for text in config.compare:
        name, *changes = text.split()
        own = {"run_dir": str(as_path(config.run_dir) / name), "compare": ()}
        own["data.dataset"] = dataset_dir(config)
        own["export.path"] = config.export.path and str(as_path(config.export.path) / name)
        yield name, with_changes(replace(config, own), changes)


def with_changes(config: Any, changes: Sequence[str]) -> Any:
    """The config with ("dotted.key=value", ...) assigned as on the command line, and checked."""
    copy = _copy(config, {})
    for change in changes:
        key, _, value = change.partition("=")
        assign(copy, key, value)
    check(copy)
    return FrozenConfigDict(copy)


def replace(config: Any, changes: dict[str, Any]) -> Any:
    """The config with some dotted keys changed."""
    return FrozenConfigDict(_copy(config, changes))


def _copy(config: Any, changes: dict[str, Any]) -> Any:
    copy: Any = ConfigDict(config.to_dict())
    for key in AUTOMATIC:  # to_dict knows the value that a field has, not those that it may have
        parent, leaf = _parent(copy, key)
        value = parent[leaf]
        del parent[leaf]
        parent[leaf] = FieldReference(value, field_type=object)
    copy.lock()
    copy.update_from_flattened_dict(changes)
    return copy


def dataset_dir(config: Any) -> str:
    """Where prepare writes and score and train read."""
    return config.data.dataset or str(as_path(config.run_dir) / "dataset")


def dataset_lock(config: Any) -> Path:
    """Held shared by who reads the dataset for long, and alone by who writes it."""
    path = as_path(dataset_dir(config))
    return path.with_name(f".{path.name}.lock")


def to_config(values: dict[str, Any]) -> Any:
    """The config whose to_dict() this is."""
    return FrozenConfigDict(values)


# ---------------------------------------------------------------- checks and help


def check(config: Any) -> None:
    """Raise DcodError with a line for each thing to refuse before a device or a file is touched."""
    from dcod_jax.config_checks import config_errors  # loads jax, which --help does not
    from dcod_jax.train.settings import loss_config

    wrong = config_errors(keys(config), loss_config(config))
    if wrong:
        raise DcodError("\n".join(wrong))


def comments() -> dict[str, str]:
    """{dotted key: comment}: that of its line in a base file, after the comment lines above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in (BASE.read_text() + STUDY.read_text()).splitlines():
        match = re.match(r"\s+c\.([\w.]+) = (?!ConfigDict\(\)).*?  # (.*)$", line)
        if match:
            found.setdefault(match[1], "\n".join([*above, match[2]]))
        note = re.match(r"\s+# (.*)$", line)
        above = [*above, note[1]] if note else []
    return found


def help_text(verb: str, config: Any) -> str:
    """Usage, the verb's own description and every key, in the base's order, with its comment."""
    spec = importlib.util.find_spec(f"dcod_jax.{verb}.command")
    source = as_path(spec.origin).read_text() if spec and spec.origin else ""
    about = ast.get_docstring(ast.parse(source)) or ""
    usage = f"dcod {verb} --config RECIPE [--config.key=value ...]"
    lines, notes = [about, "", f"usage: {usage}", ""], comments()
    flat = keys(config)
    for key in [*filter(flat.__contains__, notes), *sorted(flat.keys() - notes.keys())]:
        note = textwrap.indent(notes.get(key, ""), " " * 8)
        lines.append(f"  --config.{key}={flat[key]!r}\n{note}")
    return "\n".join(lines)
