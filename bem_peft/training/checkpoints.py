"""Which checkpoint of a Trainer's folder is whole: a run may be killed while it writes one.

A Trainer writes `trainer_state.json` last, after the adapter, the optimizer, the scheduler and the random state. A
checkpoint whose state is there, can be read and names the folder's own step is whole; any other is what a kill left.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger("bem_peft")

STATE_FILE = "trainer_state.json"


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(state, dict) and state.get("global_step") == _step(checkpoint)


def last_complete_checkpoint(output_dir: str | Path, *, before_the_end: bool = False) -> str | None:
    """The newest whole checkpoint of a Trainer's `output_dir`, or None; what a kill cut short is named in the log.

    A Trainer that goes on from it writes the unfinished ones again when it comes to their step.

    Args:
        before_the_end: pass over that of the last step, from which transformers' Trainer takes one step more.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    found = [path for path in folder.iterdir() if path.is_dir() and _step(path) is not None]
    for path in sorted(found, key=lambda path: _step(path) or 0, reverse=True):
        if is_complete(path):
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            if before_the_end and state["global_step"] >= state.get("max_steps", state["global_step"] + 1):
                continue
            return str(path)
        logger.warning("%s was not written to its end and is passed over", path)
    return None


def _step(path: Path) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
    return None if match is None else int(match.group(1))
