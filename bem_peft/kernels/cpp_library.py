"""Where the library of the C++ operators stands, and the mark beside it that says that it was proved right here.

A library is made for one source, torch, Python and instruction set: they stand in its folder's name, and in full in the
mark, which also holds the file's sha256. `bem-peft kernels --build` builds, compares with the torch forms
(`tuners.cpp_proof`) and writes the mark. `auto` takes a library with a valid mark, and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bem_peft._version import __version__
from bem_peft.json_text import read_json
from bem_peft.whole_file import write_whole

FOLDER = Path(__file__).with_name("csrc")
CFLAGS = [
    "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-DAT_PER_OPERATOR_HEADERS",  # torch's headers without all of its operators, which take as long as the rest
]  # fmt: skip
MARK = "proved.json"
COMMAND = "bem-peft kernels --build"


@dataclass(frozen=True)
class Standing:
    """What is there of a library, and whether it may be used without being asked for.

    is_refused: something is there that must not be loaded; what is wrong with it is in `why`.
    """

    path: Path
    is_proved: bool
    is_refused: bool
    why: str


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cpp"))


def identity() -> dict[str, str]:
    """What a library is made for, as its mark says it; the processor by its own list of instructions."""
    digest = hashlib.sha256(" ".join(CFLAGS).encode())
    for source in sorted(FOLDER.iterdir()):
        digest.update(source.read_bytes())
    return {
        "sources": digest.hexdigest(),
        "torch": torch.__version__,
        "python": f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}",
        "processor": hashlib.sha256(_instructions().encode()).hexdigest(),
        "bem_peft": __version__,
    }


def _instructions() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    flags = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return flags[0] if flags else f"{platform.machine()} {platform.processor()}"


def name() -> str:
    """The library's own: eight hexadecimal digits of the processor, and of sources, torch and Python."""
    parts = identity()
    key = hashlib.sha256("\n".join(parts[part] for part in ("sources", "torch", "python")).encode())
    return f"bem_peft_cpu_{parts['processor'][:8]}_{key.hexdigest()[:8]}"


def folder() -> Path:
    """Where it is built: a folder of its own in torch's folder of extensions."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch._appdirs import user_cache_dir

        root = user_cache_dir(appname="torch_extensions")
    return Path(root) / name()


def library() -> Path:
    return folder() / f"{name()}{'.pyd' if os.name == 'nt' else '.so'}"


def standing() -> Standing:
    """Whether there is a library that was proved right for what runs here, and if not, why not."""
    path = library()
    mark = path.with_name(MARK)
    if not path.is_file():
        return Standing(path, False, False, "they are not built for this torch, Python and processor")
    if not mark.is_file():
        return Standing(path, False, False, f"{path} is built, and was not proved right")
    obstacle = _obstacle(path, mark)
    return Standing(path, obstacle is None, obstacle is not None, obstacle or f"{path} was proved right")


def _obstacle(path: Path, mark: Path) -> str | None:
    """What is wrong with a library that has a mark."""
    for file in (path, mark):
        if os.name == "posix" and file.stat().st_uid not in (0, os.getuid()):
            return f"{file} belongs to another user"
    try:
        held = read_json(mark)
    except ValueError as error:
        return f"its mark is broken: {error}"
    if not isinstance(held, dict):
        return f"its mark is broken: {mark} holds no object"
    for part, value in identity().items():
        if held.get(part) != value:
            return f"{mark} says {part} = {held.get(part)!r}, here it is {value!r}"
    if held.get("sha256") != _sha256(path):
        return f"{path} is not the file that was proved right (its sha256 differs)"
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_mark(proof: dict[str, Any]) -> None:
    """Say that the library that stands there was proved right; `proof`: what was compared, for who reads it."""
    path = library()
    held = {**identity(), "sha256": _sha256(path), **proof}
    write_whole(path.with_name(MARK), json.dumps(held, indent=2) + "\n")


def remove_mark() -> None:
    """What stands there is not proved right any more."""
    library().with_name(MARK).unlink(missing_ok=True)


def load() -> Any:
    """The library's module, without a compiler. Raises ImportError where the system cannot load it."""
    path = library()
    loader = importlib.machinery.ExtensionFileLoader(name(), str(path))
    spec = importlib.util.spec_from_file_location(name(), path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
