"""Building the operators: what stands in the way is named, and two processes that build at once both end well."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from bem_peft.kernels import cpp, cpp_library
from tests.kernels.test_cpp_operators import pytestmark

__all__ = ["pytestmark"]

SMALL = """
#include <Python.h>
static PyObject* one(PyObject*, PyObject*) { return PyLong_FromLong(1); }
static PyMethodDef methods[] = {{"one", one, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "small", nullptr, -1, methods};
#define NAME_(name) PyInit_##name
#define NAME(name) NAME_(name)
PyMODINIT_FUNC NAME(TORCH_EXTENSION_NAME)(void) { return PyModule_Create(&module); }
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


def lock_file() -> Path:
    lock = cpp_library.folder() / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return lock


def test_a_lock_that_was_left_over_is_named_after_a_while(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_file()
    lock.touch()
    monkeypatch.setattr(cpp, "WAIT_SECONDS", 0.3)
    if not hasattr(cpp_extension, "FileBaton"):  # torch 2.15: the system's lock, which nobody holds
        assert cpp._load().one() == 1
        return
    with pytest.raises(cpp.BuildError, match=r"waited 0.3 s .*/lock is still there.* delete that file") as caught:
        cpp._load()
    assert str(lock) in str(caught.value)
    lock.unlink()
    assert cpp._load().one() == 1, "and then it builds"


def test_a_process_that_was_killed_while_it_built_is_not_waited_for(small_source: Path) -> None:
    lock = lock_file()
    code = (
        "import os, signal, sys; from bem_peft.kernels import cpp;"
        f"assert cpp._Baton({str(lock)!r}).try_acquire(); print('taken', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "taken\n"
    baton = cpp._Baton(str(lock))
    assert not baton.try_acquire()
    assert not baton._remove_where_its_process_is_gone(), "it builds still"
    holder.kill()
    holder.communicate()
    assert lock.exists()
    assert cpp._load().one() == 1
    assert not lock.exists()


def test_another_process_that_builds_is_waited_for(small_source: Path) -> None:
    """A lock that goes away, and what it left is loaded."""
    assert cpp._load().one() == 1
    lock = lock_file()
    lock.touch()
    timer = threading.Timer(0.5, lock.unlink)
    timer.start()
    code = (
        "from pathlib import Path; from bem_peft.kernels import cpp, cpp_library;"
        f"cpp_library.FOLDER = Path({str(small_source.parent)!r});"
        "print(cpp._load().one())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1"], done.stderr


def test_processes_that_build_at_once(small_source: Path) -> None:
    code = (
        "from pathlib import Path; from bem_peft.kernels import cpp, cpp_library;"
        f"cpp_library.FOLDER = Path({str(small_source.parent)!r});"
        "print(cpp._load().one())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert out.split() == ["1"], err
    assert not lock_file().exists() or not hasattr(cpp_extension, "FileBaton")


def test_the_compilers_own_error_is_told_and_it_can_be_tried_again(small_source: Path) -> None:
    small_source.write_text("#error nothing is meant here")
    for _ in range(2):
        with pytest.raises(cpp.BuildError, match=r"(?s)nothing is meant here.*They need a C\+\+ compiler.*=torch"):
            cpp._load()
        assert not lock_file().exists() or not hasattr(cpp_extension, "FileBaton")


def test_what_another_process_failed_at_is_built_here(small_source: Path) -> None:
    """The lock goes away, and there is nothing to load."""
    lock = lock_file()
    lock.touch()
    threading.Timer(0.3, lock.unlink).start()
    assert cpp._load().one() == 1


def test_a_missing_ninja_is_told(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(cpp_extension, "verify_ninja_availability", missing)
    with pytest.raises(cpp.BuildError, match=r"(?s)Ninja is required.*They need a C\+\+ compiler .*ninja"):
        cpp._load()


def test_a_folder_that_cannot_be_written_is_told(
    small_source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(cpp.BuildError, match=r"(?s)Not a directory.*a folder to write to"):
        cpp._load()


def test_threads_that_build_at_once_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def load() -> Any:
        calls.append(1)
        time.sleep(0.2)
        raise cpp.BuildError("no")

    def build() -> None:
        with pytest.raises(cpp.BuildError):
            cpp.build()

    monkeypatch.setattr(cpp, "_built", load)
    monkeypatch.setattr(cpp, "_building", spy := Lock())
    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 3
    assert spy.most == 1


class Lock:
    """A lock that counts who is inside."""

    def __init__(self) -> None:
        self.lock, self.inside, self.most = threading.RLock(), 0, 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.inside += 1
        self.most = max(self.most, self.inside)

    def __exit__(self, *_: Any) -> None:
        self.inside -= 1
        self.lock.release()


def test_another_source_or_torch_has_a_library_of_its_own(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of extensions is shared by all environments of a home folder."""
    names = {cpp_library.name()}
    small_source.write_text(SMALL + "// changed")
    names.add(cpp_library.name())
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    names.add(cpp_library.name())
    monkeypatch.setattr(cpp_library, "CFLAGS", ["-O0"])
    names.add(cpp_library.name())
    assert len(names) == 4


def test_the_library_is_named_after_the_processor_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled for the machine's own instructions; a home folder may be shared."""
    mine = cpp_library.name()
    assert mine == cpp_library.name()
    monkeypatch.setattr(cpp_library, "_instructions", lambda: "sse2")
    assert cpp_library.name() != mine
