"""The wheel that this repository makes holds all that the packages are made of, and is imported by itself."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bem_peft import __version__
from bem_peft.kernels import cpp_build, cpp_library
from tests.kernels.test_cpp_operators import pytestmark as needs_a_compiler
from tests.wheel_contents import PACKAGES, ROOT, import_alone, missing, unfit
from wheels.build import Library, platform_wheel


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


@pytest.fixture(scope="module")
def with_libraries(wheel: Path) -> Path:
    """A wheel for this machine, whose libraries are all the one that the tests build."""
    if not cpp_library.library().is_file():
        cpp_build.build_here()
    kind = platform.machine()
    sets = {"aarch64"} if kind == "aarch64" else {"x86-64-v3", "x86-64-v4"}
    libraries = {one: Library(cpp_library.library(), "122 compared") for one in sets}
    return platform_wheel(wheel, f"manylinux_2_17_{kind}", libraries, wheel.parent)


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="wheels with libraries are for Linux")


@ON_LINUX
@needs_a_compiler
def test_a_wheel_with_libraries_computes_with_them_where_it_is_installed(with_libraries: Path, tmp_path: Path) -> None:
    """In an empty folder, without a compiler, with nothing built."""
    assert f"-cp311-abi3-manylinux_2_17_{platform.machine()}.whl" in with_libraries.name
    import_alone(with_libraries, tmp_path)
    (info,) = tmp_path.glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false" in info.read_text()


@ON_LINUX
@needs_a_compiler
def test_a_library_that_wants_more_than_an_old_system_has_is_named(with_libraries: Path) -> None:
    """As the one does that is built here: it takes the standard library of this system."""
    assert any("wants libstdc++.so.6" in line or "wants libc++" in line for line in missing(with_libraries))


def test_a_wheels_library_is_held_to_its_manifest() -> None:
    folder = "bem_peft/kernels/libraries/"
    held = b"\0libc.so.6\0GLIBC_2.14\0GLIBC_2.2.5\0"
    entry = {"sha256": hashlib.sha256(held).hexdigest()}

    def found(held: bytes) -> list[str]:
        manifest = json.dumps({"libraries": {"aarch64": entry}}).encode()
        return unfit({f"{folder}manifest.json": manifest, f"{folder}bem_peft_cpu.aarch64.abi3.so": held})

    assert found(held) == []
    (line,) = found(held[:-1])
    assert line.endswith("another sha256 than in the manifest")
    assert any(line.endswith("wants glibc 2.34") for line in found(held + b"GLIBC_2.34\0"))
    assert any(line.endswith("wants libgomp.so.1") for line in found(held + b"libgomp.so.1\0"))
