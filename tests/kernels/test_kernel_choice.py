"""What `auto` takes: the C++ operators where their library was proved right on this machine, else the torch forms."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bem_peft import KroneckerConfig, use_kernels
from bem_peft.kernels import backend, cpp, cpp_library
from bem_peft.tuners import cpp_proof
from bem_peft.tuners.base.adapter import SiteShape
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.pt3_kronecker import KroneckerAdapter
from bem_peft_cli.main import main
from tests.kernels.test_cpp_operators import pytestmark

__all__ = ["pytestmark"]


@pytest.fixture(autouse=True)
def form_after() -> Iterator[None]:
    yield
    use_kernels("torch")


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library that the tests build once, in a folder of extensions of this test's own, without a mark."""
    cpp.build()
    there, name = cpp_library.folder(), cpp_library.name()
    folder = tmp_path / "extensions" / name
    folder.mkdir(parents=True)
    for file in there.iterdir():
        if file.name not in (cpp_library.MARK, "lock"):
            shutil.copy2(file, folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder.parent))
    assert cpp_library.folder() == folder
    return cpp_library.library()


def outcome(adapter: KroneckerAdapter, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which form computes a call."""
    calls: list[str] = []
    monkeypatch.setattr(adapter, "in_torch", lambda x, y: (calls.append("torch"), y)[1])
    monkeypatch.setattr(adapter, "operator", lambda x, y, *_, **__: (calls.append("cpp"), y)[1])
    with torch.no_grad():
        adapter(torch.zeros(2, 12), torch.zeros(2, 8))
    return calls[0]


@pytest.fixture
def adapter() -> KroneckerAdapter:
    made = KroneckerAdapter(KroneckerConfig(u_rank=2, v_rank=2), SiteShape("s", 12, 8), CallState())
    made.reset_parameters(False, SiteShape("s", 12, 8))
    return made.eval()


def test_auto_takes_a_library_that_was_proved_right_and_no_other(
    built: Path, adapter: KroneckerAdapter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_kernels("auto")
    assert outcome(adapter, monkeypatch) == "torch", "it is built, and not proved right"
    assert main(["kernels", "--build"]) == 0
    assert "auto on a CPU    cpp" in capsys.readouterr().out
    assert not backend.chosen.is_cpp, "a choice is made when it is asked for"
    use_kernels("auto")
    assert outcome(adapter, monkeypatch) == "cpp"
    use_kernels("torch")
    assert outcome(adapter, monkeypatch) == "torch"


def changed_mark(built: Path, **parts: Any) -> None:
    mark = built.with_name(cpp_library.MARK)
    mark.write_text(json.dumps({**json.loads(mark.read_text()), **parts}))


FAULTS: dict[str, tuple[Any, str]] = {
    "another torch": (lambda built: changed_mark(built, torch="2.7.0"), r"torch = '2\.7\.0', here it is '2\."),
    "another source": (lambda built: changed_mark(built, sources="0" * 64), "sources = '0000"),
    "another processor": (lambda built: changed_mark(built, processor="1"), "processor = '1'"),
    "another release": (lambda built: changed_mark(built, bem_peft="0.0.1"), r"bem_peft = '0\.0\.1'"),
    "no sha256": (lambda built: changed_mark(built, sha256=None), "not the file that was proved right"),
    "a damaged library": (lambda built: built.write_bytes(built.read_bytes()[:-1] + b"x"), "sha256 differs"),
    "a mark cut short": (
        lambda built: built.with_name(cpp_library.MARK).write_text("{"),
        "its mark is broken.*no JSON",
    ),
    "a mark of bytes": (lambda built: built.with_name(cpp_library.MARK).write_bytes(b"\xff\xfe"), "no UTF-8"),
    "a mark that is a list": (lambda built: built.with_name(cpp_library.MARK).write_text("[]"), "holds no object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_it_was_proved_is_refused_by_name_once(
    fault: str,
    built: Path,
    adapter: KroneckerAdapter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cpp_library.write_mark({})
    assert cpp_library.standing().is_proved
    damage, text = FAULTS[fault]
    damage(built)
    monkeypatch.setattr(cpp, "load_proved", lambda: pytest.fail("it was loaded"))
    use_kernels("auto")
    with caplog.at_level(logging.WARNING, logger="bem_peft"):
        assert outcome(adapter, monkeypatch) == "torch"
        assert outcome(adapter, monkeypatch) == "torch"
    (record,) = caplog.records
    assert "refused: " in record.getMessage()
    assert re.search(text, record.getMessage()), record.getMessage()
    assert "bem-peft kernels --build" in record.getMessage()


@pytest.mark.skipif(os.name != "posix", reason="files have owners")
def test_another_users_library_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_library.write_mark({})
    mine = os.stat(built).st_uid
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    found = cpp_library.standing()
    assert found.is_refused == (mine != 0), "root's files are everybody's"
    if found.is_refused:
        assert "belongs to another user" in found.why


def test_building_again_mends_a_damaged_library(
    built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpp_library.write_mark({})
    built.write_bytes(b"no library")
    monkeypatch.setattr(cpp_proof, "deviations", list)  # which would build anew, for minutes
    monkeypatch.setattr(cpp_library, "write_mark", lambda proof: None)
    assert main(["kernels", "--build"]) == 0
    assert "removed: " in capsys.readouterr().out
    assert not built.exists()


def test_operators_that_are_wrong_get_no_mark_and_lose_the_one_they_had(
    built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpp_library.write_mark({})
    right = KroneckerAdapter.training_operator
    monkeypatch.setattr(KroneckerAdapter, "training_operator", lambda self, x, y: right(self, x, y * 1.001))
    assert main(["kernels", "--build"]) == 1
    out = capsys.readouterr().out
    assert "PT3, torch.float32, output: " in out
    assert "not right on this machine" in out
    assert not cpp_library.standing().is_proved


def test_the_proof_sees_a_wrong_gradient_of_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * 1.05

    found = cpp_proof.deviations()
    assert len(found) > 100
    assert all(one.is_kept for one in found)
    assert {one.case.split(",")[0] for one in found} == {"PT1", "PT2", "PT3", "PT4"}
    right = cpp_proof.Adapter.training_operator
    monkeypatch.setattr(cpp_proof.Adapter, "training_operator", lambda self, x, y: Off.apply(right(self, x, y)))
    broken = {(one.case, one.dtype) for one in cpp_proof.deviations() if not one.is_kept}
    assert broken == {(one.case, one.dtype) for one in found}


def test_a_library_that_is_not_there_is_named_once_on_a_cpu_with_the_command(
    tmp_path: Path, adapter: KroneckerAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    use_kernels("auto")
    with caplog.at_level(logging.WARNING, logger="bem_peft"):
        with torch.no_grad():
            adapter.to("meta")(torch.zeros(2, 12, device="meta"), torch.zeros(2, 8, device="meta"))
        assert not caplog.records
        for _ in range(2):
            assert outcome(adapter, monkeypatch) == "torch"
    (record,) = caplog.records
    assert "they are not built for this torch, Python and processor. To have those, run: bem-peft kernels --build" in (
        record.getMessage()
    )
    assert list(tmp_path.iterdir()) == [], "nothing is built unasked"


def test_a_fresh_process_loads_a_proved_library_without_a_compiler(built: Path) -> None:
    cpp_library.write_mark({})
    code = (
        "import bem_peft, sys; from bem_peft.kernels import backend;"
        "print(backend.chosen.is_cpp, 'torch.utils.cpp_extension' in sys.modules)"
    )
    environment = {**os.environ, "BEM_PEFT_KERNELS": "auto", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_a_library_that_the_system_cannot_load_is_refused(built: Path) -> None:
    built.write_bytes(b"no library")
    cpp_library.write_mark({})
    code = (
        "import torch, logging, bem_peft; from bem_peft.kernels import backend;"
        "print(backend.chosen.is_cpp, backend.chosen.untold)"
    )
    environment = {**os.environ, "BEM_PEFT_KERNELS": "auto", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("False refused: ")
    assert "cannot be loaded" in done.stdout
