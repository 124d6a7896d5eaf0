r"""Triton form of the Kronecker update:  y' = y + s z B^T,  z = vec(U X V^T),  X = x reshaped (u_dim, v_dim).

Two kernels forward: z, a token a program, Z = sum over blocks of U_b (X_b V^T), and y + s z B^T by tiles; x and y are
read once, y' is written once. Backward, with dZ = s dy' B (N, u_rank, v_rank):

    dX = U^T dZ V    dU = sum_n dZ_n (X_n V^T)^T    dV = sum_n dZ_n^T (U X_n)    dB^T = s z^T dy'

dU and dV are one kernel, called with the axes of X in either order: each program sums a fixed run of tokens, the
partial sums are added afterwards, and no addition depends on timing. The two products over the whole of dy' (dZ and
dB) are plain matrix products and are left to `torch.mm`. z is kept for the backward pass, (N, R). The FLOPs are
counted as those of the torch form, which multiplies by U first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from bem_peft.kernels.triton_tiles import (
    IS_INTERPRETED,
    Context,
    Shape,
    Tile,
    dot,
    load_tile,
    low_rank_update,
    padded,
    rounded,
    store_tile,
    tuned,
    update_gradients,
)
from bem_peft.kernels.vmap_rows import folding_rows, looping

MOST_CHUNKS = 128  # of tokens, whose gradients of U and V are summed apart
WARPS: tuple[Tile, ...] = (({}, 4), ({}, 8))  # the blocks are fixed, and with them the order of every sum


@tuned(*WARPS, key=["P", "Q", "PR", "QR"])
@triton.jit
def _project(
    x, u, v, z, stride_x0, stride_x1, stride_u0, stride_u1, stride_v0, stride_v1,
    P: tl.constexpr, Q: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr,
    PADDED_PR: tl.constexpr, PADDED_QR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, PADDED_PR), tl.arange(0, PADDED_QR)
    total = tl.zeros((PADDED_PR, PADDED_QR), dtype=tl.float32)
    for start_p in range(0, P, BLOCK_P):
        p = start_p + tl.arange(0, BLOCK_P)
        right = tl.zeros((BLOCK_P, PADDED_QR), dtype=tl.float32)
        for start_q in range(0, Q, BLOCK_Q):
            q = start_q + tl.arange(0, BLOCK_Q)
            tile = load_tile(x + token * stride_x0, p, q, Q * stride_x1, stride_x1, P, Q)
            right += dot(tile, load_tile(v, q, j, stride_v1, stride_v0, Q, QR))
        total += dot(load_tile(u, i, p, stride_u0, stride_u1, PR, P), rounded(right, u.dtype.element_ty))
    store_tile(z + token * (PR * QR), total, i, j, QR, 1, PR, QR)


@tuned(*WARPS, key=["P", "Q", "PR", "QR"])
@triton.jit
def _input_gradient(
    grad_z, u, v, grad_x, stride_g0, stride_g1, stride_u0, stride_u1, stride_v0, stride_v1,
    P: tl.constexpr, Q: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr,
    PADDED_PR: tl.constexpr, PADDED_QR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, PADDED_PR), tl.arange(0, PADDED_QR)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    middle = load_tile(grad_z + token * stride_g0, i, j, QR * stride_g1, stride_g1, PR, QR)
    left = rounded(dot(load_tile(u, p, i, stride_u1, stride_u0, P, PR), middle), u.dtype.element_ty)
    for start_q in range(0, Q, BLOCK_Q):
        q = start_q + tl.arange(0, BLOCK_Q)
        tile = dot(left, load_tile(v, j, q, stride_v0, stride_v1, QR, Q))
        store_tile(grad_x + token * (P * Q), tile, p, q, Q, 1, P, Q)


@tuned(*WARPS, key=["P", "Q", "PR", "QR"])
@triton.jit
def _factor_gradient(
    x, grad_z, other, partial, N, CHUNK,
    stride_x0, stride_xp, stride_xq, stride_g0, stride_gp, stride_gq, stride_o0, stride_o1,
    P: tl.constexpr, Q: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr,
    PADDED_PR: tl.constexpr, PADDED_QR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """partial[c, i, p] = sum over the tokens of chunk c of sum_j dz[i, j] sum_q x[p, q] other[j, q]."""
    chunk = tl.program_id(0)
    i, j = tl.arange(0, PADDED_PR), tl.arange(0, PADDED_QR)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros((PADDED_PR, BLOCK_P), dtype=tl.float32)
    first = chunk.to(tl.int64) * CHUNK
    x_row, g_row = x + first * stride_x0, grad_z + first * stride_g0
    for _ in range(chunk * CHUNK, tl.minimum(N, (chunk + 1) * CHUNK)):
        right = tl.zeros((BLOCK_P, PADDED_QR), dtype=tl.float32)
        for start_q in range(0, Q, BLOCK_Q):
            q = start_q + tl.arange(0, BLOCK_Q)
            tile = load_tile(x_row, p, q, stride_xp, stride_xq, P, Q)
            right += dot(tile, load_tile(other, q, j, stride_o1, stride_o0, Q, QR))
        middle = load_tile(g_row, i, j, stride_gp, stride_gq, PR, QR)
        total += dot(middle, rounded(tl.trans(right), middle.dtype))
        x_row += stride_x0
        g_row += stride_g0
    store_tile(partial + chunk * (PR * P), total, i, p, P, 1, PR, P)


def _sizes(p: int, q: int, p_rank: int, q_rank: int, dtype: torch.dtype) -> dict[str, int]:
    block = 16 if IS_INTERPRETED else 32 if dtype is torch.float32 else 64  # of u_dim and v_dim
    return {
        "P": p, "Q": q, "PR": p_rank, "QR": q_rank, "PADDED_PR": padded(p_rank), "PADDED_QR": padded(q_rank),
        "BLOCK_P": padded(p, block), "BLOCK_Q": padded(q, block),
    }  # fmt: skip


def _factor(
    x: torch.Tensor, grad_z: torch.Tensor, factor: torch.Tensor, other: torch.Tensor, is_second: bool
) -> torch.Tensor:
    """d factor, of the axis of X that `factor` projects; `is_second`: that axis is the second."""
    rows, (p_rank, p), (q_rank, q) = x.shape[0], factor.shape, other.shape
    x_strides = (x.stride(1), p * x.stride(1)) if is_second else (q * x.stride(1), x.stride(1))
    g_strides = (
        (grad_z.stride(1), p_rank * grad_z.stride(1)) if is_second else (q_rank * grad_z.stride(1), grad_z.stride(1))
    )
    chunk = triton.cdiv(rows, MOST_CHUNKS)
    chunks = triton.cdiv(rows, chunk)
    partial = x.new_empty(chunks, p_rank, p, dtype=torch.float32)
    sizes = _sizes(p, q, p_rank, q_rank, x.dtype)
    _factor_gradient[(chunks, triton.cdiv(p, sizes["BLOCK_P"]))](
        x, grad_z, other, partial, rows, chunk, x.stride(0), *x_strides, grad_z.stride(0), *g_strides, *other.stride(),
        **sizes,
    )  # fmt: skip
    return partial.sum(0).to(factor.dtype)


@torch.library.custom_op(
    "bem_peft::kronecker_update",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor u, Tensor v, Tensor b_t, float scaling) -> (Tensor, Tensor)",
)
def _update(
    x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, b_t: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y' and z."""
    z = x.new_empty(x.shape[0], b_t.shape[0])
    if x.shape[0]:
        sizes = _sizes(u.shape[1], v.shape[1], u.shape[0], v.shape[0], x.dtype)
        _project[(x.shape[0],)](x, u, v, z, *x.stride(), *u.stride(), *v.stride(), **sizes)
    return low_rank_update(y, z, b_t, scaling), z


@_update.register_fake
def _(
    x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, b_t: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), x.new_empty(x.shape[0], b_t.shape[0])


@torch.library.custom_op(
    "bem_peft::kronecker_update_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor z, Tensor u, Tensor v, Tensor b_t, float scaling, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    b_t: torch.Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, du, dv, db_t; what is not needed is empty."""
    needs_x, needs_u, needs_v, needs_b = needs
    empty = [grad.new_empty(0) for _ in range(4)]
    grad_x, grad_u, grad_v, grad_b = empty
    if not x.shape[0]:
        zeros = [t.new_zeros(t.shape) if need else e for t, need, e in zip((x, u, v, b_t), needs, empty, strict=True)]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    if needs_x or needs_u or needs_v:
        grad_z = update_gradients(grad, b_t, scaling)
        if needs_x:
            grad_x = x.new_empty(x.shape)
            sizes = _sizes(u.shape[1], v.shape[1], u.shape[0], v.shape[0], x.dtype)
            _input_gradient[(x.shape[0], triton.cdiv(u.shape[1], sizes["BLOCK_P"]))](
                grad_z, u, v, grad_x, *grad_z.stride(), *u.stride(), *v.stride(), **sizes
            )
        if needs_u:
            grad_u = _factor(x, grad_z, u, v, False)
        if needs_v:
            grad_v = _factor(x, grad_z, v, u, True)
    if needs_b:
        grad_b = torch.mm(z.t(), grad).mul_(scaling)
    return grad_x, grad_u, grad_v, grad_b


@_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, z: torch.Tensor, u: torch.Tensor, v: torch.Tensor, b_t: torch.Tensor,
    scaling: float, needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, u, v, b_t), needs, strict=True))


class _Context(Context, Protocol):
    scaling: float


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]


def _setup(ctx: _Context, inputs: Inputs, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _, u, v, b_t, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], u, v, b_t)


def _differentiate(ctx: _Context, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    grads: list[torch.Tensor | None] = [None] * 4
    if any(needs):
        found = _backward(grad, *ctx.saved_tensors, ctx.scaling, needs)
        grads = [part if need else None for part, need in zip(found, needs, strict=True)]
    return grads[0], grad, *grads[1:], None


_update.register_autograd(_differentiate, setup_context=_setup)
_update.register_vmap(folding_rows(_update, (0, 1)))
_backward.register_vmap(looping(_backward))


@register_flop_formula(torch.ops.bem_peft.kronecker_update)
def _forward_flops(x: Shape, y: Shape, u: Shape, v: Shape, b_t: Shape, *_: object, **__: object) -> int:
    (u_rank, u_dim), (v_rank, v_dim) = u, v
    return 2 * x[0] * (u_rank * u_dim * v_dim + u_rank * v_dim * v_rank + b_t[0] * b_t[1])


@register_flop_formula(torch.ops.bem_peft.kronecker_update_backward)
def _backward_flops(
    grad: Shape, x: Shape, z: Shape, u: Shape, v: Shape, b_t: Shape, scaling: float, needs: Sequence[bool],
    *_: object, **__: object,
) -> int:  # fmt: skip
    (u_rank, u_dim), (v_rank, v_dim) = u, v
    needs_x, needs_u, needs_v, needs_b = needs
    wide, by_u, by_v = b_t[0] * b_t[1], u_rank * u_dim * v_dim, u_rank * v_dim * v_rank
    projected = needs_x or needs_u or needs_v
    return int(
        2 * x[0] * (wide * (projected + needs_b) + by_v * ((needs_x or needs_u) + needs_v) + by_u * (needs_x + needs_u))
    )


def kronecker_update(
    x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, b_t: torch.Tensor, scaling: float
) -> torch.Tensor:
    """As `bem_peft.kernels.kronecker.kronecker_update`."""
    out: torch.Tensor = _update(x, y, u, v, b_t, scaling)[0]
    return out
