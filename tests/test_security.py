"""SECURITY.md says what is never loaded: no module of the packages can do it. And CITATION.cff names this version."""

from __future__ import annotations

import ast
from pathlib import Path

import yaml

from bem_peft import __version__

ROOT = Path(__file__).parents[1]
SAFE = {"yaml.safe_load", "yaml.safe_dump"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of names, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def what_loads_code(source: str) -> list[str]:
    """Calls and imports by which a file could run code, and the request to trust a model's own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [n for n in names if n.partition(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib")]
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            found.append(node.arg)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            is_yaml = name.startswith("yaml.") and "load" in name and name not in SAFE
            is_safe = any(
                dotted(a) in ("_Loader", "yaml.SafeLoader") for a in [*node.args, *[k.value for k in node.keywords]]
            )
            if name in ("eval", "exec", "torch.load", "numpy.load", "np.load") or (is_yaml and not is_safe):
                found.append(name)
    return found


def test_nothing_in_the_packages_reads_pickle_or_runs_what_it_reads() -> None:
    files = [*(ROOT / "bem_peft").rglob("*.py"), *(ROOT / "bem_peft_cli").rglob("*.py")]
    found = {str(file.relative_to(ROOT)): what_loads_code(file.read_text(encoding="utf-8")) for file in files}
    assert len(found) > 80
    assert {file: calls for file, calls in found.items() if calls} == {}


def test_what_would_run_code_is_found() -> None:
    for line in (
        "import pickle", "from joblib import load", "eval(text)", "exec(text)", "torch.load(path)", "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ):  # fmt: skip
        assert what_loads_code(line), line
    assert what_loads_code("yaml.safe_load(text); model.eval(); yaml.load(text, Loader=_Loader)") == []


def test_the_loader_of_experiments_is_a_safe_one() -> None:
    from bem_peft import yaml_text

    assert issubclass(yaml_text._Loader, yaml.SafeLoader)


def test_the_citation_is_of_this_version_and_names_nobody_else() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    released = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split(f"## {__version__} (")[1][:10]
    assert str(cited["date-released"]) == released
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
