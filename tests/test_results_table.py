"""Tables of results grow by rows that say when, on what and from which commit; what cannot say so is refused."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "benchmarks" / "results"
TABLES = sorted(RESULTS.glob("*.csv"))
ROW = {"variant": "PT1", "overhead": "0.05"}
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="the commit is git's")


@pytest.fixture
def results_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("results_table")


class Repository:
    """A repository of a package and a benchmark, of its own, whatever the variables say that a git hook sets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("bem_peft/kernels/film.py", "benchmarks/overhead.py", "examples/demo.py", "README.md"):
            self.write(name, "1\n")
        self.git("init", "--quiet")
        self.commit()

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit(self) -> str:
        self.git("add", "--all")
        author = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        self.git(*author, "commit", "--quiet", "--allow-empty", "-m", "x")
        return self.git("rev-parse", "--short", "HEAD")

    @property
    def table(self) -> Path:
        return self.folder / "benchmarks/results/overhead.csv"


@pytest.fixture
def repository(tmp_path: Path, results_table: Any, monkeypatch: pytest.MonkeyPatch) -> Repository:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(results_table, "ROOT", tmp_path / "repository")
    return Repository(tmp_path / "repository")


# what is written


def test_a_row_has_date_device_and_commit(repository: Repository, results_table: Any) -> None:
    results_table.append(repository.table, [ROW])
    header, row = repository.table.read_text().splitlines()
    assert header == "date,device,commit,variant,overhead"
    (found,) = results_table.read(repository.table)
    assert found == ROW | {
        "date": datetime.date.today().isoformat(),
        "device": results_table.device_name(),
        "commit": repository.git("rev-parse", "--short", "HEAD"),
    }
    assert row.endswith(f',"{found["device"]}",{found["commit"]},PT1,0.05')
    assert found["device"].endswith(f", {torch.get_num_threads()} threads, torch {torch.__version__}")


def test_rows_that_stand_are_kept_to_the_byte(repository: Repository, results_table: Any) -> None:
    results_table.append(repository.table, [ROW])
    before = repository.table.read_bytes()
    later = repository.commit()
    results_table.append(repository.table, [{"overhead": "0.04", "variant": "PT1"}, {**ROW, "variant": "a, b"}])
    after = repository.table.read_bytes()
    assert after.startswith(before)
    assert [row["commit"] for row in results_table.read(repository.table)][1:] == [later, later]
    assert [row["variant"] for row in results_table.read(repository.table)] == ["PT1", "PT1", "a, b"]
    assert [row["overhead"] for row in results_table.read(repository.table)] == ["0.05", "0.04", "0.05"]


def test_a_run_has_the_commit_that_it_started_from(repository: Repository, results_table: Any) -> None:
    """A commit or a change while it measures is not of the code that was loaded."""
    started = repository.git("rev-parse", "--short", "HEAD")
    table = results_table.ResultsTable(repository.table.parent, "overhead.csv", ROW, device="a GPU")
    repository.write("bem_peft/kernels/film.py", "2\n")
    assert repository.commit() != started
    repository.write("bem_peft/kernels/film.py", "3\n")
    table.append([ROW])
    (found,) = results_table.read(repository.table)
    assert (found["commit"], found["device"]) == (started, "a GPU")


def test_no_rows_make_no_file(repository: Repository, results_table: Any) -> None:
    results_table.append(repository.table, [])
    results_table.ResultsTable(repository.table.parent, "overhead.csv", ROW).append([])
    assert not repository.table.exists()


def test_a_benchmark_that_only_prints_asks_for_no_commit(repository: Repository, results_table: Any) -> None:
    repository.write("bem_peft/kernels/film.py", "2\n")
    parser = argparse.ArgumentParser()
    results_table.add_output(parser)
    assert parser.parse_args([]).out == RESULTS
    table = results_table.ResultsTable(parser.parse_args(["--print-only"]).out, "overhead.csv", ROW)
    table.append([ROW])
    assert not list(repository.folder.rglob("*.csv"))
    with pytest.raises(ValueError, match="lacks"):
        table.append([{}])


# what is refused


@pytest.mark.parametrize(
    ("file", "depends_on"),
    [
        ("bem_peft/kernels/film.py", ()),
        ("bem_peft/kernels/new.py", ()),  # which nobody added
        ("benchmarks/overhead.py", ()),
        ("benchmarks/new.py", ()),
        ("examples/demo.py", ("examples",)),
    ],
)
def test_uncommitted_changes_of_what_the_figures_depend_on_are_refused(
    file: str, depends_on: tuple[str, ...], repository: Repository, results_table: Any
) -> None:
    def make() -> None:
        table = results_table.ResultsTable(repository.table.parent, "overhead.csv", ROW, depends_on=depends_on)
        table.append([ROW])

    repository.write(file, "2\n")
    with pytest.raises(ValueError, match=rf"uncommitted changes in {file}: .*commit or stash"):
        make()
    assert not repository.table.exists()
    repository.git("add", file)
    with pytest.raises(ValueError, match=rf"uncommitted changes in {file}"):
        make()
    repository.commit()
    make()
    assert len(results_table.read(repository.table)) == 1


@pytest.mark.parametrize("file", ["README.md", "examples/demo.py", "benchmarks/results/other.csv", "new.py"])
def test_other_changes_are_not_refused(file: str, repository: Repository, results_table: Any) -> None:
    repository.write(file, "2\n")
    results_table.append(repository.table, [ROW])
    assert len(results_table.read(repository.table)) == 1


def test_where_there_is_no_commit_no_row_is_written(
    repository: Repository, results_table: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "overhead.csv"
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(results_table, "ROOT", outside)
    with pytest.raises(ValueError, match=r"the commit cannot be told: git says .*not a git repository.*clone"):
        results_table.append(table, [ROW])
    repository.git("init", "--quiet", str(outside))
    with pytest.raises(ValueError, match="the commit cannot be told: git says"):  # no commit yet
        results_table.append(table, [ROW])
    inner = repository.folder / "inner"  # ignored by the repository that it stands in
    repository.write(".gitignore", "inner\n")
    repository.write("inner/bem_peft/film.py", "1\n")
    monkeypatch.setattr(results_table, "ROOT", inner)
    with pytest.raises(ValueError, match="is of a repository that does not hold"):
        results_table.append(table, [ROW])
    monkeypatch.setenv("PATH", str(outside))
    with pytest.raises(ValueError, match="the commit cannot be told without git"):
        results_table.append(table, [ROW])
    assert not table.exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"variant": "PT1"}, r"lacks \['overhead'\] and has \[\]"),
        ({**ROW, "seconds": 1}, r"lacks \[\] and has \['seconds'\]"),
        ({**ROW, "commit": "0000000"}, r"has \['commit'\].*itself adds date, device, commit"),
    ],
)
def test_rows_of_other_columns_are_refused(
    row: dict[str, Any], message: str, repository: Repository, results_table: Any
) -> None:
    table = results_table.ResultsTable(repository.table.parent, "overhead.csv", ROW)
    with pytest.raises(ValueError, match=message):
        table.append([ROW, row])
    assert not repository.table.exists()
    results_table.append(repository.table, [ROW])
    before = repository.table.read_bytes()
    with pytest.raises(ValueError, match=r"has the columns variant, overhead.*start a table of another name"):
        results_table.append(repository.table, [row])
    with pytest.raises(ValueError, match=message):
        results_table.append(repository.table, [ROW, row])
    assert repository.table.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "variant,overhead\n",
        '"# CPU, 2 threads; 2026-11-23"\ndate,device,commit,variant,overhead\n',
        "device,date,commit,variant,overhead\n",
        "date,device,commit\n",
        "date,device,commit,variant,overhead,variant\n",
        "date,device,commit,variant,overhead",
        "date,device,commit,variant,overhead\n2026-11-23,CPU,abc,PT1,0.0",  # cut off
    ],
)
def test_a_file_of_another_form_is_refused(text: str, repository: Repository, results_table: Any) -> None:
    repository.write("benchmarks/results/overhead.csv", text)
    for call in (lambda: results_table.append(repository.table, [ROW]), lambda: results_table.read(repository.table)):
        with pytest.raises(ValueError, match="is no table of results: its first line must be date,device,commit and"):
            call()
    assert repository.table.read_text() == text


@pytest.mark.parametrize("row", ["2026-11-23,CPU,abc,PT1", "2026-11-23,CPU,,PT1,1", "23.11.2026,CPU,abc,PT1,1", ""])
def test_a_row_that_is_not_whole_is_not_read(row: str, repository: Repository, results_table: Any) -> None:
    repository.write("benchmarks/results/overhead.csv", f"date,device,commit,variant,overhead\n{row}\n")
    with pytest.raises(ValueError, match=r"row 2 is .*must have 5 values"):
        results_table.read(repository.table)


# readers


def test_the_newest_row_of_a_key_is_read(repository: Repository, results_table: Any) -> None:
    rows = ["2026-11-23,CPU,a,PT1,1", "2026-11-23,CPU,a,PT2,2", "2026-11-25,CPU,b,PT1,3", "2026-11-24,CPU,c,PT1,4"]
    rows += ["2026-11-23,CPU,d,PT2,5"]  # of the same day: the later one
    repository.write("benchmarks/results/overhead.csv", "\n".join(["date,device,commit,variant,overhead", *rows, ""]))
    found = results_table.newest(repository.table, ("variant",))
    assert [(row["variant"], row["overhead"]) for row in found] == [("PT1", "3"), ("PT2", "5")]
    assert results_table.sources(found) == "2026-11-25, CPU, b; 2026-11-23, CPU, d"
    assert len(results_table.newest(repository.table, ("variant", "commit"))) == 5


def test_the_overhead_table_is_of_the_newest_rows(
    tmp_path: Path, results_table: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overhead_table = importlib.import_module("overhead_table")
    text = (RESULTS / "overhead_smollm2.csv").read_text()
    names = text.partition("\n")[0].split(",")
    old = next(r for r in results_table.read(RESULTS / "overhead_smollm2.csv") if r["variant"] == "PT3 Kronecker")
    new = {**old, "date": "2999-01-01", "overhead": "0.9999", "low": "0.9", "high": "1.1", "commit": "abc1234"}
    path = tmp_path / "overhead.csv"
    path.write_text(text + ",".join(f'"{new[name]}"' for name in names) + "\n")
    printed = []
    for source in (RESULTS / "overhead_smollm2.csv", path):
        for options in ([], ["--short"]):
            monkeypatch.setattr("sys.argv", ["overhead_table.py", str(source), *options])
            overhead_table.main()
            printed.append(capsys.readouterr().out)
    for before, after in zip(printed[:2], printed[2:], strict=True):
        assert "+100.0" not in before
        assert after.count("+100.0") == 1
    assert "abc1234" in printed[2]
    assert printed[0].strip() in (RESULTS / "overhead.md").read_text(), "python benchmarks/overhead_table.py CSV"
    assert printed[1].strip() in (ROOT / "docs/speed.md").read_text(), "python benchmarks/overhead_table.py CSV --short"


def test_the_search_for_learning_rates_goes_on_by_what_stands_there(
    repository: Repository, results_table: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    pytest.importorskip("sacrebleu")
    rates = importlib.import_module("learning_rates")
    monkeypatch.setattr(rates, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda folder: None))
    monkeypatch.setattr(rates, "tokenize", lambda verses, tokenizer: [])
    ran: list[tuple[Any, ...]] = []

    def run(name: str, variant: float, groups: dict[str, float], seed: int, *_: Any) -> float:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((name, variant, groups, seed))
        return 0.5

    monkeypatch.setattr(rates, "run", run)
    arguments = ["FOLDER", "--methods", "lora", "pt3", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        rates.main(arguments)
    assert [row["method"] for row in results_table.read(tmp_path / "learning_rates.csv")] == ["lora", "pt3", "pt3"]
    first = ran.copy()
    ran.clear()
    rates.main(arguments)
    every = [(name, *given, 0) for name in ("lora", "pt3") for given in rates.RUNS[name]]
    assert sorted(first + ran, key=repr) == sorted(every, key=repr)
    ran.clear()
    rates.main(arguments)
    assert ran == []
    rates.main(["FOLDER", "--methods", "lora", "--out", str(tmp_path), "--again"])
    found = results_table.newest(tmp_path / "learning_rates.csv", rates.RUN)
    assert (len(ran), len(found), len(results_table.read(tmp_path / "learning_rates.csv"))) == (1, 5, 6)
    repository.write("examples/demo.py", "2\n")
    with pytest.raises(ValueError, match=r"uncommitted changes in examples/demo\.py"):
        rates.main(arguments)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_tables_of_this_repository_are_of_the_form(path: Path, results_table: Any) -> None:
    rows = results_table.read(path)
    assert rows
    for row in rows:
        assert datetime.date.fromisoformat(row["date"]) <= datetime.date.today()
        assert re.fullmatch(r"[0-9a-f]{7,40}", row["commit"])


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_one_file_writes_tables(path: Path) -> None:
    text = path.read_text()
    writes = re.search(r"csv\.(writer|DictWriter|reader|DictReader)|open\(\"[wa]", text) is not None
    assert writes == (path.stem == "results_table")
