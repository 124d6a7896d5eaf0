"""A table, a score a row: system, seed, item, metric, value[, cluster, slice, higher_is_better]; CSV, TSV or Parquet.

Cells of CSV are text as they stand. A cell of `slice` names one slice, or several with a semicolon between. Where
`higher_is_better` is missing, ours have their own direction, and of any other metric more is better, which a warning
says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bem_peft.evaluation.results import OBJECTIVES, SystemResult, system_of_scores
from bem_peft.evaluation.scores import Scores

NEEDED = ("system", "seed", "item", "metric", "value")
OPTIONAL = ("cluster", "slice", "higher_is_better")
SUFFIXES = (".csv", ".tsv", ".parquet")
ROWS_AT_ONCE = 2**18
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
    try:
        columns = _Columns(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as a table, it is no UTF-8 ({error}).") from None
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
    about = {}
    for column in ("cluster", "slice"):
        if column in columns.codes:
            found = np.empty(len(items), dtype=np.int64)
            found[at_item] = columns.codes[column][rows]
            wrong = np.flatnonzero(found[at_item] != columns.codes[column][rows])
            if wrong.size:
                raise ValueError(f"{columns.at(rows[wrong[0]])}: the item has another `{column}` in another row.")
            about[column] = found
    names, clusters, slices = columns.items(items, about.get("cluster"), about.get("slice"))
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
    """The table's columns as numbers: `codes` into `names`, `seeds` and `values`.

    Read a batch at a time, so that a name is held once however often it stands.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path = path
        self._coders: dict[str, _Coder] = {}
        self._items: dict[Any, Any] = {}
        parts: dict[str, list[np.ndarray]] = {"seed": [], "value": []}
        start = 0
        for batch in _batches(path):
            if not self._coders:
                self._check_names(batch.schema.names)
                self._coders = {n: _Coder() for n in (*NEEDED, *OPTIONAL) if n in batch.schema.names and n not in parts}
            for name, coder in self._coders.items():
                self._check_filled(batch.column(name), name, start)
                coder.add(batch.column(name))
                if name in NEEDED and coder.place_of("") is not None:
                    row = start + int(np.flatnonzero(coder.parts[-1] == coder.place_of(""))[0])
                    raise ValueError(f"{self.at(row)}: `{name}` is empty.")
            for name in parts:
                self._check_filled(batch.column(name), name, start)
                parts[name].append(self._numbers(batch.column(name), name, start))
            start += batch.num_rows
            del batch
        if start == 0:
            raise ValueError(f"{path}: has no rows.")
        pyarrow.default_memory_pool().release_unused()
        self.codes = {name: _joined(coder.parts) for name, coder in self._coders.items()}
        self.names = {name: coder.names for name, coder in self._coders.items()}
        self.seeds, self.values = _joined(parts["seed"]), _joined(parts["value"])
        wrong = np.flatnonzero(~np.isfinite(self.values))
        if wrong.size:
            raise ValueError(f"{self.at(wrong[0])}: `value` is {self.values[wrong[0]]}: must be a finite number.")
        key = self.codes["system"] * np.int32(len(self.names["metric"])) + self.codes["metric"]
        self._order = np.argsort(key, kind="stable").astype(np.int32 if start < 2**31 else np.int64)
        counts = np.bincount(key, minlength=len(self.names["system"]) * len(self.names["metric"]))
        self._ends = np.concatenate([[0], np.cumsum(counts)])

    def rows_of(self, system: int, metric: int) -> np.ndarray:
        at = system * len(self.names["metric"]) + metric
        found: np.ndarray = self._order[self._ends[at] : self._ends[at + 1]]
        return found

    def items(
        self, items: np.ndarray, clusters: np.ndarray | None, slices: np.ndarray | None
    ) -> tuple[tuple[str, ...], tuple[str, ...] | None, dict[str, frozenset[str]]]:
        """(names, clusters, slices) of items, from codes (N,); the same objects where they are the same again."""
        key = tuple(None if codes is None else codes.tobytes() for codes in (items, clusters, slices))
        if key not in self._items:
            names = tuple(self.names["item"][i] for i in items)
            cells = [] if slices is None else [self.names["slice"][i] for i in slices]
            own = None if clusters is None else tuple(self.names["cluster"][i] for i in clusters)
            self._items[key] = names, own, _slices(names, cells)
        return self._items[key]

    def at(self, row: int) -> str:
        """The file and row of a message; rows count from 1, without the header."""
        return f"{self.path}: row {int(row) + 1}"

    def _check_names(self, names: list[str]) -> None:
        missing = [name for name in NEEDED if name not in names]
        if missing:
            raise ValueError(
                f"{self.path}: has no column {missing}; a table of scores has {', '.join(NEEDED)}, and may have "
                f"{', '.join(OPTIONAL)}. It has {names}."
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.path}: two columns are called {twice[0]!r}.")

    def _check_filled(self, column: Any, name: str, start: int) -> None:
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"{self.at(start + row)}: `{name}` is empty.")

    def _numbers(self, column: Any, name: str, start: int) -> np.ndarray:
        import pyarrow

        kind = pyarrow.int64() if name == "seed" else pyarrow.float64()
        try:
            found = np.array(column.cast(kind).to_numpy())  # a copy, so that the batch can be let go
        except pyarrow.ArrowInvalid:
            row, cell = next((i, v) for i, v in enumerate(column.to_pylist()) if not _is(v, kind))
            what = "a whole number" if name == "seed" else "a number"
            raise ValueError(f"{self.at(start + row)}: `{name}` is {cell!r}: must be {what}.") from None
        return found


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """One array of many, which are let go."""
    found = np.concatenate(parts)
    parts.clear()
    return found


class _Coder:
    """Texts as places in the list of those that came before; `parts`: the places, a batch each."""

    def __init__(self) -> None:
        import pyarrow

        self.parts: list[np.ndarray] = []
        self._known = pyarrow.array([], pyarrow.string())

    def add(self, column: Any) -> None:
        import pyarrow
        from pyarrow import compute

        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        coded = column.cast(pyarrow.string()).dictionary_encode()
        places = compute.index_in(coded.dictionary, value_set=self._known)
        if places.null_count:
            new = coded.dictionary.filter(places.is_null())
            self._known = pyarrow.concat_arrays([self._known, new])
            places = compute.index_in(coded.dictionary, value_set=self._known)
        self.parts.append(places.to_numpy()[coded.indices.to_numpy()].astype(np.int32, copy=False))

    def place_of(self, text: str) -> int | None:
        found = int(self._known.index(text).as_py())
        return None if found < 0 else found

    @property
    def names(self) -> list[str]:
        found: list[str] = self._known.to_pylist()
        return found


def _is(value: Any, kind: Any) -> bool:
    import pyarrow

    try:
        pyarrow.array([value]).cast(kind)
    except pyarrow.ArrowInvalid:
        return False
    return True


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import csv, parquet

    try:
        if path.name.endswith(".parquet"):
            yield from parquet.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE)
            return
        parsing = csv.ParseOptions(delimiter="\t" if ".tsv" in path.suffixes else ",", newlines_in_values=True)
        with pyarrow.input_stream(path) as stream:
            head = csv.open_csv(stream, parse_options=parsing).schema.names
        text = csv.ConvertOptions(column_types=dict.fromkeys(head, pyarrow.string()), strings_can_be_null=False)
        with pyarrow.input_stream(path) as stream:
            yield from csv.open_csv(stream, parse_options=parsing, convert_options=text)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error}).") from None
