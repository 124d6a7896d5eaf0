"""Building the C++ operators: one call of a compiler, for some seconds; no header of torch, no tool but the compiler.

What is built is moved to its place whole, so that processes which build at once all end well.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bem_peft.kernels import cpp_library

COMPILERS = ("c++", "g++", "clang++")
NEEDS = (
    "They need a C++ compiler (CXX, g++ or clang++), the headers of Python, and a folder to write to "
    "(TORCH_EXTENSIONS_DIR); or choose BEM_PEFT_KERNELS=torch."
)


class BuildError(RuntimeError):
    """The C++ operators could not be built or loaded."""


def compiler() -> list[str]:
    """The command that compiles C++: CXX, else the first of `COMPILERS` that is there.

    Raises:
        BuildError: none of them is there, or this system is none that the operators are offered on.
    """
    unknown = cpp_library.unknown_system()
    if unknown is not None:
        raise BuildError(f"the C++ operators could not be built: {unknown}")
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = [chosen] if chosen else [[name] for name in COMPILERS]
    for command in found:
        if shutil.which(command[0]):
            return command
    names = " or ".join(command[0] for command in found)
    raise BuildError(f"the C++ operators could not be built: there is no {names}.\n{NEEDS}")


def native() -> list[str]:
    """The option that means this machine's own instructions."""
    return ["-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"]


def compile_library(to: Path, command: Sequence[str], options: Sequence[str]) -> None:
    """Compile the sources with `command` and put the library at `to`, at once.

    Raises:
        BuildError: the compiler's own error, or a folder that cannot be written.
    """
    linked = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    sources = [str(source) for source in cpp_library.sources()]
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=to.parent) as folder:
            partial = Path(folder) / to.name
            given = [*linked, *cpp_library.CFLAGS, *options, f"-I{sysconfig.get_path('include')}"]
            done = subprocess.run(
                [*command, *given, *sources, "-o", str(partial)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise BuildError(f"the C++ operators could not be built: {done.stderr.strip()}\n{NEEDS}")
            os.replace(partial, to)
    except OSError as error:
        raise BuildError(f"the C++ operators could not be built: {error}\n{NEEDS}") from error


def build_here() -> Path:
    """The library for this machine, built anew: `cpp_library.library()`, without a mark."""
    path = cpp_library.library()
    cpp_library.remove_mark()
    compile_library(path, compiler(), native())
    return path
