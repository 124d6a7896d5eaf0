"""Building the operators: what stands in the way is named, and processes that build at once all end well."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bem_peft.kernels import cpp, cpp_build, cpp_library
from bem_peft.tuners.cpp_proof import proof
from tests.kernels.test_cpp_operators import pytestmark

__all__ = ["pytestmark"]

SMALL = """
#include <Python.h>
static PyObject* one(PyObject*, PyObject*) { return PyLong_FromLong(1); }
static PyMethodDef methods[] = {{"one", one, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "small", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_bem_peft_cpu(void) { return PyModule_Create(&module); }
"""


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of one line in place of the operators', and an empty folder to build in."""
    source = tmp_path / "source" / "operators.cpp"
    source.parent.mkdir()
    source.write_text(SMALL)
    monkeypatch.setattr(cpp_library, "FOLDER", source.parent)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    return source


def built() -> Any:
    return cpp_library.load(cpp_build.build_here())


def in_a_process(source: Path, code: str = "print(cpp_library.load(cpp_build.build_here()).one())") -> Any:
    whole = (
        "from pathlib import Path; from bem_peft.kernels import cpp_build, cpp_library;"
        f"cpp_library.FOLDER = Path({str(source.parent)!r});{code}"
    )
    return subprocess.Popen([sys.executable, "-c", whole], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_build_at_once(small_source: Path) -> None:
    for process in [in_a_process(small_source) for _ in range(3)]:
        out, err = process.communicate(timeout=300)
        assert out.split() == ["1"], err
    assert [file.name for file in cpp_library.folder().iterdir()] == ["bem_peft_cpu.abi3.so"]


def test_a_process_that_was_killed_while_it_built_stands_in_nobodys_way(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, started = tmp_path / "slow", tmp_path / "started"
    slow.write_text(f"#!/bin/sh\ntouch {started}\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    process = in_a_process(small_source)
    while not started.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert not cpp_library.library().exists()
    process.kill()
    process.communicate()
    monkeypatch.delenv("CXX")
    assert built().one() == 1


def test_the_compilers_own_error_is_told_and_it_can_be_tried_again(small_source: Path) -> None:
    small_source.write_text("#error nothing is meant here")
    for _ in range(2):
        with pytest.raises(cpp.BuildError, match=r"(?s)nothing is meant here.*They need a C\+\+ compiler.*=torch"):
            built()
        assert list(cpp_library.folder().iterdir()) == []
    small_source.write_text(SMALL)
    assert built().one() == 1


def test_what_was_built_before_stays_where_a_build_fails(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cpp_build.build_here()
    before = path.read_bytes()
    with pytest.raises(cpp.BuildError):
        cpp_build.compile_library(path, cpp_build.compiler(), ["-DPyMODINIT_FUNC=nothing"])
    assert path.read_bytes() == before


def test_a_missing_compiler_is_told(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        cpp.BuildError, match=r"(?s)there is no c\+\+ or g\+\+ or clang\+\+\..*They need a C\+\+ compiler"
    ):
        built()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(cpp.BuildError, match=r"there is no no-such-compiler\."):
        built()


def test_cxx_is_a_command_with_options(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_source.write_text(SMALL.replace("PyLong_FromLong(1)", "PyLong_FromLong(ONE)"))
    monkeypatch.setenv("CXX", f"{cpp_build.compiler()[0]} -DONE=1")
    assert built().one() == 1


def test_a_folder_that_cannot_be_written_is_told(
    small_source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(cpp.BuildError, match=r"(?s)Not a directory.*a folder to write to"):
        cpp_build.compile_library(cpp_library.library(), cpp_build.compiler(), [])


def test_a_system_that_is_not_offered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "offered on Linux, and from source on macOS, not on" in cpp_library.standing().why
    with pytest.raises(cpp.BuildError, match=r"could not be built: the C.. operators are offered on Linux"):
        cpp_build.compiler()


def test_threads_that_build_at_once_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def load(path: Path) -> None:
        calls.append(1)
        time.sleep(0.2)
        monkeypatch.setattr(cpp, "_path", path)

    monkeypatch.setattr(cpp, "_path", None)
    monkeypatch.setattr(cpp, "_wanted", lambda: Path("library"))
    monkeypatch.setattr(cpp, "_load", load)
    threads = [threading.Thread(target=cpp.build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


def test_another_source_or_option_has_a_library_of_its_own(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {cpp_library.name()}
    small_source.write_text(SMALL + "// changed")
    names.add(cpp_library.name())
    monkeypatch.setattr(cpp_library, "CFLAGS", ["-O0"])
    names.add(cpp_library.name())
    assert len(names) == 3


def test_the_library_is_named_after_the_processor_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled for the machine's own instructions; a home folder may be shared."""
    mine = cpp_library.name()
    assert mine == cpp_library.name()
    monkeypatch.setattr(cpp_library, "_instructions", lambda: "sse2")
    assert cpp_library.name() != mine


def test_cpp_builds_at_first_use_and_says_so(
    small_source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = cpp._wanted()
    assert path == cpp_library.library()
    assert path.is_file()
    (record,) = caplog.records
    assert record.getMessage().startswith("building the C++ operators with ")
    caplog.clear()
    assert cpp._wanted() == path
    assert not caplog.records, "and not again"


# libraries that compute wrongly

# what they break -> file, right and wrong text
FAULTS = {
    "kronecker_train, film_backward, rank_mask_backward": (
        ("kronecker.cpp", "= scaling * one[j];", "= 1.01f * scaling * one[j];"),
        ("film.cpp", "of_sum * pd[at] * share", "1.1f * of_sum * pd[at] * share"),
        ("rank_mask.cpp", "soft * (1.0f - soft)", "soft * (1.1f - soft)"),
    ),
    "head_gating in torch.float32": (  # the last row of each thread
        ("threads.h", "work.f(first, std::min(work.end, first + part));",
         "work.f(first, std::min(work.end, first + part) - 1);"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAULTS)
def wrong(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """What faults break, and a library with them."""
    folder = tmp_path_factory.mktemp("wrong")
    for source in cpp_library.FOLDER.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    for name, right, fault in FAULTS[request.param]:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(right) == 1, right
        (folder / name).write_text(text.replace(right, fault), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_library, "FOLDER", folder)
        path = folder / "built" / "bem_peft_cpu.abi3.so"
        cpp_build.compile_library(path, cpp_build.compiler(), ["-O0"])
        yield request.param, path


def test_a_library_that_computes_wrongly_fails_its_first_use_and_its_proof(
    wrong: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, path = wrong
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pytest.raises(cpp.BuildError, match=r"the proof of .* ended with 1: .* fails its test against") as caught:
        proof(path)
    for operator in broken.split(", "):
        assert operator in str(caught.value)
