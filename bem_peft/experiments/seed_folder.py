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

RESULT, SETTINGS, PARTIAL = "result.json", "settings.json", "items.partial.jsonl"
SECTIONS = ("model", "adapter", "data", "evaluation", "training", "budget")  # which a seed that goes on must share
# fields of `training` that change what is shown or kept or how fast it goes, and nothing of the adapter
WITHOUT_EFFECT = (
    "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step",
    "logging_strategy", "logging_steps", "logging_nan_inf_filter", "report_to", "run_name", "project",
    "trackio_space_id", "include_num_input_tokens_seen", "skip_memory_metrics", "save_total_limit", "push_to_hub",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "torch_empty_cache_steps",
)  # fmt: skip
BLOCK = 64  # items that are scored between two writes


def fingerprint(items: Sequence[Item]) -> str:
    """Of the items' names, content and order."""
    text = "\n".join(f"{item.id!r} {item.sha256} {item.group!r}" for item in items)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def significant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON has them, without what changes nothing of a result."""
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    if isinstance(found.get("training"), dict):
        found["training"] = {k: v for k, v in found["training"].items() if k not in WITHOUT_EFFECT} or None
    return found


def check_finished(folder: Path, result: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a seed that has its result was made with other settings or other data."""
    path, now = folder / SETTINGS, significant(settings)
    if path.is_file():
        changed = changes(significant(read_json(path)), now)
    else:  # of a release that kept none: what it was trained on is unknown
        document = significant(result["provenance"]["settings"])
        before = {name: document.get(name) for name in SECTIONS}
        changed = changes(before, {name: now.get(name) for name in SECTIONS})
    if changed:
        raise ValueError(
            f"{folder / 'result.json'} was made with other settings ({'; '.join(changed)}): choose another "
            "`output_dir`, or remove it."
        )


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder and keep `settings` in it, or check them where it was begun before.

    Raises:
        ValueError: it was begun with other settings, or by a release that kept none.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    now = significant(settings)
    if path.is_file():
        changed = changes(significant(read_json(path)), now)
        if changed and [entry.name for entry in folder.iterdir()] == [SETTINGS]:  # it ended before its first step
            write_whole(path, json.dumps(now, indent=1, ensure_ascii=False) + "\n")
        elif changed:
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
