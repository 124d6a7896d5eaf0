"""Which library of the C++ operators there is: one that was built here, or one that the wheel carries.

A library knows nothing of torch or of Python's version. One that was built here is made for its sources and this
machine's instructions: they stand in its folder's name, and in full in the mark beside it, which also holds the file's
sha256. `bem-peft kernels --build` builds, compares with the torch forms (`tuners.cpp_proof`) and writes the mark.

A wheel for Linux carries one for each instruction set, with a manifest of their sha256 (`LIBRARIES`); which of them
fits is asked of the processor. `auto` takes what was proved right here, else what the wheel carries, and nothing else.
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

from bem_peft._version import __version__
from bem_peft.json_text import read_json
from bem_peft.whole_file import write_whole

FOLDER = Path(__file__).with_name("csrc")
LIBRARIES = Path(__file__).with_name("libraries")
MANIFEST = "manifest.json"
CFLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
    "-Wno-psabi",  # of vectors as arguments of functions that are all inline
]  # fmt: skip
MARK = "proved.json"
COMMAND = "bem-peft kernels --build"
MODULE = "bem_peft_cpu"
# instruction set of a wheel's library -> what the processor must list; the widest first
INSTRUCTION_SETS = {
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v3": "avx2 bmi1 bmi2 f16c fma abm movbe",
    "aarch64": "asimd",
}


@dataclass(frozen=True)
class Standing:
    """What is there of a library, and whether it may be used without being asked for.

    is_refused: something is there that must not be loaded; what is wrong with it is in `why`.
    """

    path: Path
    is_proved: bool
    is_refused: bool
    why: str


def unknown_system() -> str | None:
    """Why there can be no operators on this system; None: there can."""
    if sys.platform in ("linux", "darwin"):
        return None
    return f"the C++ operators are offered on Linux, and from source on macOS, not on {platform.system()}"


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cpp"))


def sources_digest() -> str:
    """Of what a library is made of: its sources and the compiler's options."""
    digest = hashlib.sha256(" ".join(CFLAGS).encode())
    for source in sorted(FOLDER.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def identity() -> dict[str, str]:
    """What a library is made for, as its mark says it; the processor by its own list of instructions."""
    return {
        "sources": sources_digest(),
        "processor": hashlib.sha256(_instructions().encode()).hexdigest(),
        "bem_peft": __version__,
    }


def _instructions() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    flags = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return flags[0] if flags else f"{platform.machine()} {platform.processor()}"


def name() -> str:
    """The library's own: eight hexadecimal digits of the processor, and of the sources."""
    parts = identity()
    return f"bem_peft_cpu_{parts['processor'][:8]}_{parts['sources'][:8]}"


def folder() -> Path:
    """Where it is built: a folder of its own in torch's folder of extensions."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch._appdirs import user_cache_dir

        root = user_cache_dir(appname="torch_extensions")
    return Path(root) / name()


def library() -> Path:
    return folder() / f"{MODULE}.abi3.so"


def standing() -> Standing:
    """Whether there is a library that was proved right for what runs here, and if not, why not."""
    unknown = unknown_system()
    if unknown is not None:
        return Standing(LIBRARIES, False, False, unknown)
    here = _built_here()
    if here.is_proved or here.is_refused:
        return here
    carried = _carried()
    if carried.is_proved or carried.is_refused:
        return carried
    return Standing(here.path, False, False, f"{here.why}, and {carried.why}")


def _built_here() -> Standing:
    path = library()
    mark = path.with_name(MARK)
    if not path.is_file():
        return Standing(path, False, False, "they are not built for this processor")
    if not mark.is_file():
        return Standing(path, False, False, f"{path} is built, and was not proved right")
    obstacle = _obstacle(path, mark)
    return Standing(path, obstacle is None, obstacle is not None, obstacle or f"{path} was proved right")


def _carried() -> Standing:
    """The one of the wheel that fits this processor."""
    if not (LIBRARIES / MANIFEST).is_file():
        return Standing(LIBRARIES, False, False, "this installation carries none (a wheel for Linux does)")
    try:
        manifest = read_json(LIBRARIES / MANIFEST)
        held = manifest["libraries"]
        made_of = manifest["sources"]
    except (ValueError, TypeError, KeyError) as error:
        return Standing(LIBRARIES, False, True, f"the wheel's manifest is broken: {error}")
    fitting = [(instructions, held[instructions]) for instructions in fitting_sets() if instructions in held]
    if not fitting:
        needs = "; ".join(f"{one}: {INSTRUCTION_SETS.get(one)}" for one in sorted(held))
        return Standing(LIBRARIES, False, False, f"those of the wheel want instructions that are not here ({needs})")
    instructions, entry = fitting[0]
    path = LIBRARIES / f"{MODULE}.{instructions}.abi3.so"
    if made_of != sources_digest():
        return Standing(path, False, True, "the wheel's libraries are of other sources than stand beside them")
    if not path.is_file() or entry.get("sha256") != sha256(path):
        return Standing(path, False, True, f"{path} is not the file that the wheel was made with (its sha256 differs)")
    return Standing(path, True, False, f"the wheel's for {instructions}, {entry.get('proof')}: {path}")


def fitting_sets() -> list[str]:
    """The instruction sets that this processor has, the widest first."""
    flags = set(_instructions().split())
    return [
        name for name, wanted in INSTRUCTION_SETS.items() if sys.platform == "linux" and flags >= set(wanted.split())
    ]


def _obstacle(path: Path, mark: Path) -> str | None:
    """What is wrong with a library that has a mark."""
    for file in (path, mark):
        if is_of_another_user(file):
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
    if held.get("sha256") != sha256(path):
        return f"{path} is not the file that was proved right (its sha256 differs)"
    return None


def is_of_another_user(file: Path) -> bool:
    """Whether somebody else could have written it: neither this user nor the system's."""
    return os.name == "posix" and file.stat().st_uid not in (0, os.getuid())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_mark(proof: dict[str, Any]) -> None:
    """Say that the library that stands there was proved right; `proof`: what was compared, for who reads it."""
    path = library()
    held = {**identity(), "sha256": sha256(path), **proof}
    write_whole(path.with_name(MARK), json.dumps(held, indent=2) + "\n")


def remove_mark() -> None:
    """What stands there is not proved right any more."""
    library().with_name(MARK).unlink(missing_ok=True)


def load(path: Path) -> Any:
    """The module of a library. Raises ImportError where the system cannot load it."""
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
