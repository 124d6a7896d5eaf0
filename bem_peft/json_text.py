"""JSON and JSON lines as they stand in a file, with the file and line in every error.

Lines end with a line feed alone; other separators (U+2028, U+0085) are part of a text.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LoadsOptions = dict[str, Any]  # of json.loads


def raw_of(path: Path) -> bytes:
    """The bytes of a file, unpacked where it ends in .gz. Raises ValueError for a broken one."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: no whole gzip file ({error}).") from None


def text_of(path: Path) -> str:
    """The text of a UTF-8 file, with or without a mark at its start. Raises ValueError for another encoding."""
    raw = raw_of(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: byte {raw[error.start]:#04x} is no UTF-8; save the file as UTF-8.") from None


def parse(text: str, path: Path, line: int, options: LoadsOptions | None = None) -> Any:
    """The document of `text`, which starts at `line` of `path`. Raises ValueError with the line where it is none."""
    try:
        return json.loads(text, **(options or {}))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{line + error.lineno - 1}: no JSON ({error.msg}).") from None
    except RecursionError:
        raise ValueError(f"{path}:{line}: nests too deep for JSON to be read.") from None
    except ValueError as error:
        raise ValueError(f"{path}:{line}: {error}.") from None


def read_json(path: Path) -> Any:
    """The document of a file. Raises ValueError with the line where it is no JSON."""
    return parse(text_of(path), path, 1)


def read_lines(path: Path, options: LoadsOptions | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of JSON lines. Raises ValueError for a line that is no JSON object."""
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        found = parse(line, path, number, options)
        if not isinstance(found, dict):
            raise ValueError(f"{path}:{number}: {line[:40]!r} is no JSON object.")
        yield number, found
