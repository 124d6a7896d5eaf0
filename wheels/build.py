"""The wheels of dist/: the pure one, and a wheel for each platform with the C++ operators of its instruction sets.

python wheels/build.py dist/NAME-py3-none-any.whl

Compiled by ziglang, which has a compiler, headers and libraries for every platform in one package: clang, its own
libc++, linked statically, and a glibc of 2014. A library that this machine can run is proved right
(`bem_peft.tuners.cpp_proof`) before it is packed; of one that it cannot, the manifest says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bem_peft.kernels import cpp_build, cpp_library
from bem_peft.tuners.cpp_proof import proof

PYTHON = "cp311-abi3"
ZIG = [sys.executable, "-m", "ziglang", "c++"]
ZIG_OPTIONS = ["-s", "-fno-sanitize=all", "-Wl,--gc-sections", "-ffunction-sections", "-fdata-sections"]
# platform -> instruction set -> the compiler's options
PLATFORMS = {
    "manylinux_2_17_x86_64": {
        "x86-64-v3": ["-target", "x86_64-linux-gnu.2.17", "-mcpu=x86_64_v3"],
        "x86-64-v4": ["-target", "x86_64-linux-gnu.2.17", "-mcpu=x86_64_v4", "-mprefer-vector-width=512"],
    },
    "manylinux_2_17_aarch64": {"aarch64": ["-target", "aarch64-linux-gnu.2.17"]},
}


@dataclass(frozen=True)
class Library:
    """One of a wheel: the file, and what was proved of it."""

    path: Path
    proof: str


def compiled(instructions: str, options: list[str], folder: Path) -> Library:
    """A library for an instruction set, proved right where this machine has it.

    Raises:
        BuildError: it does not compile, or is not right.
    """
    path = folder / f"{cpp_library.MODULE}.{instructions}.abi3.so"
    cpp_build.compile_library(path, ZIG, [*ZIG_OPTIONS, *options])
    if instructions not in cpp_library.fitting_sets():
        print(f"{path.name}: compiled, and not run: this processor is another")
        return Library(path, "compiled, and not run where it was made")
    found = proof(path)
    if found.broken:
        raise cpp_build.BuildError(f"{path.name} is not right: {'; '.join(found.broken)}")
    print(f"{path.name}: {found.compared} outputs and gradients compared with float64")
    return Library(path, f"{found.compared} outputs and gradients compared with float64 where it was made")


def platform_wheel(pure: Path, platform: str, libraries: dict[str, Library], out: Path) -> Path:
    """The pure wheel with `libraries` (by instruction set) and their manifest, as a wheel for `platform` in `out`."""
    before = set(out.glob("*.whl"))
    with tempfile.TemporaryDirectory() as name:
        run = [sys.executable, "-m", "wheel"]
        subprocess.run([*run, "unpack", "--dest", name, str(pure)], check=True, stdout=subprocess.DEVNULL)
        (folder,) = Path(name).iterdir()
        held = folder / cpp_library.LIBRARIES.relative_to(cpp_library.LIBRARIES.parents[2])
        held.mkdir()
        entries = {}
        for instructions, library in sorted(libraries.items()):
            to = held / f"{cpp_library.MODULE}.{instructions}.abi3.so"
            to.write_bytes(library.path.read_bytes())
            entries[instructions] = {"sha256": cpp_library.sha256(to), "proof": library.proof}
        manifest = {"sources": cpp_library.sources_digest(), "libraries": entries}
        (held / cpp_library.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (tags,) = folder.glob("*.dist-info/WHEEL")
        text = tags.read_text(encoding="utf-8")
        for old, new in (("Root-Is-Purelib: true", "Root-Is-Purelib: false"), ("py3-none-any", f"{PYTHON}-{platform}")):
            assert text.count(old) == 1, text
            text = text.replace(old, new)
        tags.write_text(text, encoding="utf-8")
        subprocess.run([*run, "pack", "--dest", str(out), str(folder)], check=True, stdout=subprocess.DEVNULL)
    (made,) = set(out.glob("*.whl")) - before
    return made


def main() -> int:
    pure = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        for platform, sets in PLATFORMS.items():
            libraries = {one: compiled(one, options, Path(name)) for one, options in sets.items()}
            print(platform_wheel(pure, platform, libraries, pure.parent).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
