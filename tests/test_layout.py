"""Imports point down: the command line -> tuners, budget -> kernels; one file touches PEFT's private tables."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bem_peft"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = ("kernels", "tuners", "cli")


def floor(parts: tuple[str, ...]) -> int | None:
    """0 for a kernel, 1 for a tuner, 2 for the command line; None for the package's own file and version."""
    return FLOORS.index(parts[0]) if parts and parts[0] in FLOORS else None


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    own = floor(file.relative_to(PACKAGE).with_suffix("").parts)
    for name in imported(file):
        other = floor(tuple(name.split(".")[1:])) if name.split(".")[0] == "bem_peft" else None
        if own is not None and other is not None:
            assert other <= own, f"{file.name} imports {name}, which stands above it"


def test_budgets_serve_every_method_and_know_none() -> None:
    for file in sorted((PACKAGE / "budget").glob("*.py")):
        assert not any(name.startswith("bem_peft.tuners") for name in imported(file)), file.name


def test_one_file_touches_the_private_tables_of_peft() -> None:
    tables = ("PEFT_TYPE_TO_", "_member_map_", "_value2member_map_")
    assert [f.name for f in FILES if any(t in f.read_text(encoding="utf-8") for t in tables)] == ["registry.py"]
