"""What `auto` takes: the C++ operators of a library that was proved right here, or that the wheel carries; else the
torch forms."""

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
from bem_peft.kernels import backend, cpp, cpp_build, cpp_library
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
    if not cpp_library.library().is_file():
        cpp_build.build_here()
    there, folder = cpp_library.library(), tmp_path / "extensions" / cpp_library.name()
    folder.mkdir(parents=True)
    shutil.copy2(there, folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder.parent))
    assert cpp_library.folder() == folder
    return cpp_library.library()


@pytest.fixture
def carried(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as what a wheel carries for this processor, and nothing that was built here."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    (instructions, *_) = cpp_library.fitting_sets()
    path = folder / f"bem_peft_cpu.{instructions}.abi3.so"
    built.rename(path)
    entry = {"sha256": cpp_library.sha256(path), "proof": "122 compared"}
    manifest = {"sources": cpp_library.sources_digest(), "libraries": {instructions: entry}}
    (folder / cpp_library.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(cpp_library, "LIBRARIES", folder)
    return path


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
    monkeypatch.setattr(cpp_build, "compile_library", lambda to, command, options: None)  # it was
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
    whole = built.read_bytes()
    built.write_bytes(b"no library")

    def build_here() -> Path:
        assert not built.parent.exists(), "nothing of it is kept"
        built.parent.mkdir()
        built.write_bytes(whole)
        return built

    monkeypatch.setattr(cpp_build, "build_here", build_here)
    monkeypatch.setattr(cpp_proof, "proof", lambda path: cpp_proof.Proof(122, []))
    assert main(["kernels", "--build"]) == 0
    assert "removed: " in capsys.readouterr().out
    assert cpp_library.standing().is_proved


@pytest.mark.parametrize("ends", ["broken", "raises"])
def test_operators_that_are_wrong_get_no_mark_and_lose_the_one_they_had(
    ends: str, built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def proof(path: Path) -> cpp_proof.Proof:
        if ends == "raises":
            raise cpp.BuildError("the proof ended with -4")
        return cpp_proof.Proof(122, ["PT3, torch.float32, output: 1 from float64"])

    cpp_library.write_mark({})
    monkeypatch.setattr(cpp_build, "compile_library", lambda to, command, options: None)
    monkeypatch.setattr(cpp_proof, "proof", proof)
    assert main(["kernels", "--build"]) == 1
    out = capsys.readouterr().out
    assert ("PT3, torch.float32, output: " if ends == "broken" else "ended with -4") in out
    assert ("not right on this machine" in out) == (ends == "broken")
    assert not cpp_library.standing().is_proved


def test_the_proof_sees_a_wrong_gradient_of_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * 1.05

    cpp.build()
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
    monkeypatch.setattr(cpp_library, "LIBRARIES", tmp_path / "none")
    use_kernels("auto")
    with caplog.at_level(logging.WARNING, logger="bem_peft"):
        with torch.no_grad():
            adapter.to("meta")(torch.zeros(2, 12, device="meta"), torch.zeros(2, 8, device="meta"))
        assert not caplog.records
        for _ in range(2):
            assert outcome(adapter, monkeypatch) == "torch"
    (record,) = caplog.records
    assert (
        "they are not built for this processor, and this installation carries none (a wheel for Linux does). To have "
        "those, run: bem-peft kernels --build" in record.getMessage()
    )
    assert list(tmp_path.iterdir()) == [], "nothing is built unasked"


def chosen_in_a_process(libraries: Path | None = None) -> str:
    """Whether a fresh process without a compiler takes the operators, and what of, or why not."""
    code = "import torch, sys; from pathlib import Path; from bem_peft.kernels import cpp_library\n"
    if libraries is not None:
        code += f"cpp_library.LIBRARIES = Path({str(libraries)!r})\n"
    code += "from bem_peft.kernels import backend, cpp; backend.use_kernels('auto')\n"
    code += "print(backend.chosen.is_cpp, cpp.loaded(), backend.chosen.untold)"
    environment = {**os.environ, "BEM_PEFT_KERNELS": "auto", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout


def test_a_fresh_process_loads_a_proved_library_without_a_compiler(built: Path) -> None:
    cpp_library.write_mark({})
    assert chosen_in_a_process() == f"True {built} None\n"


def test_a_library_that_the_system_cannot_load_is_refused(built: Path) -> None:
    built.write_bytes(b"no library")
    cpp_library.write_mark({})
    said = chosen_in_a_process()
    assert said.startswith("False None refused: ")
    assert "cannot be loaded" in said


# what a wheel carries


def test_what_a_wheel_carries_is_taken_at_once(carried: Path) -> None:
    assert chosen_in_a_process(carried.parent) == f"True {carried} None\n"


def test_a_library_that_was_built_and_proved_here_comes_before_the_wheels(
    carried: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cpp_library.standing().path == carried
    assert main(["kernels"]) == 0
    assert f"the wheel's for {carried.name.split('.')[1]}, 122 compared: {carried}" in capsys.readouterr().out
    here = cpp_library.library()
    shutil.copy2(carried, here)
    assert cpp_library.standing().path == carried, "not where it was not proved right"
    cpp_library.write_mark({})
    assert cpp_library.standing().path == here
    changed_mark(here, sha256=None)
    found = cpp_library.standing()
    assert found.is_refused, "and what is wrong here is not passed over"
    assert found.path == here


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "not the file that the wheel was made with"),
        (lambda path: path.unlink(), "not the file that the wheel was made with"),
        (lambda path: path.with_name("manifest.json").write_text("{}"), "the wheel's manifest is broken: 'libraries'"),
        (lambda path: path.with_name("manifest.json").write_text("["), "the wheel's manifest is broken"),
        (
            lambda path: path.with_name("manifest.json").write_text(
                path.with_name("manifest.json").read_text().replace('"sources": "', '"sources": "0')
            ),
            "of other sources",
        ),
    ],
)
def test_a_wheels_library_that_is_not_as_it_was_made_is_refused(damage: Any, text: str, carried: Path) -> None:
    damage(carried)
    found = cpp_library.standing()
    assert found.is_refused
    assert not found.is_proved
    assert text in found.why


@pytest.mark.parametrize(
    ("flags", "sets"),
    [
        ("flags : sse2 avx fma", []),
        ("flags : avx2 bmi1 bmi2 f16c fma abm movbe", ["x86-64-v3"]),
        (
            "flags : avx2 bmi1 bmi2 f16c fma abm movbe avx512f avx512bw avx512cd avx512dq avx512vl",
            ["x86-64-v4", "x86-64-v3"],
        ),
        ("flags : avx2 bmi1 bmi2 f16c fma abm movbe avx512f", ["x86-64-v3"]),
        ("Features : fp asimd evtstrm", ["aarch64"]),
    ],
)
def test_the_processor_says_which_library_fits(
    flags: str, sets: list[str], carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_library, "_instructions", lambda: flags)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cpp_library.fitting_sets() == sets
    if not sets:
        why = cpp_library.standing().why
        assert "those of the wheel want instructions that are not here (" in why
