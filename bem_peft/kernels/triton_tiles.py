r"""What the Triton kernels share: tiles, their sizes, and the end of every low-rank update,  y' = y + s low B^T.

A tile of y' is BLOCK_N rows by BLOCK_O channels; ranks are read in blocks of a power of two >= 16, as `tl.dot` wants.
Lanes outside a tensor are masked in every load and store. Products accumulate in float32 (in full float32 where the
inputs are float32), results are rounded once, to the dtype of y.

A kernel is tuned once a process, dtype and key of sizes on a GPU; in the interpreter one fixed tile is used. A product
of float32 has no tensor cores: a thread holds whole rows and columns of its operands in registers. Its tiles and blocks
are therefore smaller (`TILE_BYTES`, `product_block`); what each kernel takes of a processor, target by target, is in
benchmarks/results/aot.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(IS_INTERPRETED)
MOST_ROWS_IN_KEY = 4096
Shape = Sequence[int]
Grid = Callable[[dict[str, int]], tuple[int, int]]
Tile = tuple[dict[str, int], int]  # blocks and number of warps


class Context(Protocol):
    """What autograd keeps of a call of an operator; each operator's own adds its settings."""

    saved_tensors: tuple[torch.Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None: ...


# tiles of y' and their warps: the first is for few rows (decoding), the others for many
UPDATE_TILES: tuple[Tile, ...] = (
    ({"BLOCK_N": 16, "BLOCK_O": 64}, 4),
    ({"BLOCK_N": 16, "BLOCK_O": 128}, 4),
    ({"BLOCK_N": 32, "BLOCK_O": 128}, 4),
    ({"BLOCK_N": 64, "BLOCK_O": 64}, 4),
    ({"BLOCK_N": 64, "BLOCK_O": 128}, 8),
)
TILE_BYTES = 16384  # of a tile of y' at most: a larger one of float32 leaves a gfx1100 no registers for a second block


def tuned(*tiles: Tile, key: list[str], stages: int = 2) -> Callable[[Any], Any]:
    """The kernel, tuned over (tile, number of warps) in `stages` of its loops; the first tile alone in the interpreter.

    Tried are the tiles that `fitting_tiles` leaves; one alone is not asked.
    """

    def decorate(kernel: Any) -> Any:
        def fitting(configs: list[triton.Config], given: Mapping[str, Any], **call: Any) -> list[triton.Config]:
            sizes = {name: value for name, value in call.items() if name not in ("grid", "warmup")}
            return fitting_tiles(kernel, configs, given, sizes)

        if IS_INTERPRETED:
            return triton.autotune(configs=[triton.Config(tiles[0][0])], key=key)(kernel)
        configs = [triton.Config(tile, num_warps=warps, num_stages=stages) for tile, warps in tiles]
        return triton.autotune(configs=configs, key=key, prune_configs_by={"early_config_prune": fitting})(kernel)

    return decorate


def fitting_tiles(
    kernel: Any, configs: list[triton.Config], given: Mapping[str, Any], sizes: Mapping[str, Any]
) -> list[triton.Config]:
    """Those whose tile is within TILE_BYTES and whose kernel, compiled for the device, fits its shared memory.

    Of these the ones that spill no register; where each does, the one that spills least.

    Raises:
        RuntimeError: each wants more shared memory than a block may have.
    """
    dtype = next(value.dtype for value in given.values() if isinstance(value, torch.Tensor))
    limit, wanted, spills = shared_memory_bytes(), [], {}
    for config in configs:
        tile = {**sizes, **config.kwargs}
        if tile.get("BLOCK_N", 1) * tile.get("BLOCK_O", 1) * dtype.itemsize > TILE_BYTES:
            continue
        compiled = kernel.warmup(*given.values(), grid=(1,), **sizes, **config.all_kwargs())
        wanted.append(compiled.metadata.shared)
        if wanted[-1] <= limit:
            compiled._init_handles()  # as Triton's own tutorials do to read what follows
            spills[config] = compiled.n_spills
    if not spills:
        raise RuntimeError(
            f"Triton's kernel {kernel.__name__} wants {min(wanted):,} bytes of shared memory in {dtype} at the sizes "
            f"{dict(sizes)}, and a block of this device has {limit:,}: take smaller ranks, bfloat16, or the torch "
            'forms, `use_kernels("torch")`.'
        )
    return [config for config, count in spills.items() if not count] or [min(spills, key=spills.__getitem__)]


def shared_memory_bytes() -> int:
    """What a block may have on the current device."""
    driver = triton.runtime.driver.active
    return int(driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"])


def padded(size: int, most: int | None = None) -> int:
    """The power of two >= max(size, 16), at most `most`."""
    power = max(16, 1 << (size - 1).bit_length())
    return power if most is None else min(power, most)


def product_block(size: int, dtype: torch.dtype, most: int = 64) -> int:
    """How much of an inner axis of `size` one product takes, at most `most`; 16 in float32."""
    return padded(size, 16 if dtype is torch.float32 else most)


def rows_key(rows: int) -> int:
    """`rows` up to the next power of two: a kernel is not tuned anew for every length."""
    return min(MOST_ROWS_IN_KEY, 1 << max(0, rows - 1).bit_length())


def tile_grid(rows: int, channels: int) -> Grid:
    """The grid with a program for each tile of a (rows, channels) result."""
    return lambda meta: (triton.cdiv(rows, meta["BLOCK_N"]), triton.cdiv(channels, meta["BLOCK_O"]))


def update_gradients(
    grad: torch.Tensor, b_t: torch.Tensor, scaling: float
) -> torch.Tensor:  # one product over the whole of `grad`: cuBLAS's
    """d low (N, R) of y' = y + s low B^T, from d y' (N, out) and B^T (R, out)."""
    return torch.mm(grad, b_t.t()).mul_(scaling)


@triton.jit
def dot(a, b):
    """a b in float32; `ieee`: float32 inputs are not rounded to TF32.

    Triton's interpreter multiplies the bits of bfloat16, not its numbers; in float32 the same products are exact.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """`value`, float32, to the nearest number of `dtype`, ties to even.

    Triton's interpreter cuts to bfloat16 instead; there the bits are rounded before it does.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def load_tile(pointer, i, j, stride_i, stride_j, size_i, size_j):
    """pointer[i, j], 0 outside (size_i, size_j)."""
    inside = (i < size_i)[:, None] & (j < size_j)[None, :]
    return tl.load(pointer + i.to(tl.int64)[:, None] * stride_i + j[None, :] * stride_j, mask=inside, other=0.0)


@triton.jit
def store_tile(pointer, value, i, j, stride_i, stride_j, size_i, size_j):
    """pointer[i, j] = value in the dtype of the pointer, inside (size_i, size_j); `value` is float32."""
    inside = (i < size_i)[:, None] & (j < size_j)[None, :]
    address = pointer + i.to(tl.int64)[:, None] * stride_i + j[None, :] * stride_j
    tl.store(address, rounded(value, pointer.dtype.element_ty), mask=inside)


@tuned(*UPDATE_TILES, key=["ROWS_KEY", "OUT", "R"])
@triton.jit
def _update(
    y, low, b_t, out, scaling, N, ROWS_KEY,
    stride_y0, stride_y1, stride_l0, stride_l1, stride_b0, stride_b1,
    OUT: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        left = load_tile(low, rows, ranks, stride_l0, stride_l1, N, R)
        total += dot(left, load_tile(b_t, ranks, channels, stride_b0, stride_b1, R, OUT))
    before = load_tile(y, rows, channels, stride_y0, stride_y1, N, OUT).to(tl.float32)
    store_tile(out, before + scaling * total, rows, channels, OUT, 1, N, OUT)


def low_rank_update(y: torch.Tensor, low: torch.Tensor, b_t: torch.Tensor, scaling: float) -> torch.Tensor:
    """y + s low B^T (N, out), from y (N, out), low (N, R) and B^T (R, out): y is read once and y' written once."""
    (rows, channels), rank = y.shape, low.shape[1]
    out = y.new_empty(rows, channels)
    if out.numel():
        _update[tile_grid(rows, channels)](
            y, low, b_t, out, scaling, rows, rows_key(rows), *y.stride(), *low.stride(), *b_t.stride(),
            OUT=channels, R=rank, BLOCK_R=product_block(rank, y.dtype),
        )  # fmt: skip
    return out
