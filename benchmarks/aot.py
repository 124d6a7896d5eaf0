"""What Triton's kernels take of a processor: each is compiled for named targets ahead of time, which needs no GPU.

    make aot                                       # all kernels, tiles, sizes and targets: about 20 minutes of one core
    python benchmarks/aot.py --print-only --fast   # the largest tile that is tried, two targets

The launches are those that the operators themselves make, forward and backward, and the tiles those that autotuning
would try on the target: the recorded launches are compiled, not run. Held for each:

    no register is spilled;
    shared memory is within what a block of the target may have;
    a thread's registers leave room for two blocks a processor.

Exits with 1 where one is not. Rows that are new or differ are added to benchmarks/results/aot.csv as they are found.
bfloat16 stands for float16 as well: the same loads, tiles and tensor cores.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # which makes kernels that cannot be compiled

import torch
import triton
from results_table import ResultsTable, add_output, newest
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from bem_peft.kernels.parity import Case, cases, kronecker_case, operators

COLUMNS = (
    "kernel", "dtype", "sizes", "tile", "target", "registers", "registers_limit", "shared_bytes", "shared_limit",
    "spill_bytes",
)  # fmt: skip
KEY = COLUMNS[:5]
ROWS = 256


@dataclass(frozen=True)
class Target:
    """A processor: what its blocks may have. registers: of 32 bits, that the blocks of a processor share."""

    target: GPUTarget
    shared_bytes: int
    registers: int

    def registers_limit(self, warps: int) -> int:
        """Of a thread, with two blocks a processor, and at most what an instruction can name."""
        most = 512 if self.target.arch in ("gfx90a", "gfx942") else 256 if self.target.backend == "hip" else 255
        return min(most, self.registers // (2 * warps * self.target.warp_size))


# NVIDIA: CUDA C++ programming guide, technical specifications per compute capability. AMD: CDNA 2 and 3 ISA documents,
# 512 registers a lane of each of 4 SIMDs; RDNA 3 ISA document, 1,536 registers a lane of each of 2 SIMDs.
TARGETS = {
    **{f"sm_{arch}": Target(GPUTarget("cuda", arch, 32), kib * 1024, 65536)
       for arch, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))},
    **{arch: Target(GPUTarget("hip", arch, 64), 65536, 4 * 512 * 64) for arch in ("gfx90a", "gfx942")},
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 65536, 2 * 1536 * 32),
}  # fmt: skip
FAST = ("sm_86", "gfx942")  # the least shared memory of NVIDIA's and of AMD's

# width, factors of PT3's input, ranks of PT1 and PT2, units of PT4, ranks of PT3's factors
SIZES = {"default": (2048, (128, 64), 16, 8, (8, 8)), "large": (4096, (128, 112), 64, 64, (32, 32))}


class NoDevice:
    """Stands for Triton's driver: it knows a target, reads what a compiled kernel takes, and runs nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.utils = name, self

    def launcher_cls(self, source: object, metadata: object) -> None:
        return None

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: object
    ) -> tuple[object, object, int, int, int]:
        """A module and a function (none here), registers a thread, spilled numbers of 4 bytes a thread, threads."""
        registers, spilled = resources(binary, self.get_current_target().backend)
        return self, self, registers, spilled // 4, 1024

    def get_current_device(self) -> Any:
        return self.name  # what Triton keeps compiled kernels by

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].target

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": TARGETS[self.name].shared_bytes}


@dataclass(frozen=True)
class Launch:
    kernel: Any  # an Autotuner or a JITFunction
    given: tuple[Any, ...]
    sizes: dict[str, Any]
    grid: Any  # of a launch, or a function of its tile that gives it

    @property
    def function(self) -> Any:
        return self.kernel.fn if isinstance(self.kernel, Autotuner) else self.kernel

    def tiles(self, is_fast: bool) -> list[dict[str, Any]]:
        """The tiles that are tried on the current target, with their warps; `is_fast`: the largest alone."""
        if not isinstance(self.kernel, Autotuner):
            return [{"num_warps": 4}]
        tiles = self.kernel.configs
        if len(tiles) > 1:
            given = dict(zip(self.kernel.arg_names, self.given, strict=False))
            tiles = self.kernel.early_config_prune(tiles[-2:] if is_fast else tiles, given, **self.sizes)
        return [tile.all_kwargs() for tile in tiles[-1 if is_fast else 0 :]]


def workloads(sizes: str) -> Iterator[Case]:
    """One case of each operator."""
    width, factors, rank, units, ranks = SIZES[sizes]
    of_rank = {r: {case.name: case for case in cases((ROWS,), (width,), (r,))} for r in (rank, units)}
    yield from (of_rank[rank]["gate"], of_rank[rank]["mask"], of_rank[units]["film"])
    yield kronecker_case({"rows": ROWS, "out": width}, ROWS, width, factors, ranks)


def launches(case: Case, dtype: torch.dtype) -> list[Launch]:
    """What one forward and backward pass of the operator launches; nothing runs."""
    found: list[Launch] = []

    def record(kernel: Any, *given: Any, grid: object, warmup: bool, **sizes: Any) -> None:
        found.append(Launch(kernel, given, sizes, grid))

    kept = Autotuner.run, JITFunction.run
    Autotuner.run = JITFunction.run = record
    try:
        given = [a.contiguous().requires_grad_() if isinstance(a, torch.Tensor) else a
                 for a in case.arguments(dtype, torch.device("cpu"))]  # fmt: skip
        out = operators()[case.operator](*given)
        out.backward(torch.ones_like(out))
    finally:
        Autotuner.run, JITFunction.run = kept
    return list({(launch.function.__name__, str(launch.sizes)): launch for launch in found}.values())


def numbered(launches: list[Launch]) -> Iterator[tuple[str, Launch]]:
    """Each with its kernel's name; a kernel that is launched at other sizes once more gets a number."""
    names: list[str] = []
    for launch in launches:
        names.append(launch.function.__name__)
        count = names.count(names[-1])
        yield names[-1] if count == 1 else f"{names[-1]} {count}", launch


def resources(binary: bytes, backend: str) -> tuple[int, int]:
    """Registers and spilled bytes, both a thread, of a compiled kernel."""
    if backend == "hip":  # an ELF file whose note holds the kernel's metadata as msgpack
        return _number_after(binary, b".vgpr_count"), _number_after(binary, b".private_segment_fixed_size")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"REG:(\d+)", text)[-1]), int(re.findall(r"STACK:(\d+)", text)[-1])


def _number_after(binary: bytes, key: bytes) -> int:
    """The unsigned number that msgpack has behind a key."""
    start = binary.rindex(key) + len(key)
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(binary[start], 0)
    return int.from_bytes(binary[start + 1 : start + 1 + size], "big") if size else binary[start]


def measured(name: str, dtype: torch.dtype, sizes: str, is_fast: bool) -> Iterator[dict[str, str]]:
    """A row for each kernel and tile on one target."""
    triton.runtime.driver.set_active(NoDevice(name))
    for case in workloads(sizes):
        for kernel, launch in numbered(launches(case, dtype)):
            for tile in launch.tiles(is_fast):
                call = {**launch.sizes, **tile}
                compiled = launch.function.warmup(*launch.given, grid=(1,), **call)
                registers, spilled = resources(compiled.kernel, TARGETS[name].target.backend)
                blocks = " ".join(
                    f"{key.removeprefix('BLOCK_')}={call[key]}" for key in sorted(call) if key.startswith("BLOCK")
                )
                values = (
                    kernel, str(dtype)[6:], sizes, f"{blocks} warps={tile['num_warps']}",
                    name, registers, TARGETS[name].registers_limit(tile["num_warps"]), compiled.metadata.shared,
                    TARGETS[name].shared_bytes, spilled,
                )  # fmt: skip
                yield dict(zip(COLUMNS, map(str, values), strict=True))


def is_kept(row: dict[str, str]) -> bool:
    within = all(int(row[of]) <= int(row[limit]) for of, limit in
                 (("registers", "registers_limit"), ("shared_bytes", "shared_limit")))  # fmt: skip
    return within and row["spill_bytes"] == "0"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--fast", action="store_true", help="the largest tile that is tried, default sizes, two targets"
    )
    parser.add_argument("--targets", nargs="+", default=None, choices=list(TARGETS))
    add_output(parser)
    args = parser.parse_args(argv)
    table = ResultsTable(args.out, "aot.csv", COLUMNS, device=f"none (compiled by triton {triton.__version__})")
    has_rows = table.path is not None and table.path.exists()
    known = {tuple(row[n] for n in KEY): row for row in newest(table.path, KEY)} if has_rows else {}
    broken = count = 0
    for name in args.targets or (FAST if args.fast else TARGETS):
        for sizes in ("default",) if args.fast else SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                for row in measured(name, dtype, sizes, args.fast):
                    before = known.get(tuple(row[n] for n in KEY), {})
                    table.append([] if all(before.get(n) == row[n] for n in COLUMNS) else [row])
                    count, broken = count + 1, broken + (not is_kept(row))
                    print(*row.values(), "kept" if is_kept(row) else "BROKEN", sep="\t", flush=True)
    print(f"{count} kernels, {broken} broken")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
