"""What the README and docs/ say of the rest of the repository is so: links, anchors, navigation, messages, command
lines, names, files, targets of make. None of it needs mkdocs; `make docs` builds the site itself, strictly."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import bem_peft
from bem_peft_cli import main as command_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```.*?^```$|^(?: {4}|\t).*?$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def markdown() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Of the headings, as Python-Markdown makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"`|\[([^]]*)\]\([^)]*\)", r"\1", heading)
        ascii_text = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_text).strip().lower()))
    return found


# links, anchors, navigation


def broken_links(page: Path) -> list[str]:
    """Links of a page that lead nowhere, and anchors that its target does not have."""
    found = []
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", markdown(), ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# Some `heading`, twice\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md) [b](there.md#some-heading-twice) [c](gone.md) [d](there.md#gone) [e](#none)\n")
    assert broken_links(page) == ["gone.md", "there.md#gone", "#none"]


def leaves(tree: Any) -> Iterator[str]:
    for item in tree.values() if isinstance(tree, dict) else tree:
        yield from [item] if isinstance(item, str) else leaves(item)


def test_the_navigation_has_every_page_once_and_no_other() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = list(leaves(config["nav"]))
    assert len(named) == len(set(named))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    of_repository = {item for item in named if item.startswith("repository/")}
    assert set(named) - of_repository == pages
    assert all((ROOT / item.removeprefix("repository/")).is_file() for item in of_repository)
    assert config["theme"]["font"] is False


def test_the_readme_is_short_and_leads_to_every_part() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert text.count("](docs/") > 15
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    for part in config["nav"]:
        ((_, place),) = part.items()
        first = place if isinstance(place, str) else next(iter(leaves(place)))
        assert f"](docs/{first})" in text, first


# messages


def texts_of_the_code() -> list[str]:
    """All strings of the package, what a format fills in as a sign of its own."""
    found = []
    for file in [*(ROOT / "bem_peft").rglob("*.py"), *(ROOT / "bem_peft_cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return found


def messages() -> list[str]:
    row = re.compile(r"^\| (``? ?)(.+?)( ?``?)(?:,? [^|]*)? \| [^|]*\| [^|]*\|$", flags=re.MULTILINE)
    cells = row.findall(prose(DOCS / "troubleshooting.md"))
    return [text for _, text, _ in cells if not text.startswith("KeyError")]


def is_said(message: str, texts: list[str]) -> bool:
    pattern = re.compile(".*".join(re.escape(part) for part in re.split("…", message)), flags=re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_every_message_that_is_explained_is_one_of_the_code() -> None:
    texts = texts_of_the_code()
    explained = messages()
    rows = [line for line in prose(DOCS / "troubleshooting.md").splitlines() if line.startswith("| `")]
    assert len(explained) == len(rows) - 1  # but PEFT's own
    assert [message for message in explained if not is_said(message, texts)] == []
    assert not is_said("this was … said by nobody", texts)


# command lines and names


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of bem-peft that stands in a block."""
    found = []
    for page in markdown():
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"^ *(?:\$ )?bem-peft ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE):
            found.append((name(page), line.replace("\\\n", " ")))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_line_is_one_that_bem_peft_takes(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "_run", lambda arguments: 0)
    assert command_line.main(shlex.split(line, comments=True)) == 0


def test_there_are_command_lines_of_every_command() -> None:
    assert {line.split()[0] for _, line in commands()} >= {
        "sites", "budget", "match", "validate", "run", "evaluate", "profile", "compare",
    }  # fmt: skip


def test_the_reference_has_all_that_is_exported() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md")]
    named = re.findall(r"^::: bem_peft\.(\w+)$", "\n".join(pages), flags=re.MULTILINE)
    assert sorted(named) == sorted(set(bem_peft.__all__) - {"__version__"})


@pytest.mark.parametrize("script", ["option_tables", "gallery_picture"])
def test_what_is_written_by_a_script_is_what_it_writes(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    module = importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [script])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0, f"python docs/{script}.py --write"


def test_the_table_of_versions_is_that_of_the_results() -> None:
    run = runpy.run_path(str(ROOT / "tests/versions/run.py"))
    rows = tomllib.loads((ROOT / "tests/versions/rows.toml").read_text(encoding="utf-8"))["row"]
    table = run["table"](rows, json.loads(run["RESULTS"].read_text(encoding="utf-8")))
    page = (DOCS / "versions.md").read_text(encoding="utf-8")
    assert f"{run['START']}\n\n{table}\n\n{run['END']}" in page, "python tests/versions/run.py --write"


PATH = re.compile(r"`((?:bem_peft|bem_peft_cli|benchmarks|docs|examples|experiments|tests)/[\w./-]+\w)`")


@pytest.mark.parametrize("page", [p for p in markdown() if p.name != "CHANGELOG.md"], ids=name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = PATH.findall(page.read_text(encoding="utf-8"))
    of_the_guide = "pt5_rank_one"  # CONTRIBUTING.md tells how to make it
    assert [path for path in named if not (ROOT / path).exists() and of_the_guide not in path] == []


def test_every_target_of_make_that_is_named_exists() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in markdown():
        named = re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(named) <= known, page
