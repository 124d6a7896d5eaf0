"""The core in a program without torch and Python: compiled for this machine and, where ziglang and qemu-user are, for
arm64, which that runs: `pip install ziglang`, and qemu-user from the system's packages, before a release."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bem_peft.kernels import cpp, cpp_build, cpp_library
from bem_peft.kernels.cpp_operators import _backward_arguments
from bem_peft.kernels.cpp_self_test import CASES, IN, OUT, ROWS
from tests.kernels.test_cpp_operators import pytestmark

__all__ = ["pytestmark"]
EMULATOR: str | None = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@dataclass(frozen=True)
class Call:
    """An operator, what it is given and what torch's process gets of it."""

    name: str
    arguments: tuple[Any, ...]
    results: tuple[torch.Tensor | None, ...]


def calls(method: str, dtype: torch.dtype) -> Iterator[Call]:
    """Inference, training and its backward; without the operator's flag, which is a number in place."""
    case, operators = CASES[method], cpp.build()
    x, y, gradient = (torch.randn(ROWS, size).to(dtype) for size in (IN, OUT, OUT))
    masters = [torch.randn(size) for size in case.masters]
    with torch.inference_mode():
        given = (x, y, *case.packed(dtype, *masters), *case.inference)
        yield Call(method, given, (getattr(operators, method)(*given),))
        given = (x, y, *masters, *case.training)
        out, *kept = getattr(operators, f"{method}_train")(*given)
        yield Call(f"{method}_train", given, (out, *kept))
        saved = (x, y if method == "film" else None, *masters, *kept)
        given = (gradient, *_backward_arguments(method, saved, case.training), True)
        yield Call(f"{method}_backward", given, tuple(getattr(operators, f"{method}_backward")(*given)))


def words(value: Any, is_result: bool = False) -> str:
    """An argument as core.cpp reads it; of a result its size alone."""
    if value is None:
        return "n"
    if isinstance(value, torch.Tensor):
        is_float, columns = value.dtype is torch.float32, value.shape[-1]
        bits = value.contiguous().view(torch.int32 if is_float else torch.int16).flatten().to(torch.int64)
        bits = torch.zeros_like(bits) if is_result else bits % (2**32 if is_float else 2**16)
        rows = value.numel() // max(columns, 1)
        return " ".join(["f" if is_float else "h", str(rows), str(columns), *map(str, bits.tolist())])
    if isinstance(value, list):
        return f"l {len(value)} {' '.join(map(str, value))}"
    if isinstance(value, int):
        return f"i {int(value)}"
    return f"d {value!r}"


def read(line: str, like: torch.Tensor) -> torch.Tensor:
    bits = torch.tensor([int(word) for word in line.split()], dtype=torch.int64)
    narrow = bits.to(torch.int32 if like.dtype is torch.float32 else torch.int16)
    return narrow.view(like.dtype).view(like.shape)


def commands(target: str, program: Path) -> tuple[list[str], list[str], list[str]]:
    """(compiler, its options, what runs the program)."""
    if target == "native":
        return cpp_build.compiler(), [*cpp_build.native(), "-O1"], [str(program)]
    assert EMULATOR is not None
    return [sys.executable, "-m", "ziglang", "c++"], ["-target", "aarch64-linux-musl"], [EMULATOR, str(program)]


TARGETS = ["native", *(["aarch64"] if EMULATOR and importlib.util.find_spec("ziglang") else [])]


@pytest.mark.parametrize("target", TARGETS)
def test_the_core_gives_elsewhere_what_it_gives_in_torchs_process(target: str, tmp_path: Path) -> None:
    program = tmp_path / "core"
    compiler, options, runs = commands(target, program)
    sources = [file for file in cpp_library.sources() if file.name != "python.cpp"]
    options = [*cpp_library.CFLAGS, *options, f"-I{cpp_library.FOLDER}", str(Path(__file__).with_name("core.cpp"))]
    subprocess.run([*compiler, *options, *map(str, sources), "-o", str(program)], check=True, capture_output=True)
    made = [call for method in CASES for dtype in cpp.DTYPES for call in calls(method, dtype)]
    text = "\n".join(
        " ".join(
            [call.name, str(len(call.arguments) + len(call.results)), *map(words, call.arguments)]
            + [words(result, is_result=True) for result in call.results]
        )
        for call in made
    )
    done = subprocess.run(runs, input=text, capture_output=True, text=True, check=True)
    lines, compared = iter(done.stdout.splitlines()), 0
    for call in made:
        said = [next(lines) for _ in (*call.arguments, *call.results)][len(call.arguments) :]
        for line, expected in zip(said, call.results, strict=True):
            if expected is None or not expected.numel():
                continue
            found, tolerance = read(line, expected), 1e-5 if expected.dtype is torch.float32 else 2.0**-7
            largest = float(expected.float().abs().max())
            torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance * largest, msg=f"{call.name}")
            compared += 1
    assert compared == 2 * (4 + (3 + 5) + (2 + 5) + (2 + 4) + (4 + 6))
    assert next(lines, None) is None
