"""A table, a score a row: system, seed, item, metric, value[, cluster, slice, higher_is_better]; CSV, TSV or Parquet.

Cells of CSV are text as they stand. A cell of `slice` names one slice, or several with a semicolon between. Where
`higher_is_better` is missing, ours have their own direction, and of any other metric more is better, which a warning
says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bem_peft.evaluation.results import OBJECTIVES, SystemResult, system_of_scores
from bem_peft.evaluation.scores import Scores

NEEDED = ("system", "seed", "item", "metric", "value")
OPTIONAL = ("cluster", "slice", "higher_is_better")
SUFFIXES = (".csv", ".tsv", ".parquet")
TRUTH = {"true": True, "1": True, "false": False, "0": False}


def is_plain_table(path: Path) -> bool:
    return path.is_file() and path.name.removesuffix(".gz").endswith(SUFFIXES)


def read_plain_table(path: Path) -> list[SystemResult]:
    """The systems of a table, in the order of their first rows.

    Raises:
        ValueError: a column that is missing, a value that is no finite number, an empty cell, a score that stands
        twice or
            is missing, or an item whose cluster or slice is not the same everywhere; with file and row.
    """
    columns = _Columns(path)
    systems = []
    for system, name in enumerate(columns.names["system"]):
        scores, notes = {}, []
        for metric, label in enumerate(columns.names["metric"]):
            rows = columns.rows_of(system, metric)
            if rows.size:
                scores[label], note = _scores(columns, rows, name, label)
                notes += note
        systems.append(system_of_scores(name, "", scores, warnings=notes))
    return systems


def _scores(columns: _Columns, rows: np.ndarray, system: str, metric: str) -> tuple[Scores, list[str]]:
    where = f"{columns.path}: {system!r}, {metric!r}"
    seeds, at_seed = np.unique(columns.seeds[rows], return_inverse=True)
    items, at_item = np.unique(columns.codes["item"][rows], return_inverse=True)
    place = at_seed * len(items) + at_item
    counts = np.bincount(place, minlength=len(seeds) * len(items))
    if counts.max() > 1:
        row = rows[np.flatnonzero(place == counts.argmax())[1]]
        raise ValueError(f"{columns.at(row)}: this score of {system!r} stands twice ({metric!r}).")
    if counts.min() == 0:
        seed, item = divmod(int(counts.argmin()), len(items))
        name = columns.names["item"][items[item]]
        raise ValueError(f"{where}: seed {seeds[seed]} has no score for item {name!r}, which another seed has.")
    values = np.empty(counts.size)
    values[place] = columns.values[rows]
    names = tuple(columns.names["item"][i] for i in items)
    clusters = slices = None
    about = {}
    for column in ("cluster", "slice"):
        if column in columns.codes:
            found = np.empty(len(items), dtype=np.int64)
            found[at_item] = columns.codes[column][rows]
            wrong = np.flatnonzero(found[at_item] != columns.codes[column][rows])
            if wrong.size:
                raise ValueError(f"{columns.at(rows[wrong[0]])}: the item has another `{column}` in another row.")
            about[column] = [columns.names[column][i] for i in found]
    clusters = tuple(about["cluster"]) if "cluster" in about else None
    slices = _slices(names, about.get("slice", []))
    better, notes = _direction(columns, rows, metric)
    return Scores(
        system, metric, values.reshape(len(seeds), len(items)), tuple(map(int, seeds)), names, better, clusters, slices
    ), notes


def _slices(items: tuple[str, ...], cells: list[str]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for item, cell in zip(items, cells, strict=False):
        for name in filter(None, map(str.strip, cell.split(";"))):
            found.setdefault(name, set()).add(item)
    return {name: frozenset(members) for name, members in found.items()}


def _direction(columns: _Columns, rows: np.ndarray, metric: str) -> tuple[bool, list[str]]:
    if "higher_is_better" in columns.codes:
        given = {
            columns.names["higher_is_better"][i].lower() for i in np.unique(columns.codes["higher_is_better"][rows])
        }
        if len(given) != 1 or not given <= set(TRUTH):
            raise ValueError(
                f"{columns.path}: `higher_is_better` of {metric!r} is {sorted(given)}: must be true or false."
            )
        return TRUTH[given.pop()], []
    if metric in OBJECTIVES:
        return OBJECTIVES[metric].higher_is_better, []
    return True, [f"{metric}: taken as better the higher it is; a column `higher_is_better` can say otherwise"]


class _Columns:
    """The table's columns as numbers: `codes` into `names`, `seeds` and `values`."""

    def __init__(self, path: Path) -> None:
        import pyarrow.compute

        self.path = path
        table = _read(path)
        missing = [name for name in NEEDED if name not in table.column_names]
        if missing:
            raise ValueError(
                f"{path}: has no column {missing}; a table of scores has {', '.join(NEEDED)}, and may have "
                f"{', '.join(OPTIONAL)}. It has {table.column_names}."
            )
        if table.num_rows == 0:
            raise ValueError(f"{path}: has no rows.")
        self.codes: dict[str, np.ndarray] = {}
        self.names: dict[str, list[str]] = {}
        for name in ("system", "item", "metric", *(o for o in OPTIONAL if o in table.column_names)):
            column = table[name]
            if not pyarrow.types.is_dictionary(column.type):
                column = pyarrow.compute.dictionary_encode(column.cast(pyarrow.string()))
            if column.null_count:
                self._null(column, name)
            coded = column.unify_dictionaries().combine_chunks()
            self.codes[name], self.names[name] = coded.indices.to_numpy(), coded.dictionary.to_pylist()
            if name in NEEDED and "" in self.names[name]:
                row = int(np.flatnonzero(self.codes[name] == self.names[name].index(""))[0])
                raise ValueError(f"{self.at(row)}: `{name}` is empty.")
        self.seeds = self._numbers(table["seed"], "seed", pyarrow.int64())
        self.values = self._numbers(table["value"], "value", pyarrow.float64())
        wrong = np.flatnonzero(~np.isfinite(self.values))
        if wrong.size:
            raise ValueError(f"{self.at(wrong[0])}: `value` is {self.values[wrong[0]]}: must be a finite number.")
        key = self.codes["system"].astype(np.int64) * len(self.names["metric"]) + self.codes["metric"]
        self._order = np.argsort(key, kind="stable")
        self._ends = np.searchsorted(
            key[self._order], np.arange(len(self.names["system"]) * len(self.names["metric"]) + 1)
        )

    def rows_of(self, system: int, metric: int) -> np.ndarray:
        at = system * len(self.names["metric"]) + metric
        found: np.ndarray = self._order[self._ends[at] : self._ends[at + 1]]
        return found

    def at(self, row: int) -> str:
        """The file and row of a message; rows count from 1, without the header."""
        return f"{self.path}: row {int(row) + 1}"

    def _null(self, column: Any, name: str) -> None:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise ValueError(f"{self.at(row)}: `{name}` is empty.")

    def _numbers(self, column: Any, name: str, kind: Any) -> np.ndarray:
        import pyarrow

        if column.null_count:
            self._null(column, name)
        try:
            found: np.ndarray = column.cast(kind).to_numpy()
        except pyarrow.ArrowInvalid:
            row, cell = next((i, v) for i, v in enumerate(column.to_pylist()) if not _is(v, kind))
            what = "a whole number" if name == "seed" else "a number"
            raise ValueError(f"{self.at(row)}: `{name}` is {cell!r}: must be {what}.") from None
        return found


def _is(value: Any, kind: Any) -> bool:
    import pyarrow

    try:
        pyarrow.array([value]).cast(kind)
    except pyarrow.ArrowInvalid:
        return False
    return True


def _read(path: Path) -> Any:
    import pyarrow
    from pyarrow import csv, parquet

    try:
        if path.name.endswith(".parquet"):
            schema = parquet.read_schema(path)
            texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
            return parquet.ParquetFile(path, read_dictionary=texts).read()  # a name that stands often is held once
        separator = "\t" if ".tsv" in path.suffixes else ","
        with pyarrow.input_stream(path) as stream:
            head = csv.open_csv(
                stream, parse_options=csv.ParseOptions(delimiter=separator, newlines_in_values=True)
            ).schema.names
        text = csv.ConvertOptions(column_types=dict.fromkeys(head, pyarrow.string()), strings_can_be_null=False)
        with pyarrow.input_stream(path) as stream:
            found = csv.read_csv(
                stream, parse_options=csv.ParseOptions(delimiter=separator, newlines_in_values=True),
                convert_options=text,
            )  # fmt: skip
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error}).") from None
    twice = sorted({name for name in found.column_names if found.column_names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}.")
    return found
