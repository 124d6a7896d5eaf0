"""Train, Slice-A and Slice-B by content: what belongs together (`group`) lies in one of them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Sizes:
    """Items of each slice, at most."""

    train: int
    a: int
    b: int


def assign_slices(items: Sequence[dict[str, Any]], sizes: Sizes) -> list[dict[str, Any]]:
    """The items with their `slice` ("train", "A" or "B"), in an order by the hash of their group, which neither the
    order of the source nor a library's random numbers change. Slice-B is filled first, so that a larger training set
    leaves it as it is.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        groups[item["group"]].append(item)
    order = sorted(groups, key=_hash)
    found: list[dict[str, Any]] = []
    wanted = iter((("B", sizes.b), ("A", sizes.a), ("train", sizes.train)))
    name, left = next(wanted)
    for group in order:
        if left <= 0:
            following = next(wanted, None)
            if following is None:
                break
            name, left = following
        for item in groups[group][:left]:
            found.append({"slice": name, **item})
            left -= 1
    return found


def spread_slice(items: Sequence[dict[str, Any]], taken: Set[str], size: int, of_a_group: int) -> list[dict[str, Any]]:
    """`size` items of groups that are not `taken`, at most `of_a_group` of each, in an order by hash."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in sorted(items, key=lambda item: _hash(item["id"])):
        if item["group"] not in taken and len(groups[item["group"]]) < of_a_group:
            groups[item["group"]].append(item)
    return [item for group in sorted(groups, key=_hash) for item in groups[group]][:size]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_items(name: str, items: Sequence[dict[str, Any]]) -> None:
    """data/NAME.jsonl.gz."""
    write_lines(DATA / f"{name}.jsonl.gz", items)
    print(name, dict(Counter(item["slice"] for item in items)), *items[:3], sep="\n")


def write_lines(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    """A line of JSON a document, packed; the same bytes for the same documents, whole or not at all."""
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    part = path.with_suffix(".part")
    with part.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(lines.encode())
    part.replace(path)


def read_items(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
