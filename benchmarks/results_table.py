"""Results as tables that only grow: each row says when, on what and from which commit it was measured.

    date,device,commit,<the table's own columns>

A newer measurement of the same thing is a newer row; rows that stand are never written again, and `newest` is what the
other tables and the plots read. A `ResultsTable` is made before anything is measured, so that what could not be written
is refused then; its date and commit are of that moment, when the code was loaded. Rows of before 2026-11-27 carry the
commit that added them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAMP = ("date", "device", "commit")
CODE = ("bem_peft", ":(glob)benchmarks/*.py")  # what every figure depends on, as git's pathspecs


class ResultsTable:
    """What one run adds to a table.

    Args:
        folder: where the table stands; None: the run prints alone, and `append` writes nothing.
        name: of the file, "overhead.csv".
        columns: the table's own ones.
        device: what was measured on; None: `device_name()`.
        depends_on: what the figures depend on beside the package and the benchmarks, as git's pathspecs.

    Raises:
        ValueError: the commit cannot be told, what the figures depend on differs from it, or the file that is there has
            other columns or is no such table.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        columns: Iterable[str],
        *,
        device: str | None = None,
        depends_on: Sequence[str] = (),
    ) -> None:
        self.path, self.columns = None if folder is None else folder / name, tuple(columns)
        if self.path is None:
            return
        if self.path.exists():
            found = own_columns(self.path)
            if set(found) != set(self.columns):
                raise ValueError(
                    f"{self.path} has the columns {', '.join(found)}, and the rows would have "
                    f"{', '.join(self.columns)}: rows that stand are not written again, so start a table of another "
                    "name."
                )
            self.columns = found
        commit = clean_commit((*CODE, *depends_on))
        self.stamp = (datetime.date.today().isoformat(), device_name() if device is None else device, commit)

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add rows, column -> value.

        Raises:
            ValueError: a row lacks a column of the table, or has one that the table lacks. No row is written then.
        """
        given = list(rows)
        for row in given:
            lacking = [name for name in self.columns if name not in row]
            unknown = [name for name in row if name not in self.columns]
            if lacking or unknown:
                raise ValueError(
                    f"the row {dict(row)} lacks {lacking} and has {unknown}, which the table does not: give it "
                    f"{', '.join(self.columns)}, '' where there is no value. The table itself adds {', '.join(STAMP)}."
                )
        if self.path is None or not given:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer.writerow((*STAMP, *self.columns))
        writer.writerows([*self.stamp, *(row[name] for name in self.columns)] for row in given)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows that have just been measured to the table at `path`. Raises ValueError as `ResultsTable` does."""
    if rows:
        ResultsTable(path.parent, path.name, rows[0]).append(rows)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options of where a benchmark writes."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables that rows are added to")
    parser.add_argument(
        "--print-only", dest="out", action="store_const", const=None, help="write nothing: for code not committed"
    )


# who measured


def clean_commit(paths: Sequence[str]) -> str:
    """The short hash of HEAD. Raises ValueError where there is none, or `paths` differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    if not _git("ls-files", "--", *CODE):
        raise ValueError(f"the commit cannot be told: {commit} is of a repository that does not hold {ROOT}.")
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", *paths)
    if changed:
        files = ", ".join(line[3:] for line in changed.splitlines())
        raise ValueError(
            f"uncommitted changes in {files}: a row names the commit that it was measured from, so commit or stash "
            "them first. A benchmark called with --print-only writes no row."
        )
    return commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise ValueError(f"the commit cannot be told without git: {error}. Install it.") from error
    if done.returncode:
        raise ValueError(
            f"the commit cannot be told: git says {done.stderr.strip()!r} in {ROOT}. Measure in a clone of the "
            "repository, or with --print-only."
        )
    return done.stdout.rstrip()


def device_name(device: str = "cpu") -> str:
    """The processor and its threads, or the accelerator; and torch's version."""
    import torch  # not to read a table

    from bem_peft.experiments.provenance import hardware

    if device == "cpu":
        name = f"{hardware()['processor']}, {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"


# readers


def own_columns(path: Path) -> tuple[str, ...]:
    """The columns after date, device and commit. Raises ValueError where the file is no table of results."""
    text = path.read_text(encoding="utf-8")
    header = next(csv.reader(text.splitlines()[:1]), [])
    own = tuple(header[len(STAMP) :])
    if tuple(header[: len(STAMP)]) != STAMP or not own or len(set(header)) != len(header) or not text.endswith("\n"):
        raise ValueError(
            f"{path} is no table of results: its first line must be {','.join(STAMP)} and further columns, each once, "
            "and its last one must end. Mend it, or write to another folder (--out)."
        )
    return own


def read(path: Path) -> list[dict[str, str]]:
    """All rows. Raises ValueError where the file is no table of results, or a row is not whole."""
    width = len(STAMP) + len(own_columns(path))
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    for number, row in enumerate(rows, start=2):
        if len(row) != width or not re.fullmatch(r"\d{4}-\d\d-\d\d", row[0]) or not all(row[: len(STAMP)]):
            raise ValueError(
                f"{path}: row {number} is {row}: it must have {width} values, a date (YYYY-MM-DD), a device and a "
                "commit first. Take the file from git again."
            )
    return [dict(zip(header, row, strict=True)) for row in rows]


def newest(path: Path, key: Sequence[str]) -> list[dict[str, str]]:
    """The newest row for each value of the columns `key`, in the order in which these first stand in the table."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in read(path):
        place = tuple(row[name] for name in key)
        if place not in found or row["date"] >= found[place]["date"]:
            found[place] = row
    return list(found.values())


def sources(rows: Iterable[Mapping[str, str]]) -> str:
    """Dates, devices and commits of the rows, each once: what a table or a plot of them says of itself."""
    return "; ".join(dict.fromkeys(", ".join(row[name] for name in STAMP) for row in rows))
