"""Files of one kind, mutated along the branches that they reach, by atheris (Linux, Python 3.11+).

    pip install atheris
    PYTHONPATH=. python tests/fuzz_guided.py report -max_total_time=3600

The first word is a reader of fuzz.py; the others are libFuzzer's. An input is the number of the
file that it replaces, in one byte, and that file's content. Half of the mutations are those of
fuzz.py, which keep JSON JSON; the others are libFuzzer's. What is no DcodError ends it, with the
input in a file crash-*.
"""

import contextlib
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dcod_jax"]):
    import fuzz

    from dcod_jax.errors import DcodError


def main() -> None:
    name, *words = sys.argv[1:]
    root = Path(tempfile.mkdtemp(prefix="dcod-fuzz-"))
    reader, files = fuzz.READERS[name]
    home = fuzz.write_all(root)[name]
    good = [(home / file).read_bytes() for file in files]
    seeds = root / "seeds"
    seeds.mkdir()
    for place, content in enumerate(good):
        (seeds / files[place].replace("/", "-")).write_bytes(bytes([place]) + content)

    def read(data: bytes) -> None:
        if not data:
            return
        place = data[0] % len(files)
        (home / files[place]).write_bytes(data[1:])
        if name == "shard":
            fuzz.fit_manifest(home)
        try:
            reader(home)
        except DcodError:
            pass
        finally:
            (home / files[place]).write_bytes(good[place])

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if dice.random() < 0.1:  # all files are always read: the corpus keeps one good one
            place = dice.randrange(len(files))
            data = bytes([place]) + good[place]
        if data and dice.random() < 0.5:
            suffix = Path(files[data[0] % len(files)]).suffix
            with contextlib.suppress(ValueError, LookupError, RecursionError):  # no JSON any more
                return (data[:1] + fuzz.mutated(data[1:], suffix, dice))[:max_size]
        return atheris.Mutate(data, max_size)

    limits = ["-rss_limit_mb=4096", "-timeout=60", "-max_len=1000000"]
    atheris.Setup([sys.argv[0], *limits, *words, str(seeds)], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
