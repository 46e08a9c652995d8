"""Print the lowest version of each dependency that pyproject.toml allows, as pip constraints.

python tools/lowest.py > constraints.txt
"""

import re
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["gguf"], *extras["gcs"], *extras["test"]]:
        lower = re.fullmatch(r"([\w.-]+)(?:>=|==)([\w.]+).*", requirement)
        if lower:
            print(f"{lower[1]}=={lower[2]}")
            if lower[1] == "jax":
                print(f"jaxlib=={lower[2]}")


if __name__ == "__main__":
    main()
