"""Imports point down: the command line -> tuners, budget -> kernels; no two modules import each other in a circle; one
file touches PEFT's private tables."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bem_peft"
COMMANDS = PACKAGE.with_name("bem_peft_cli")
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
    "budget": {"budget", "kernels"},  # serves every method, and knows none; counts by the torch forms
    "evaluation": {"evaluation", "budget"},  # knows no method either
    "training": {"training", "budget", "tuners", "kernels"},
    "integrations": {"integrations", "tuners"},  # plugins, imported by the trainers of others
    "experiments": {"experiments", "training", "evaluation", "budget", "tuners", "kernels", "sites"},
}
EVERYWHERE = {
    "_version",
    "field_checks",
    "json_text",
    "kept",
    "upstream",
    "whole_file",
    "yaml_text",
}  # which import nothing of the package


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    folder = file.relative_to(PACKAGE).parts[0]
    for name in imported(file):
        parts = name.split(".")
        if folder in MAY_IMPORT and parts[0] == "bem_peft" and len(parts) > 1:
            allowed = MAY_IMPORT[folder] | EVERYWHERE
            assert parts[1] in allowed, f"{file.name} imports {name}, which stands above it"


@pytest.mark.parametrize("file", sorted(COMMANDS.glob("*.py")), ids=lambda file: file.name)
def test_the_command_line_loads_the_package_where_a_command_runs_and_is_imported_by_nobody(file: Path) -> None:
    """So that `--help` waits for nothing: at its top a file imports the standard library and its own folder."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            root = name.split(".")[0]
            assert root in sys.stdlib_module_names or root == COMMANDS.name, f"{file.name} imports {name} at its top"
    assert not any(COMMANDS.name in name for other in FILES for name in imported(other))


@pytest.mark.parametrize(("room", "below"), [("steps", ""), ("calls", "steps"), ("base", "steps calls")])
def test_the_rooms_of_the_tuners_point_down(graph: dict[str, set[str]], room: str, below: str) -> None:
    inside = {name for name in graph if name.startswith(f"bem_peft.tuners.{room}.")}
    allowed = tuple(f"bem_peft.tuners.{name}." for name in (room, *below.split()))
    for name in inside:
        above = {used for used in graph[name] if used.startswith("bem_peft.tuners.") and not used.startswith(allowed)}
        assert above == set(), f"{name} imports {above}, which stands above it"


def test_every_folder_has_its_floor() -> None:
    folders = {file.relative_to(PACKAGE).parts[0] for file in FILES if len(file.relative_to(PACKAGE).parts) > 1}
    assert folders == set(MAY_IMPORT)


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, functions' bodies included, but for what stands under `if TYPE_CHECKING:`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from nodes_that_run(other)
        else:
            yield from nodes_that_run(child)


def holds_only_exports(tree: ast.Module) -> bool:
    """Whether a folder's file has a docstring, imports, `__all__`, `__getattr__` and `__dir__`, and nothing else."""

    def is_export(node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            return all(map(is_export, (*node.body, *node.orelse)))
        if isinstance(node, ast.Assign):
            return ast.unparse(node.targets[0]) == "__all__"
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_getattr = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        return is_docstring or is_getattr or isinstance(node, (ast.Import, ast.ImportFrom))

    return all(map(is_export, tree.body))


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of `package` that it imports, at its top or inside functions; without folders' exports."""
    trees: dict[str, ast.Module] = {}
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if file.name != "__init__.py" or not holds_only_exports(tree):
            trees[".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")] = tree
    graph = {}
    for module, tree in trees.items():
        names: set[str] = set()
        for node in nodes_that_run(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    names.add(whole if whole in trees else str(node.module))
            elif isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
        graph[module] = names & set(trees) - {module}
    return graph


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """The strongly connected components of more than one module."""

    def reached(start: str) -> set[str]:
        found, left = set(), [start]
        while left:
            new = graph[left.pop()] - found
            found |= new
            left += new
        return found

    reach = {module: reached(module) for module in graph}
    return {frozenset(m for m in reach[module] if module in reach[m]) for module in graph if module in reach[module]}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph(PACKAGE)


def test_no_two_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert sorted(map(sorted, circles(graph))) == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a.py": "from p import b", "b.py": "def f():\n    from p.a import x"}, ["p.a", "p.b"]),
        ({"a.py": "import p.b", "b.py": "from p.c import x", "c.py": "from p import a"}, ["p.a", "p.b", "p.c"]),
        ({"a.py": "from p import b", "b.py": "if TYPE_CHECKING:\n    from p import a\nelse:\n    a = 1"}, []),
        ({"__init__.py": '"""Exports."""\nfrom p.a import x\n__all__ = ["x"]', "a.py": "from p import x"}, []),
        ({"__init__.py": "from p.a import x\ny = x + 1", "a.py": "from p import y"}, ["p", "p.a"]),
    ],
)
def test_a_circle_is_found_where_its_imports_run(files: dict[str, str], found: list[str], tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name, text in files.items():
        (tmp_path / "p" / name).write_text(text)
    assert [sorted(members) for members in circles(import_graph(tmp_path / "p"))] == ([found] if found else [])


FORMS = ("bem_peft.kernels.backend", "bem_peft.kernels.cpp", "bem_peft.kernels.triton_")


@pytest.mark.parametrize("method", sorted(file.stem for file in PACKAGE.glob("tuners/pt*.py")))
def test_a_method_does_not_name_the_form_that_computes_it(graph: dict[str, set[str]], method: str) -> None:
    named = {name.rpartition(".")[2] for name in graph[f"bem_peft.tuners.{method}"] if name.startswith(FORMS)}
    assert named == set()


def test_one_file_touches_the_private_tables_of_peft() -> None:
    tables = ("PEFT_TYPE_TO_", "_member_map_", "_value2member_map_")
    found = [f.name for f in FILES if any(t in f.read_text(encoding="utf-8") for t in tables)]
    assert found == ["registry.py", "upstream.py"]  # which only asks whether they are there
