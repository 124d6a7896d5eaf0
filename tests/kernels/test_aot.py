"""What the Triton kernels take of a GPU, compiled ahead of time, and what is tried of their tiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")
if sys.platform.startswith("linux"):
    import triton

    from bem_peft.kernels import triton_tiles

ROOT = Path(__file__).parents[2]
KERNELS = {
    "_factor_gradient", "_factor_gradient 2", "_gate_gradients", "_gated_update", "_input_gradient", "_mask_gradients",
    "_masked_update", "_modulate", "_modulate_backward", "_project", "_row_units", "_unit_gradients", "_unit_sums",
    "_update",
}  # fmt: skip


def compiled(*options: str, **environment: str) -> tuple[int, list[dict[str, str]], str]:
    """Exit status, rows and output of benchmarks/aot.py, which must not run under Triton's interpreter."""
    command = [sys.executable, str(ROOT / "benchmarks" / "aot.py"), "--print-only", *options]
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [given.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**given, **environment, "PYTHONPATH": path}, timeout=600
    )
    names = ("kernel", "dtype", "sizes", "tile", "target", "registers", "most", "shared", "limit", "spilled", "verdict")
    lines = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return done.returncode, [dict(zip(names, line, strict=True)) for line in lines], done.stdout + done.stderr


def roofline(code: str) -> str:
    """The output of Python with benchmarks/roofline.py imported, not under Triton's interpreter."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [given.get("PYTHONPATH")])])
    command = [sys.executable, "-c", f"import roofline\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**given, "PYTHONPATH": path}, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_has_a_row_a_token_and_a_channel_is_moved_once() -> None:
    """By the compiled code, at the default sizes: of 16 units or ranks at most (`benchmarks/results/roofline.csv`)."""
    rows = [line.split("\t") for line in roofline("roofline.main(['--print-only', '--fast'])").splitlines()]
    found = {
        row[0]: dict(zip(("written", "largest", "times"), (row[10], row[11], row[12]), strict=True)) for row in rows
    }
    assert found.keys() == KERNELS
    wide = {name: row for name, row in found.items() if row["largest"] in ("y", "grad", "x", "grad_x")}
    assert wide.keys() >= {"_gated_update", "_masked_update", "_modulate", "_unit_sums", "_project", "_update"}
    assert {row["times"] for row in wide.values()} == {"1.00"}
    assert {found[name]["written"] for name in ("_gated_update", "_masked_update", "_modulate", "_update")} == {"1.00"}


def test_the_traffic_of_a_program_is_counted_with_its_loops() -> None:
    """Against numbers by hand: two trips of a loop around a load, and a loop in it that carries a pointer."""
    ttir = """
        %c0 = arith.constant 0 : i32
        %c16 = arith.constant 16 : i32
        %end = arith.muli %N, %c16 : i32
        %p = tt.splat %x : !tt.ptr<bf16> -> tensor<16x8x!tt.ptr<bf16>>
        %a = tt.load %p, %m : tensor<16x8x!tt.ptr<bf16>>
        %s = scf.for %i = %c0 to %end step %c16 iter_args(%q = %w) -> (!tt.ptr<f32>)  : i32 {
          %one = tt.load %q : !tt.ptr<f32>
          %r = "tt.reduce"(%a) <{axis = 1 : i32}> ({
          ^bb0(%l: f32, %k: f32):
          }) : (tensor<16x8xf32>) -> tensor<16xf32>
          %d = tt.dot %a, %b, %c : tensor<16x8xbf16> * tensor<8x32xbf16> -> tensor<16x32xf32>
          scf.for %j = %c0 to %c16 step %c16  : i32 {
            tt.store %p, %a, %m : tensor<16x8x!tt.ptr<bf16>>
          }
        }
        tt.store %p, %a : tensor<16x8x!tt.ptr<bf16>>
    """
    out = roofline(f"t = roofline.traffic({ttir!r}, {{'%N': 2}}); print(t.read, t.written, t.operations)")
    assert out.strip() == "{'%x': 256, '%w': 8} {'%x': 768} 16384"


def test_no_kernel_spills_or_wants_more_than_a_small_gpu_has() -> None:
    """The largest tile that is tried; every tile, size and target: `make aot`."""
    status, rows, output = compiled("--fast")
    found = {(row["kernel"], row["dtype"], row["target"]) for row in rows}
    assert found == {(k, d, t) for k in KERNELS for d in ("float32", "bfloat16") for t in ("sm_86", "gfx942")}, output
    assert [row for row in rows if row["verdict"] != "kept"] == []
    assert all(int(row["registers"]) > 8 and row["spilled"] == "0" for row in rows)
    assert status == 0


class _Metadata(NamedTuple):
    shared: int


class _Compiled(NamedTuple):
    metadata: _Metadata
    n_spills: int

    def _init_handles(self) -> None:
        assert self.metadata.shared <= triton_tiles.shared_memory_bytes()  # Triton raises there


class _Kernel:
    """Wants 64 bytes of shared memory for each row of its tile, and spills in tiles of `spilling` channels."""

    __name__ = "_kernel"

    def __init__(self, **spilling: int) -> None:
        self.spilling = spilling

    def warmup(self, *given: Any, grid: tuple[int, ...], **sizes: Any) -> _Compiled:
        assert grid == (1,)
        assert sizes["OUT"] == 256
        return _Compiled(_Metadata(64 * sizes["BLOCK_N"]), self.spilling.get(f"of_{sizes['BLOCK_O']}", 0))


TILES = ((16, 64), (16, 128), (32, 128), (64, 64), (64, 128))


@pytest.mark.parametrize(
    ("limit", "dtype", "kept"),
    [
        (65536, torch.bfloat16, [*TILES]),
        (65536, torch.float32, [*TILES[:4]]),  # a tile of 32 KiB is too large whatever the device has
        (2048, torch.bfloat16, [*TILES[:3]]),
        (1024, torch.bfloat16, [*TILES[:2]]),
    ],
)
def test_tiles_that_the_device_has_no_shared_memory_for_are_not_tried(
    limit: int, dtype: torch.dtype, kept: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tiles, "shared_memory_bytes", lambda: limit)
    tiles = [triton.Config({"BLOCK_N": n, "BLOCK_O": o}) for n, o in TILES]
    given = {"y": torch.zeros(2, 2, dtype=dtype), "N": 2}
    found = triton_tiles.fitting_tiles(_Kernel(), tiles, given, {"OUT": 256})
    assert [(tile.kwargs["BLOCK_N"], tile.kwargs["BLOCK_O"]) for tile in found] == kept


@pytest.mark.parametrize(
    ("kernel", "kept"),
    [(_Kernel(of_128=3), [(16, 64), (64, 64)]), (_Kernel(of_64=5, of_128=3), [(16, 128)])],
)
def test_tiles_that_spill_are_not_tried_where_another_does_not(
    kernel: _Kernel, kept: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tiles, "shared_memory_bytes", lambda: 65536)
    tiles = [triton.Config({"BLOCK_N": n, "BLOCK_O": o}) for n, o in TILES]
    found = triton_tiles.fitting_tiles(kernel, tiles, {"y": torch.zeros(2, 2)}, {"OUT": 256})
    assert [(tile.kwargs["BLOCK_N"], tile.kwargs["BLOCK_O"]) for tile in found] == kept


def test_a_device_without_enough_shared_memory_for_any_tile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "shared_memory_bytes", lambda: 512)
    tiles = [triton.Config({"BLOCK_N": 16, "BLOCK_O": 64})]
    with pytest.raises(
        RuntimeError, match=r"_kernel wants 1,024 bytes .* a block of this device has 512: take smaller"
    ):
        triton_tiles.fitting_tiles(_Kernel(), tiles, {"y": torch.zeros(2, 2)}, {"OUT": 256})
