"""What Triton's kernels read, write and multiply by their compiled code, against what the method must move.

    python benchmarks/roofline.py                       # some minutes of one core
    python benchmarks/roofline.py --print-only --fast   # the largest tile that is tried, default sizes, bfloat16

Each kernel is compiled for sm_80 as `benchmarks/aot.py` does it, without a GPU, and the compiler's code after its
optimisations for all targets (Triton's TTIR) is read: every load, store and product of a program with its tile, times
the trips of the loops around it, times the programs of the launch. Lanes that a mask leaves out at a ragged end count.
Against that: each tensor that a kernel reads or writes, once. A ratio of 1 means that nothing moves twice; what a cache
serves is not known here, so that a ratio above 1 is an upper bound of what comes from memory. Rows: the tile that moves
least of those that are tried; "largest" is the argument that has most bytes, "times_largest" how often it is read or
written. Sizes, dtypes and launches are those of aot.py. Rows that are new or differ are added to
benchmarks/results/roofline.csv.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from aot import SIZES, Launch, NoDevice, launches, numbered, workloads
from results_table import ResultsTable, add_output, newest

TARGET = "sm_80"
COLUMNS = (
    "kernel", "dtype", "sizes", "tile", "programs", "read_bytes", "written_bytes", "least_read", "least_written",
    "times_read", "times_written", "largest", "times_largest", "operations", "operations_a_byte",
)  # fmt: skip
KEY = COLUMNS[:3]
BYTES = {"f32": 4, "i32": 4, "f16": 2, "bf16": 2, "f64": 8, "i64": 8, "i8": 1, "i1": 1}
TENSOR = re.compile(r"tensor<((?:\d+x)*)(?:!tt\.ptr<(\w+)>|(\w+))>")
POINTER = re.compile(r"!tt\.ptr<(\w+)>")
RESULT = re.compile(r"^\s*(%[\w.#:]+(?:, *%[\w.#:]+)*)\s*=\s*(.*)$")
FOLDED = {
    "addi": lambda a, b: a + b, "subi": lambda a, b: a - b, "muli": lambda a, b: a * b, "minsi": min, "maxsi": max,
    "divsi": lambda a, b: a // b, "extsi": lambda a: a, "trunci": lambda a: a,
}  # fmt: skip
FOR = re.compile(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")


@dataclass
class Traffic:
    """Bytes that one program asks for, by the argument they belong to, and operations of its products."""

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    operations: int = 0


def traffic(ttir: str, values: dict[str, int]) -> Traffic:
    """Of one program. values: the whole numbers among the kernel's arguments, by name.

    Raises:
        ValueError: a loop whose trips are not known from `values`.
    """
    found, known, origin = Traffic(), dict(values), dict[str, str]()
    times = [1]
    for line in ttir.splitlines():
        text = line.split(" loc(")[0].strip()
        result = RESULT.match(text)
        name, body = (result[1], result[2]) if result else ("", text)
        if " = arith.constant " in text and (number := re.search(r"arith\.constant (-?\d+) : i(?:32|64)$", text)):
            known[name] = int(number[1])
        loop = FOR.search(text)
        if loop:
            for carried, first in re.findall(r"(%[\w.]+) = (%[\w.#]+)", text.partition("iter_args(")[2]):
                origin[carried] = origin.get(first, first)
            times.append(times[-1] * _trips(*(_number(part, known, text) for part in loop.groups())))
            continue
        if text.startswith("scf.if") or " = scf.if" in text or text.endswith("{"):
            times.append(times[-1])  # a branch is counted as taken
            continue
        if text.startswith("}"):
            if " else {" in text:
                continue
            if len(times) > 1:
                times.pop()
            continue
        operands = re.findall(r"%[\w.]+", body)
        if name and operands and "ptr" in text:
            origin[name] = origin.get(operands[0], operands[0])
        elif name and body.startswith("tt.get_program_id"):
            known[name] = 0  # the first program's trips stand for all
        elif (
            name
            and (sign := re.match(r"arith\.(\w+)", body))
            and sign[1] in FOLDED
            and all(o in known for o in operands)
        ):
            known[name] = FOLDED[sign[1]](*(known[o] for o in operands))
        if body.startswith(("tt.load", "tt.store", "tt.atomic")):
            of = origin.get(operands[0], operands[0])
            side = found.read if body.startswith("tt.load") else found.written
            side[of] = side.get(of, 0) + times[-1] * _bytes(text)
        if body.startswith("tt.dot"):
            (rows, inner), (_, columns) = (_shape(part) for part in TENSOR.findall(text)[:2])
            found.operations += times[-1] * 2 * rows * inner * columns
    return found


def _number(name: str, known: dict[str, int], text: str) -> int:
    if name not in known:
        raise ValueError(f"{text}: {name} is not known")
    return known[name]


def _trips(start: int, end: int, step: int) -> int:
    return max(0, math.ceil((end - start) / step))


def _shape(found: tuple[str, str, str]) -> list[int]:
    return [int(size) for size in found[0].split("x")[:-1]]


def _bytes(text: str) -> int:
    """Of the tile that a load or a store moves."""
    tensor = TENSOR.search(text)
    if tensor is not None:
        return math.prod(_shape(tensor.groups())) * BYTES[tensor[2] or tensor[3]]
    pointer = POINTER.search(text)
    assert pointer is not None, text
    return BYTES[pointer[1]]


def measured(launch: Launch, kernel: str, dtype: torch.dtype, sizes: str, is_fast: bool) -> dict[str, str]:
    """The row of the tile that moves least."""
    names = launch.function.arg_names
    given = dict(zip(names, launch.given, strict=False))
    best: tuple[int, dict[str, str]] | None = None
    for tile in launch.tiles(is_fast):
        call = {**launch.sizes, **tile}
        compiled = launch.function.warmup(*launch.given, grid=(1,), **call)
        whole = {f"%{name}": value for name, value in {**given, **call}.items() if type(value) is int}
        one = traffic(compiled.asm["ttir"], whole)
        programs = math.prod(launch.grid(call) if callable(launch.grid) else launch.grid)
        least = [
            sum(_size(given[name.removeprefix("%")]) for name in side) for side in (one.read, one.written)
        ]  # fmt: skip
        sizes_of = {name: _size(given[name.removeprefix("%")]) for side in (one.read, one.written) for name in side}
        largest = max(sizes_of, key=sizes_of.__getitem__)
        of_largest = programs * (one.read.get(largest, 0) + one.written.get(largest, 0)) / sizes_of[largest]
        moved = [programs * sum(side.values()) for side in (one.read, one.written)]
        blocks = " ".join(f"{k.removeprefix('BLOCK_')}={call[k]}" for k in sorted(call) if k.startswith("BLOCK"))
        values = (
            kernel, str(dtype)[6:], sizes, f"{blocks} warps={tile['num_warps']}", programs, *moved, *least,
            *(f"{m / at_least:.2f}" if at_least else "" for m, at_least in zip(moved, least, strict=True)),
            largest.removeprefix("%"), f"{of_largest:.2f}",
            programs * one.operations, f"{programs * one.operations / sum(moved):.2f}",
        )  # fmt: skip
        row = dict(zip(COLUMNS, map(str, values), strict=True))
        if best is None or sum(moved) < best[0]:
            best = sum(moved), row
    assert best is not None
    return best[1]


def _size(value: Any) -> int:
    assert isinstance(value, torch.Tensor)
    return value.numel() * value.element_size()


def rows(is_fast: bool) -> Iterator[dict[str, str]]:
    triton.runtime.driver.set_active(NoDevice(TARGET))
    for sizes in ("default",) if is_fast else SIZES:
        for dtype in (torch.bfloat16,) if is_fast else (torch.float32, torch.bfloat16):
            for case in workloads(sizes):
                for kernel, launch in numbered(launches(case, dtype)):
                    yield measured(launch, kernel, dtype, sizes, is_fast)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    add_output(parser)
    args = parser.parse_args(argv)
    table = ResultsTable(args.out, "roofline.csv", COLUMNS, device=f"none (compiled by triton {triton.__version__})")
    has_rows = table.path is not None and table.path.exists()
    known = {tuple(row[n] for n in KEY): row for row in newest(table.path, KEY)} if has_rows else {}
    for row in rows(args.fast):
        before = known.get(tuple(row[n] for n in KEY), {})
        table.append([] if all(before.get(n) == row[n] for n in COLUMNS) else [row])
        print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
