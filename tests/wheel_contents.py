"""Is a wheel whole?  Its files are those of the repository, and it is imported from an empty folder, by itself.

python tests/wheel_contents.py dist/NAME.whl        # prints what is missing, and exits with 1
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("bem_peft", "bem_peft_cli")
# each asks for a file that is no Python, or for a part that loads late; a front end's plugin is imported where that is
PROGRAM = """
import importlib, pkgutil, sys
from pathlib import Path
import bem_peft, bem_peft_cli
from bem_peft.evaluation.report import card, html
from bem_peft.kernels import cpp
folder = Path(sys.argv[1]).resolve()
for package in (bem_peft, bem_peft_cli):
    assert folder in Path(package.__file__).resolve().parents, package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        plugin = module.name.startswith("bem_peft.integrations.")
        if ".triton_" not in module.name and not plugin and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
for name in bem_peft.__all__:
    getattr(bem_peft, name)
"""


def missing(wheel: Path) -> list[str]:
    """What the wheel lacks of the packages' files, and what it has beside them."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        beside = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
    there = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    found = [f"lacks {name}" for name in sorted(there - held)] + [f"has {name}" for name in sorted(held - there)]
    return found + [f"lacks {name}" for name in ("entry_points.txt", "licenses/LICENSE") if name not in beside]


def import_alone(wheel: Path, folder: Path) -> None:
    """Install the wheel without what it needs into `folder`, and import every module of it from there."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)]
    subprocess.run(program, check=True, cwd=folder, env=environment)


def main() -> int:
    wheel = Path(sys.argv[1]).resolve()
    found = missing(wheel)
    print("\n".join(f"{wheel.name} {line}" for line in found), end="\n" if found else "")
    if found:
        return 1
    with tempfile.TemporaryDirectory() as folder:
        import_alone(wheel, Path(folder))
    print(f"{wheel.name} is whole, and imports by itself")
    return 0


if __name__ == "__main__":
    sys.exit(main())
