"""Records of a file or of a dataset of the hub, and texts made of them by templates.

.jsonl .json .csv .tsv (and .gz of these), .parquet, .arrow: the file that was named, as it is now. Cells of CSV are
text as they stand; JSON values are kept: a number is printed as the file spells it, a list or an object as JSON, true
as true. What
a template names must be there: null and a missing field are errors.

A template names columns, `{question}`, by whatever name they have, `{Question Text}`; `{{` and `}}` are braces.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bem_peft.json_text import LoadsOptions, parse, read_lines, text_of

KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow")
FILE_NAME = re.compile(rf"\.({'|'.join(KINDS)})$|\.(jsonl|json|csv|tsv)\.gz$")
PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
Record = tuple[str, Mapping[str, Any]]  # where it stands, for messages; column -> value


class Spelled(str):
    """A number as its file spells it."""

    __slots__ = ()


def is_file_name(text: str) -> bool:
    """Whether `text` names a file, not a dataset of the hub."""
    return FILE_NAME.search(text) is not None


def read_records(source: str) -> Iterator[Record]:
    """The records of a file or of a hub dataset's training split, in their order.

    Raises:
        ValueError: what is no such file, with the file and line.
        OSError: the file cannot be read.
    """
    if not is_file_name(source):
        from datasets import load_dataset

        rows = load_dataset(source, split="train")
        return ((f"{source}: row {i}", row) for i, row in enumerate(rows, 1))
    path = Path(source)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    readers = {"jsonl": _lines, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet, "arrow": _arrow}
    return readers[kind](path)


def columns_of(source: str) -> list[str]:
    """The columns of the first 1,000 records, in the order they come. Raises as `read_records`."""
    found: dict[str, None] = {}
    for _, record in itertools.islice(read_records(source), 1_000):
        found.update(dict.fromkeys(record))
    return list(found)


def missing_columns(missing: Sequence[str], columns: Sequence[str]) -> str:
    """The end of a message: "has no column 'jsno' (did you mean 'json'?); it has id, text, json"."""
    named = []
    for name in missing:
        near = difflib.get_close_matches(name, columns, n=1)
        named.append(f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name))
    return f"has no column {', '.join(named)}; it has {', '.join(columns)}"


@dataclass(frozen=True)
class Template:
    """A text with columns in it. `field`: where it stands, for messages ("data.prompt")."""

    text: str
    field: str

    def __post_init__(self) -> None:
        for piece in PIECE.finditer(self.text):
            if piece.group() in ("{", "}") or piece.group(1) == "":
                raise ValueError(
                    f"{self.field} = {self.text!r}: the {piece.group()!r} at {piece.start()} names no column; write "
                    "{column}, and {{ or }} for a brace"
                )

    @property
    def columns(self) -> list[str]:
        return [piece.group(1) for piece in PIECE.finditer(self.text) if piece.group(1)]

    def missing(self, columns: Iterable[str]) -> list[str]:
        """The columns that the template names and that are none of `columns`."""
        known = set(columns)
        return [name for name in self.columns if name not in known]

    def fill(self, where: str, record: Mapping[str, Any]) -> str:
        """The text for a record. Raises ValueError where a column is null or missing, or no text can be made of it."""
        parts = []
        for piece in PIECE.finditer(self.text):
            name = piece.group(1)
            if name is None:
                parts.append(piece.group().replace("{{", "{").replace("}}", "}"))
                continue
            if record.get(name) is None:
                what = "is null" if name in record else "is missing"
                raise ValueError(
                    f"{where}: {name!r} {what}, and {self.field} = {self.text!r} needs it; fill it, or take the "
                    "record out."
                )
            parts.append(as_text(record[name], where, name))
        return "".join(parts)


def as_text(value: Any, where: str, name: str) -> str:
    """A text as it is; anything else as JSON, numbers as they were spelled. Raises ValueError where neither can be."""
    found = value if type(value) is str else _as_json(value, where, name)
    if not found.isascii():
        try:
            found.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"{where}: {name!r} holds half of a surrogate pair, which no UTF-8 file can hold."
            ) from None
    return str(found)


def _as_json(value: Any, where: str, name: str) -> str:
    if isinstance(value, Spelled):
        return str(value)
    if isinstance(value, Mapping):
        items = (f"{json.dumps(str(key), ensure_ascii=False)}: {_as_json(v, where, name)}" for key, v in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_as_json(part, where, name) for part in value) + "]"
    if value is None or isinstance(value, str | bool | int | float):
        return json.dumps(value, ensure_ascii=False)
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    if type(value).__module__ == "decimal":
        return str(value)
    raise ValueError(f"{where}: {name!r} is {type(value).__name__}, of which no text can be made.")


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


AS_SPELLED: LoadsOptions = {
    "parse_float": Spelled, "parse_int": Spelled, "parse_constant": _refuse_constant, "object_pairs_hook": _object
}  # fmt: skip


def _lines(path: Path) -> Iterator[Record]:
    return ((f"{path}:{number}", record) for number, record in read_lines(path, AS_SPELLED))


def _json(path: Path) -> Iterator[Record]:
    """A list of objects, or JSON lines under this name."""
    text = text_of(path)
    if not text.lstrip().startswith("["):
        yield from _lines(path)
        return
    for number, record in enumerate(parse(text, path, 1, AS_SPELLED), 1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: entry {number} is no JSON object: the file must be a list of objects.")
        yield f"{path}: entry {number}", record


def _csv(path: Path) -> Iterator[Record]:
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    csv.field_size_limit(2**31 - 1)  # 131,072 by default, for all of Python
    reader = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=delimiter, strict=True)
    try:
        head = next(reader, None)
        if head is None:
            raise ValueError(f"{path}: is empty; its first line must name the columns.")
        twice = [name for name in head if head.count(name) > 1]
        if twice:
            raise ValueError(f"{path}:1: two columns are called {twice[0]!r}.")
        for row in reader:
            if not row:
                continue
            if len(row) != len(head):
                raise ValueError(f"{path}:{reader.line_num}: {len(row)} cells for {len(head)} columns.")
            yield f"{path}:{reader.line_num}", dict(zip(head, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}.") from None


def _parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet

    with path.open("rb") as file:
        try:
            yield from _rows(path, parquet.ParquetFile(file).iter_batches())
        except (ArrowException, OSError, UnicodeDecodeError) as error:  # a broken file raises a bare OSError
            raise ValueError(f"{path}: no Parquet file ({error}).") from None


def _arrow(path: Path) -> Iterator[Record]:
    """Both of Arrow's forms, the file and the stream."""
    from pyarrow import ArrowException, ipc

    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        try:
            if is_file:
                reader = ipc.open_file(file)
                yield from _rows(path, (reader.get_batch(i) for i in range(reader.num_record_batches)))
            else:
                yield from _rows(path, ipc.open_stream(file))
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no Arrow file ({error}).") from None


def _rows(path: Path, batches: Iterable[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", record
