"""JSON and JSON lines as they stand in a file, with the file and line in every error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def text_of(path: Path) -> str:
    """The text of a UTF-8 file, with or without a mark at its start. Raises ValueError for another encoding."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: byte {raw[error.start]:#04x} is no UTF-8; save the file as UTF-8.") from None


def read_json(path: Path) -> Any:
    """The document of a file. Raises ValueError with the line where it is no JSON."""
    try:
        return json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no JSON ({error.msg}).") from None
    except RecursionError:
        raise ValueError(f"{path}: nests too deep for JSON to be read.") from None


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of JSON lines. Lines end with a line feed alone; other separators are part of a text.

    Raises:
        ValueError: a line that is no JSON object.
    """
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: no JSON ({error.msg}).") from None
        except RecursionError:
            raise ValueError(f"{path}:{number}: nests too deep for JSON to be read.") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}:{number}: {line[:40]!r} is no JSON object.")
        yield number, found
