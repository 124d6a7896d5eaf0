"""The wheel that this repository makes holds all that the packages are made of, and is imported by itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bem_peft import __version__
from tests.wheel_contents import PACKAGES, ROOT, import_alone, missing


def test_the_version_is_one_everywhere() -> None:
    def first(pattern: str, name: str) -> tuple[str, ...]:
        found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.M)
        assert found is not None, name
        return found.groups()

    version, date = first(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", "CHANGELOG.md")
    assert version == __version__
    assert first(r"^version: (\S+)\ndate-released: (\S+)$", "CITATION.cff") == (version, date)
    minor = version.rpartition(".")[0]
    assert first(r"^### From \S+ to (\S+)$", "docs/upgrading.md") == (minor,)
    assert (ROOT / "tests/saved_files" / version).is_dir(), "python -m tests.saved_files.make"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    assert missing(wheel) == []
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_is_imported_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    import_alone(wheel, tmp_path)


def test_a_file_that_the_wheel_lacks_is_named(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(tmp_path / wheel.name, "w") as part:
        for name in whole.namelist():
            if not name.endswith("report.css"):
                part.writestr(name, whole.read(name))
    assert missing(tmp_path / wheel.name) == ["lacks bem_peft/evaluation/report/report.css"]
