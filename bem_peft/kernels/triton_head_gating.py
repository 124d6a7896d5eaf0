r"""Triton form of the gated update:  y' = y + s sum_g gate_g B_g low_g,  low (N, G, r), gate (N, G).

Forward: one kernel, a tile of y' a program; low and its gates are read and multiplied on the way to B^T, y is read once
and y' written once. Backward, with D = dy' B (N, G, r), the product over the whole of dy', left to `torch.mm`:

    dlow = s D * gate    dgate_g = s sum_i D_gi low_gi    dB^T = s (gate * low)^T dy'

One kernel gives dlow, dgate and gate * low; dB^T is `torch.mm`'s. Nothing is kept but the inputs. The gate is not
rounded to the dtype of y, as the torch form rounds it; the groups have one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from bem_peft.kernels.triton_tiles import (
    UPDATE_TILES,
    Context,
    Shape,
    dot,
    load_tile,
    padded,
    product_block,
    rounded,
    rows_key,
    store_tile,
    tile_grid,
    tuned,
)
from bem_peft.kernels.vmap_rows import folding_rows, looping


@triton.jit
def _gated(low, gate, rows, ranks, stride_l0, stride_l1, stride_l2, stride_g0, stride_g1, N, R, WIDTH: tl.constexpr):
    """low * gate at rows x ranks, float32; rank i is number i % WIDTH of group i // WIDTH."""
    inside = (rows < N)[:, None] & (ranks < R)[None, :]
    row, group = rows.to(tl.int64)[:, None], (ranks // WIDTH)[None, :]
    address = low + row * stride_l0 + group * stride_l1 + (ranks % WIDTH)[None, :] * stride_l2
    value = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    return value * tl.load(gate + row * stride_g0 + group * stride_g1, mask=inside, other=0.0).to(tl.float32)


@tuned(*UPDATE_TILES, key=["ROWS_KEY", "OUT", "R"])
@triton.jit
def _gated_update(
    y, low, gate, b_t, out, scaling, N, ROWS_KEY, stride_y0, stride_y1,
    stride_l0, stride_l1, stride_l2, stride_g0, stride_g1, stride_b0, stride_b1,
    OUT: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        left = _gated(low, gate, rows, ranks, stride_l0, stride_l1, stride_l2, stride_g0, stride_g1, N, R, WIDTH)
        right = load_tile(b_t, ranks, channels, stride_b0, stride_b1, R, OUT)
        total += dot(rounded(left, b_t.dtype.element_ty), right)
    before = load_tile(y, rows, channels, stride_y0, stride_y1, N, OUT).to(tl.float32)
    store_tile(out, before + scaling * total, rows, channels, OUT, 1, N, OUT)


@triton.jit
def _gate_gradients(
    grad_rank, low, gate, grad_low, grad_gate, gated, scaling, N,
    stride_l0, stride_l1, stride_l2, stride_g0, stride_g1,
    G: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One group (axis 1 of the grid) of BLOCK_N rows; grad_rank (N, G WIDTH) is contiguous."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    ranks = tl.arange(0, PADDED_WIDTH)
    row = rows.to(tl.int64)
    weight = tl.load(gate + row * stride_g0 + group * stride_g1, mask=rows < N, other=0.0).to(tl.float32)
    value = load_tile(low + group * stride_l1, rows, ranks, stride_l0, stride_l2, N, WIDTH).to(tl.float32)
    grad = load_tile(grad_rank + group * WIDTH, rows, ranks, G * WIDTH, 1, N, WIDTH).to(tl.float32) * scaling
    store_tile(grad_low + group * WIDTH, grad * weight[:, None], rows, ranks, G * WIDTH, 1, N, WIDTH)
    store_tile(gated + group * WIDTH, value * weight[:, None], rows, ranks, G * WIDTH, 1, N, WIDTH)
    total = rounded(tl.sum(grad * value, axis=1), grad_gate.dtype.element_ty)
    tl.store(grad_gate + row * G + group, total, mask=rows < N)


@torch.library.custom_op(
    "bem_peft::gated_update",
    mutates_args=(),
    schema="(Tensor y, Tensor low, Tensor gate, Tensor b_t, float scaling) -> Tensor",
)
def gated_update(
    y: torch.Tensor, low: torch.Tensor, gate: torch.Tensor, b_t: torch.Tensor, scaling: float
) -> torch.Tensor:
    """As `bem_peft.kernels.head_gating.gated_update`."""
    (rows, channels), rank = y.shape, b_t.shape[0]
    out = y.new_empty(rows, channels)
    if out.numel():
        _gated_update[tile_grid(rows, channels)](
            y, low, gate, b_t, out, scaling, rows, rows_key(rows),
            *y.stride(), *low.stride(), *gate.stride(), *b_t.stride(),
            OUT=channels, R=rank, WIDTH=low.shape[2], BLOCK_R=product_block(rank, y.dtype),
        )  # fmt: skip
    return out


@gated_update.register_fake
def _(y: torch.Tensor, low: torch.Tensor, gate: torch.Tensor, b_t: torch.Tensor, scaling: float) -> torch.Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op(
    "bem_peft::gated_update_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor low, Tensor gate, Tensor b_t, float scaling, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: torch.Tensor,
    low: torch.Tensor,
    gate: torch.Tensor,
    b_t: torch.Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dlow and dgate where `needs[0]`, db_t where `needs[1]`; what is not needed is empty."""
    rows, groups, width = low.shape
    if needs[0]:
        grad_rank = torch.mm(grad, b_t.t())
    else:  # gate * low alone is wanted
        grad_rank = grad.new_zeros(rows, groups * width)
    grad_low, grad_gate, gated = low.new_empty(low.shape), gate.new_empty(gate.shape), torch.empty_like(grad_rank)
    if rows:
        block = 32
        _gate_gradients[(triton.cdiv(rows, block), groups)](
            grad_rank, low, gate, grad_low, grad_gate, gated, scaling, rows, *low.stride(), *gate.stride(),
            G=groups, WIDTH=width, PADDED_WIDTH=padded(width), BLOCK_N=block,
        )  # fmt: skip
    nothing = grad.new_empty(0)
    grad_b = torch.mm(gated.t(), grad).mul_(scaling) if needs[1] else nothing
    return (grad_low, grad_gate, grad_b) if needs[0] else (nothing, gate.new_empty(0), grad_b)


@_backward.register_fake
def _(
    grad: torch.Tensor, low: torch.Tensor, gate: torch.Tensor, b_t: torch.Tensor, scaling: float, needs: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    wanted = (needs[0], needs[0], needs[1])
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((low, gate, b_t), wanted, strict=True))


class _Context(Context, Protocol):
    scaling: float


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]


def _setup(ctx: _Context, inputs: Inputs, output: torch.Tensor) -> None:
    _, low, gate, b_t, ctx.scaling = inputs
    ctx.save_for_backward(low, gate, b_t)


def _differentiate(ctx: _Context, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    _, low, gate, b_t, _ = ctx.needs_input_grad
    if not (low or gate or b_t):
        return grad, None, None, None, None
    grads = _backward(grad, *ctx.saved_tensors, ctx.scaling, [low or gate, b_t])
    return grad, grads[0] if low else None, grads[1] if gate else None, grads[2] if b_t else None, None


gated_update.register_autograd(_differentiate, setup_context=_setup)
gated_update.register_vmap(folding_rows(gated_update, (0, 1, 2)))
_backward.register_vmap(looping(_backward))


@register_flop_formula(torch.ops.bem_peft.gated_update)
def _forward_flops(y: Shape, low: Shape, gate: Shape, b_t: Shape, *_: object, **__: object) -> int:
    return int(2 * y[0] * b_t[0] * b_t[1])


@register_flop_formula(torch.ops.bem_peft.gated_update_backward)
def _backward_flops(
    grad: Shape, low: Shape, gate: Shape, b_t: Shape, scaling: float, needs: Sequence[bool], *_: object, **__: object
) -> int:
    return int(2 * grad[0] * b_t[0] * b_t[1] * sum(needs))
