"""Plain tables against what pandas-free writers put there: the csv module and pyarrow."""

from __future__ import annotations

import csv
import gzip
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from bem_peft.evaluation.formats.read import read_results
from bem_peft_cli.main import main

HEAD = ["system", "seed", "item", "metric", "value", "cluster", "slice"]
NAMES = ["007", "3.50", "NA", 'a "quoted", one', "two\nlines", "naïve \u2028 東京", "null", "1e3"]


def rows(systems: int = 2, seeds: int = 3) -> list[list[Any]]:
    rng = np.random.default_rng(0)
    return [
        [f"system {s}", seed, name, metric, round(float(rng.normal()), 6), f"c{i // 2}", "x; y" if i < 3 else ""]
        for s in range(systems) for seed in range(seeds) for metric in ("nll", "taste") for i, name in enumerate(NAMES)
    ]  # fmt: skip


def write(path: Path, table: list[list[Any]], head: list[str] = HEAD) -> Path:
    if path.name.endswith(".parquet"):
        columns = {name: [row[i] for row in table] for i, name in enumerate(head)}
        parquet.write_table(pyarrow.table(columns), path)
        return path
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t" if ".tsv" in path.name else ",").writerows([head, *table])
    raw = text.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.parquet"])
def test_every_cell_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    given = rows()
    np.random.default_rng(1).shuffle(given)
    systems = read_results([write(tmp_path / name, given)])
    assert {s.name for s in systems} == {"system 0", "system 1"}
    for system in systems:
        assert set(system.scores) == {"nll", "taste"}
        assert (system.scores["nll"].higher_is_better, system.scores["taste"].higher_is_better) == (False, True)
        assert any("taste: taken as better the higher" in text for text in system.warnings)
        for scores in system.scores.values():
            assert set(scores.items) == set(NAMES)
            assert scores.slices == {"x": frozenset(NAMES[:3]), "y": frozenset(NAMES[:3])}
            found = {
                (system.name, seed, item, scores.metric): (scores.values[k, i], scores.clusters[i])
                for k, seed in enumerate(scores.seeds) for i, item in enumerate(scores.items)
            }  # fmt: skip
            expected = {tuple(r[:4]): (r[4], r[5]) for r in given if r[0] == system.name and r[3] == scores.metric}
            assert found == expected


def test_a_column_can_say_which_direction_is_better(tmp_path: Path) -> None:
    given = [[*row, row[3] == "nll"] for row in rows()]
    path = write(tmp_path / "t.csv", given, [*HEAD, "higher_is_better"])
    scores = read_results([path])[0].scores
    assert (scores["nll"].higher_is_better, scores["taste"].higher_is_better) == (True, False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t[5].__setitem__(4, "1,5"), "row 6: `value` is '1,5': must be a number"),
        (lambda t: t[5].__setitem__(4, "nan"), "row 6: `value` is nan: must be a finite number"),
        (lambda t: t[5].__setitem__(4, ""), "row 6: `value` is '': must be a number"),
        (lambda t: t[5].__setitem__(1, "1.5"), "row 6: `seed` is '1.5': must be a whole number"),
        (lambda t: t[5].__setitem__(2, ""), "row 6: `item` is empty"),
        (lambda t: t.append(list(t[0])), f"row {len(rows()) + 1}: this score of 'system 0' stands twice"),
        (lambda t: t.pop(9), "seed 0 has no score for item '3.50', which another seed has"),
        (lambda t: t[20].__setitem__(5, "other"), "the item has another `cluster` in another row"),
        (lambda t: t[20].append("more"), "cannot be read as a table"),
        (lambda t: t.clear(), "has no rows"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(change: Any, text: str, tmp_path: Path) -> None:
    given = rows()
    change(given)
    with pytest.raises(ValueError, match=re.escape(text)) as raised:
        read_results([write(tmp_path / "t.csv", given)])
    assert str(tmp_path / "t.csv") in str(raised.value)


def test_a_column_that_is_missing_or_stands_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("has no column ['metric']")):
        read_results([write(tmp_path / "a.csv", rows(), [*HEAD[:3], "Metric", *HEAD[4:]])])
    with pytest.raises(ValueError, match="two columns are called 'seed'"):
        read_results([write(tmp_path / "b.csv", rows(), [*HEAD[:5], "seed", "slice"])])


def test_a_table_is_compared_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    table = [
        [name, seed, f"i{i}", "my|score", float(rng.normal(shift, 0.1))]
        for name, shift in (("<b>mine</b>", 0.5), ("base", 0.0)) for seed in range(4) for i in range(60)
    ]  # fmt: skip
    path = write(tmp_path / "t.csv", table, HEAD[:5])
    out = tmp_path / "out"
    assert main(["compare", str(path), "--anchor", "base", "--held-out", "--out", str(out)]) == 0
    assert "<b>mine</b>: NO VERDICT; the budget was not measured" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert "| &lt;b&gt;mine&lt;/b&gt; | my\\|score | all | +0.5" in text
    assert "<b>" not in text
    assert "<b>" not in (out / "report.html").read_text()


def test_a_head_that_is_no_utf8_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"s\xecystem,seed,item,metric,value\na,0,i,nll,1\n")
    with pytest.raises(ValueError, match=r"t\.csv: .*no UTF-8"):
        read_results([tmp_path / "t.csv"])
