"""Folders of tools that know no seeds: one folder a seed, `seed-0`, `seed-1`, ...; without any, one seed 0."""

from __future__ import annotations

import re
from pathlib import Path


def seed_folders(folder: Path) -> dict[int, Path]:
    """Seed -> folder. Raises ValueError where two folders name one seed, as seed-1 and seed-01."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"seed[-_ ]?(\d+)", path.name)
        if match is None or not path.is_dir():
            continue
        seed = int(match.group(1))
        if seed in found:
            raise ValueError(f"{found[seed]} and {path} are both seed {seed}: keep one.")
        found[seed] = path
    return dict(sorted(found.items())) or {0: folder}
