"""A text file that is there whole or not at all, and a folder that can be written before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path` first, then put it in its place at once."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode("utf-8"))  # lines end as the text has them, on every system
    os.replace(partial, path)


def prove_writable(folder: Path) -> None:
    """Make the folder, and write a file in it and remove it again. Raises OSError where it cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".bem_peft-{os.getpid()}"
    probe.touch()
    probe.unlink()
