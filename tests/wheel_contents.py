"""Is a wheel whole?  Its files are those of the repository, and it is imported from an empty folder, by itself.

python tests/wheel_contents.py dist/NAME.whl ...        # prints what is missing, and exits with 1

A wheel for a platform carries libraries as well: those of its manifest, which want nothing but an old C library. Where
they are for this machine, they are what computes there, without a compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("bem_peft", "bem_peft_cli")
LIBRARIES = "bem_peft/kernels/libraries/"
# platform -> the instruction sets of its libraries
CARRIED = {"any": (), "manylinux_2_17_x86_64": ("x86-64-v3", "x86-64-v4"), "manylinux_2_17_aarch64": ("aarch64",)}
GLIBC = 17  # of 2.17
SYSTEM = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"}
# each asks for a file that is no Python, or for a part that loads late; a front end's plugin is imported where that is
PROGRAM = """
import importlib, pkgutil, sys
from pathlib import Path
import bem_peft, bem_peft_cli
from bem_peft.evaluation.report import card, html
from bem_peft.kernels import backend, cpp
folder = Path(sys.argv[1]).resolve()
for package in (bem_peft, bem_peft_cli):
    assert folder in Path(package.__file__).resolve().parents, package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        plugin = module.name.startswith("bem_peft.integrations.")
        if ".triton_" not in module.name and not plugin and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
for name in bem_peft.__all__:
    getattr(bem_peft, name)
if sys.argv[2] == "computes":
    assert backend.chosen.is_cpp, backend.chosen.untold
    assert folder in cpp.loaded().parents, cpp.loaded()
else:
    assert cpp.loaded() is None
"""


def platform_of(wheel: Path) -> str:
    return wheel.stem.split("-")[-1]


def missing(wheel: Path) -> list[str]:
    """What the wheel lacks of the packages' files, what it has beside them, and what is wrong with its libraries."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        beside = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
        libraries = {name: archive.read(name) for name in held if name.startswith(LIBRARIES)}
    there = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    carried = CARRIED[platform_of(wheel)]
    there |= {f"{LIBRARIES}bem_peft_cpu.{one}.abi3.so" for one in carried}
    there |= {f"{LIBRARIES}manifest.json"} if carried else set()
    found = [f"lacks {name}" for name in sorted(there - held)] + [f"has {name}" for name in sorted(held - there)]
    found += [f"lacks {name}" for name in ("entry_points.txt", "licenses/LICENSE") if name not in beside]
    return found if found or not carried else unfit(libraries)


def unfit(libraries: dict[str, bytes]) -> list[str]:
    """What is wrong with a wheel's libraries: other files than its manifest says, or more wanted than glibc 2.17."""
    entries, found = json.loads(libraries.pop(f"{LIBRARIES}manifest.json"))["libraries"], []
    for name, held in sorted(libraries.items()):
        (instructions,) = re.findall(r"bem_peft_cpu\.([\w-]+)\.abi3", name)
        if entries[instructions]["sha256"] != hashlib.sha256(held).hexdigest():
            found.append(f"{name}: another sha256 than in the manifest")
        newest = max(int(version) for version in re.findall(rb"GLIBC_2\.(\d+)", held))
        if newest > GLIBC:
            found.append(f"{name}: wants glibc 2.{newest}")
        wanted = {one.decode() for one in re.findall(rb"\0((?:lib|ld-)[\w.+-]+\.so[.\d]*)", held)}
        found += [f"{name}: wants {one}" for one in sorted(wanted - SYSTEM)]
    return found


def is_of_this_machine(wheel: Path) -> bool:
    kind = platform_of(wheel)
    return kind == "any" or (sys.platform == "linux" and kind.endswith(platform.machine()))


def import_alone(wheel: Path, folder: Path) -> None:
    """Install the wheel without what it needs into `folder`, and import every module of it from there."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "BEM_PEFT_KERNELS": "auto",
        "TORCH_EXTENSIONS_DIR": str(folder / "nothing is built here"),
        "PATH": "",
    }
    computes = "imports" if platform_of(wheel) == "any" else "computes"
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), computes]
    subprocess.run(program, check=True, cwd=folder, env=environment)


def main() -> int:
    for wheel in (Path(name).resolve() for name in sys.argv[1:]):
        found = missing(wheel)
        print("\n".join(f"{wheel.name} {line}" for line in found), end="\n" if found else "")
        if found:
            return 1
        if not is_of_this_machine(wheel):
            print(f"{wheel.name} is whole; it is for other machines than this one")
            continue
        with tempfile.TemporaryDirectory() as folder:
            import_alone(wheel, Path(folder))
        print(f"{wheel.name} is whole, and imports by itself")
    return 0


if __name__ == "__main__":
    sys.exit(main())
