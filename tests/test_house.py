"""The house: every import points down, and `drafters/` knows nothing of the rest."""

import ast
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "hf_specauf"
# From the ground up. A module may import from its own floor and from those below.
FLOORS = [
    "drafters",  # travels to the Hub alone
    "keys",
    "cli",  # loads the commands by name, and they take from it how they end
    "records",
    "identity",
    "losses",
    "target",
    "data",
    "layouts",
    "serving",
    "training.config",
    "training.callbacks",
    "training.waiting",
    "evaluation",
    "target_states",
    "recipe",
    "publishing",
    "training",
    "regenerate",
    "train",
    "",  # the other commands
]


def floor(module: str) -> int:
    """The floor of `wing.file`, or of `file`."""
    return next(i for i, name in enumerate(FLOORS) if not name or module == name or module.startswith(name + "."))


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports, as `wing.file`."""
    here = path.relative_to(PACKAGE).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join((*base, name)) for name in names}
    return found


def test_every_import_points_down():
    arrows = 0
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__":  # the public face, which hands names out
            continue
        for other in imports(path):
            arrows += 1
            assert floor(other) <= floor(module), f"{module} imports {other}, which stands above it"
    assert arrows > 100


def test_nobody_sees_more_than_a_dozen_files_at_once():
    for folder in (PACKAGE, *(path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())):
        files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, f"{folder.name}: {sorted(files)}"
