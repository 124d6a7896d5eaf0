"""The folder of one seed while it is made: what it was begun with, and the scores as they come.

settings.json           what the seed was begun with; a seed that is taken up again must have the same
items.partial.jsonl     a line an item that was scored, in whole blocks; gone once items.jsonl is there
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bem_peft.experiments.items import Item
from bem_peft.json_text import read_json
from bem_peft.whole_file import write_whole

SETTINGS, PARTIAL = "settings.json", "items.partial.jsonl"
BLOCK = 64  # items that are scored between two writes


def fingerprint(items: Sequence[Item]) -> str:
    """Of the items' names, content and order."""
    text = "\n".join(f"{item.id!r} {item.sha256} {item.group!r}" for item in items)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder and keep `settings` in it, or check them where it was begun before.

    Raises:
        ValueError: it was begun with other settings, or by a release that kept none.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    now = json.loads(json.dumps(settings, default=str))
    if path.is_file():
        before = read_json(path)
        changed = changes(before, now)
        if changed:
            raise ValueError(
                f"{folder} was begun with other settings ({'; '.join(changed)}): go on with those, choose another "
                "folder, or remove it."
            )
    elif any((folder / "checkpoints").glob("checkpoint-*")):
        raise ValueError(
            f"{folder}/checkpoints is of a release that kept no settings: remove it, or choose another folder."
        )
    else:
        write_whole(path, json.dumps(now, indent=1, ensure_ascii=False) + "\n")


def changes(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs, as "training.learning_rate: 0.01 -> 0.02"."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [
            line for name in names for line in changes(before.get(name), now.get(name), f"{where}.{name}".strip("."))
        ]
    return [] if before == now else [f"{where}: {before!r:.60} -> {now!r:.60}"]


class PartialScores:
    """Lines of items that are scored, in the order of the items, written a block at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PARTIAL

    def read(self) -> list[dict[str, Any]]:
        """The lines of whole blocks; what a killed process left of a block is cut off."""
        if not self.path.is_file():
            return []
        whole = self.path.read_bytes()
        ends = [i for i, byte in enumerate(whole) if byte == 10]
        ends = ends[: len(ends) // BLOCK * BLOCK]
        kept = whole[: ends[-1] + 1] if ends else b""
        if len(kept) != len(whole):
            with self.path.open("r+b") as file:
                file.truncate(len(kept))
        return [json.loads(line) for line in kept.split(b"\n") if line]

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a block, and make sure that it is on the disk."""
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
