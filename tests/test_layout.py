"""Imports point down: the command line -> tuners, budget -> kernels; one file touches PEFT's private tables."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bem_peft"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


# folder -> the folders that it may import from; what is beside the folders (hub.py) may import from all
MAY_IMPORT = {
    "kernels": {"kernels"},
    "sites": {"sites"},
    "tuners": {"tuners", "kernels", "sites"},
    "budget": {"budget"},  # serves every method, and knows none
    "evaluation": {"evaluation", "budget"},  # likewise
    "training": {"training", "budget", "tuners", "kernels"},
    "experiments": {"experiments", "training", "evaluation", "budget", "tuners", "kernels", "sites"},
    "cli": {"cli", "experiments", "training", "evaluation", "budget", "tuners", "kernels", "sites"},
}
EVERYWHERE = {"_version", "field_checks", "kept", "upstream", "whole_file"}  # which import nothing of the package


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    folder = file.relative_to(PACKAGE).parts[0]
    for name in imported(file):
        parts = name.split(".")
        if folder in MAY_IMPORT and parts[0] == "bem_peft" and len(parts) > 1:
            allowed = MAY_IMPORT[folder] | EVERYWHERE
            assert parts[1] in allowed, f"{file.name} imports {name}, which stands above it"


def test_every_folder_has_its_floor() -> None:
    folders = {file.relative_to(PACKAGE).parts[0] for file in FILES if len(file.relative_to(PACKAGE).parts) > 1}
    assert folders == set(MAY_IMPORT)


def test_one_file_touches_the_private_tables_of_peft() -> None:
    tables = ("PEFT_TYPE_TO_", "_member_map_", "_value2member_map_")
    found = [f.name for f in FILES if any(t in f.read_text(encoding="utf-8") for t in tables)]
    assert found == ["registry.py", "upstream.py"]  # which only asks whether they are there
