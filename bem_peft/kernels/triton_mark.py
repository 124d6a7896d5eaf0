"""Whether Triton's kernels were proved right on a GPU: a mark for the device, the versions and the kernels' sources.

`bem-peft kernels --prove` compares every operator's output and gradients there with float64 (`kernels.parity`) and
writes the mark. `auto` takes the kernels on a GPU whose mark says what is here now, and on no other.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from bem_peft._version import __version__
from bem_peft.json_text import read_json
from bem_peft.kernels import cpp_library
from bem_peft.whole_file import write_whole

COMMAND = "bem-peft kernels --prove"
MARK = "proved.json"


@functools.cache
def versions() -> dict[str, str]:
    """Of what a kernel is compiled from and by. Raises ImportError where Triton is not installed."""
    import triton

    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("triton_*.py")):
        digest.update(source.read_bytes())
    return {
        "bem_peft": __version__, "kernels": digest.hexdigest(), "triton": triton.__version__,
        "torch": torch.__version__, "runtime": f"cuda {torch.version.cuda} hip {torch.version.hip}",
    }  # fmt: skip


def identity(device: torch.device) -> dict[str, str]:
    """What a mark is for."""
    found = torch.cuda.get_device_properties(device)
    architecture = getattr(found, "gcnArchName", "") or f"sm_{found.major}{found.minor}"
    return {"device": found.name, "architecture": architecture, **versions()}


def mark(device: torch.device) -> Path:
    """Where it stands: beside torch's extensions, a folder for each device and set of versions."""
    digest = hashlib.sha256(json.dumps(identity(device), sort_keys=True).encode()).hexdigest()
    return cpp_library.folder().parent / f"bem_peft_triton_{digest[:16]}" / MARK


def obstacle(device: torch.device) -> str | None:
    """Why `auto` does not take the kernels on this GPU; None: it does."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install 'bem_peft[triton]'"
    path = mark(device)
    if not path.is_file():
        return f"they were not proved right on this device with these versions ({COMMAND})"
    if cpp_library.is_of_another_user(path):
        return f"refused: {path} belongs to another user"
    try:
        held = read_json(path)
    except ValueError as error:
        return f"refused: {path} is broken: {error}"
    differing = [
        name for name, value in identity(device).items() if not isinstance(held, dict) or held.get(name) != value
    ]
    return f"refused: {path} is of another {', '.join(differing)}" if differing else None


def write_mark(device: torch.device, proof: dict[str, Any]) -> None:
    """Say that the kernels were proved right there; `proof`: what was compared, for who reads it."""
    path = mark(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**identity(device), **proof}, indent=2) + "\n")


def remove_mark(device: torch.device) -> None:
    """They are not proved right any more."""
    mark(device).unlink(missing_ok=True)
