r"""Triton form of the modulation:  y' = y (1 + c_g G^T) + (c_b rho) T^T,  rho = rms(y) of the token, or 1.

c (N, units), c_g and c_b its first columns; G^T (gamma_dim, out), T^T (beta_dim, out); either may be absent. Forward:
one kernel gives rho, (N,), one a tile of y' a program; gamma and beta, (N, out), are never written. Backward, gamma
computed again, with dy' =: e:

    P = (e * y) G    Q = e T    dc_g = P    dc_b = rho Q    dy = e (1 + gamma) + y (c_b . Q) / (out rho)
    dG^T = c_g^T (e * y)    dT^T = (rho c_b)^T e

One kernel sums P and Q over the channels, one makes dc and the factor of y in dy of them, one gives dy and the sums of
dG^T and dT^T: y and e are read twice; rho, (N,), is kept. A program sums a fixed run of rows or channels and the
partial sums are added in a fixed order. The dtype rounding of rho, gamma and beta that the torch form has does not take
place. The FLOPs are counted as those of the torch form, which keeps gamma.
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

CHUNKS = 16  # of rows, whose gradients of G and T are summed apart
BLOCK_N = 16  # rows of a tile of the backward kernels: their blocks are fixed, and with them the order of every sum
PROGRAMS = 128  # wanted of the sums over channels, which are split to have them


def _channel_block(dtype: torch.dtype) -> int:
    """Channels of a tile of the backward kernels."""
    return 32 if IS_INTERPRETED or dtype is torch.float32 else 64


@triton.jit
def _row_rms(y, rms, stride_y0, stride_y1, OUT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, OUT, BLOCK):
        channels = start + tl.arange(0, BLOCK)
        value = tl.load(y + row * stride_y0 + channels * stride_y1, mask=channels < OUT, other=0.0).to(tl.float32)
        total += value * value
    tl.store(rms + row, tl.sqrt(tl.sum(total, axis=0) / OUT))


@triton.jit
def _scaled_units(c, rms, rows, units, stride_c0, stride_c1, N, U, HAS_RMS: tl.constexpr):
    """c rho, (rows, units), in the dtype of c."""
    value = load_tile(c, rows, units, stride_c0, stride_c1, N, U)
    if HAS_RMS:
        rho = tl.load(rms + rows, mask=rows < N, other=0.0)
        value = rounded(value.to(tl.float32) * rho[:, None], value.dtype)
    return value


@triton.jit
def _gamma(
    c, gamma_t, rows, channels, stride_c0, stride_c1, stride_g0, stride_g1, N, OUT,
    GAMMA: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """gamma at rows x channels, float32; 0 where there is none."""
    gamma = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for start in range(0, GAMMA, BLOCK_U):
        units = start + tl.arange(0, BLOCK_U)
        left = load_tile(c, rows, units, stride_c0, stride_c1, N, GAMMA)
        gamma += dot(left, load_tile(gamma_t, units, channels, stride_g0, stride_g1, GAMMA, OUT))
    return gamma


@tuned(*UPDATE_TILES, key=["ROWS_KEY", "OUT", "U"])
@triton.jit
def _modulate(
    y, c, gamma_t, beta_t, rms, out, N, ROWS_KEY, stride_y0, stride_y1, stride_c0, stride_c1,
    stride_g0, stride_g1, stride_b0, stride_b1,
    OUT: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, HAS_RMS: tl.constexpr, U: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    gamma = _gamma(c, gamma_t, rows, channels, stride_c0, stride_c1, stride_g0, stride_g1, N, OUT, GAMMA,
                   BLOCK_U, BLOCK_N, BLOCK_O)  # fmt: skip
    after = load_tile(y, rows, channels, stride_y0, stride_y1, N, OUT).to(tl.float32) * (1.0 + gamma)
    for start in range(0, BETA, BLOCK_U):
        units = start + tl.arange(0, BLOCK_U)
        left = _scaled_units(c, rms, rows, units, stride_c0, stride_c1, N, BETA, HAS_RMS)
        after += dot(left, load_tile(beta_t, units, channels, stride_b0, stride_b1, BETA, OUT))
    store_tile(out, after, rows, channels, OUT, 1, N, OUT)


@tuned(({}, 2), ({}, 4), key=["OUT", "U"])
@triton.jit
def _unit_sums(
    grad, y, gamma_t, beta_t, partial, N, SPLIT, stride_e0, stride_e1, stride_y0, stride_y1,
    stride_g0, stride_g1, stride_b0, stride_b1,
    OUT: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, U: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """partial[2 s] and partial[2 s + 1] (N, U): P and Q over the channels of split s; axis 2 of the grid: of units."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    units = tl.program_id(2) * BLOCK_U + tl.arange(0, BLOCK_U)
    p = tl.zeros((BLOCK_N, BLOCK_U), dtype=tl.float32)
    q = tl.zeros((BLOCK_N, BLOCK_U), dtype=tl.float32)
    for start in range(split * SPLIT, tl.minimum(OUT, (split + 1) * SPLIT), BLOCK_O):
        channels = start + tl.arange(0, BLOCK_O)
        e = load_tile(grad, rows, channels, stride_e0, stride_e1, N, OUT)
        if GAMMA > 0:
            value = load_tile(y, rows, channels, stride_y0, stride_y1, N, OUT)
            product = rounded(e.to(tl.float32) * value.to(tl.float32), e.dtype)
            p += dot(product, load_tile(gamma_t, channels, units, stride_g1, stride_g0, OUT, GAMMA))
        if BETA > 0:
            q += dot(e, load_tile(beta_t, channels, units, stride_b1, stride_b0, OUT, BETA))
    plane = partial + split.to(tl.int64) * 2 * N * U
    store_tile(plane, p, rows, units, U, 1, N, U)
    store_tile(plane + N * U, q, rows, units, U, 1, N, U)


@triton.jit
def _unit_gradients(
    partial, c, rms, grad_c, factor, N, SPLITS, stride_c0, stride_c1,
    OUT: tl.constexpr, U: tl.constexpr, BETA: tl.constexpr, HAS_RMS: tl.constexpr, PADDED_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dc, and factor (N,) = (c_b . Q) / (out rho), 0 where rho is."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.arange(0, PADDED_U)
    p = tl.zeros((BLOCK_N, PADDED_U), dtype=tl.float32)
    q = tl.zeros((BLOCK_N, PADDED_U), dtype=tl.float32)
    plane = partial
    for _ in range(SPLITS):
        p += load_tile(plane, rows, units, U, 1, N, U)
        q += load_tile(plane + N * U, rows, units, U, 1, N, U)
        plane += 2 * N * U
    if HAS_RMS:
        rho = tl.load(rms + rows, mask=rows < N, other=0.0)
        value = load_tile(c, rows, units, stride_c0, stride_c1, N, BETA).to(tl.float32)
        slope = tl.sum(value * q, axis=1)
        tl.store(factor + rows, tl.where(rho > 0, slope / tl.where(rho > 0, rho * OUT, 1.0), 0.0), mask=rows < N)
        q *= rho[:, None]
    store_tile(grad_c, p + q, rows, units, U, 1, N, U)


@tuned(({}, 4), key=["OUT", "U"], stages=1)
@triton.jit
def _modulate_backward(
    grad, y, c, gamma_t, rms, factor, grad_y, partial, N, CHUNK, stride_e0, stride_e1, stride_y0, stride_y1,
    stride_c0, stride_c1, stride_g0, stride_g1,
    OUT: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, HAS_RMS: tl.constexpr, U: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dy, and partial[c] (GAMMA + BETA, out): dG^T above dT^T, over the rows of chunk c; axis 2 of the grid: of units,
    whose first block gives dy."""
    chunk = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    units = tl.program_id(2) * BLOCK_U + tl.arange(0, BLOCK_U)
    sum_g = tl.zeros((BLOCK_U, BLOCK_O), dtype=tl.float32)
    sum_t = tl.zeros((BLOCK_U, BLOCK_O), dtype=tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(N, (chunk + 1) * CHUNK), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        stored = load_tile(grad, rows, channels, stride_e0, stride_e1, N, OUT)
        e = stored.to(tl.float32)
        value = load_tile(y, rows, channels, stride_y0, stride_y1, N, OUT).to(tl.float32)
        if GAMMA > 0:
            left = load_tile(c, rows, units, stride_c0, stride_c1, N, GAMMA)
            sum_g += dot(tl.trans(left), rounded(e * value, stored.dtype))
        if BETA > 0:
            left = _scaled_units(c, rms, rows, units, stride_c0, stride_c1, N, BETA, HAS_RMS)
            sum_t += dot(tl.trans(left), stored)
        if tl.program_id(2) == 0:
            gamma = _gamma(c, gamma_t, rows, channels, stride_c0, stride_c1, stride_g0, stride_g1, N, OUT, GAMMA,
                           BLOCK_U, BLOCK_N, BLOCK_O)  # fmt: skip
            result = e * (1.0 + gamma)
            if HAS_RMS:
                result += value * tl.load(factor + rows, mask=rows < N, other=0.0)[:, None]
            store_tile(grad_y, result, rows, channels, OUT, 1, N, OUT)
    plane = partial + chunk.to(tl.int64) * (GAMMA + BETA) * OUT
    if GAMMA > 0:
        store_tile(plane, sum_g, units, channels, OUT, 1, GAMMA, OUT)
    if BETA > 0:
        store_tile(plane + GAMMA * OUT, sum_t, units, channels, OUT, 1, BETA, OUT)


def _sizes(
    y: torch.Tensor, c: torch.Tensor, gamma_t: torch.Tensor | None, beta_t: torch.Tensor | None, is_rms: bool
) -> dict[str, int]:
    return {
        "OUT": y.shape[1], "GAMMA": 0 if gamma_t is None else gamma_t.shape[0],
        "BETA": 0 if beta_t is None else beta_t.shape[0], "HAS_RMS": is_rms and beta_t is not None,
        "U": c.shape[1], "BLOCK_U": product_block(c.shape[1], y.dtype, 32),
    }  # fmt: skip


@torch.library.custom_op(
    "bem_peft::film_update",
    mutates_args=(),
    schema="(Tensor y, Tensor c, Tensor? gamma_t, Tensor? beta_t, bool is_rms) -> (Tensor, Tensor)",
)
def _update(
    y: torch.Tensor, c: torch.Tensor, gamma_t: torch.Tensor | None, beta_t: torch.Tensor | None, is_rms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y', and rho (N,), float32, which is not filled in where none is wanted."""
    out, rms = y.new_empty(y.shape), y.new_empty(y.shape[0], dtype=torch.float32)
    if out.numel():
        sizes = _sizes(y, c, gamma_t, beta_t, is_rms)
        if sizes["HAS_RMS"]:
            _row_rms[(y.shape[0],)](y, rms, *y.stride(), OUT=y.shape[1], BLOCK=padded(y.shape[1], 1024))
        wide = [c if t is None else t for t in (gamma_t, beta_t)]  # one that is absent is not read
        _modulate[tile_grid(*y.shape)](
            y, c, *wide, rms, out, y.shape[0], rows_key(y.shape[0]),
            *y.stride(), *c.stride(), *wide[0].stride(), *wide[1].stride(), **sizes,
        )  # fmt: skip
    return out, rms


@_update.register_fake
def _(
    y: torch.Tensor, c: torch.Tensor, gamma_t: torch.Tensor | None, beta_t: torch.Tensor | None, is_rms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "bem_peft::film_update_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor y, Tensor c, Tensor? gamma_t, Tensor? beta_t, Tensor rms, bool is_rms, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    c: torch.Tensor,
    gamma_t: torch.Tensor | None,
    beta_t: torch.Tensor | None,
    rms: torch.Tensor,
    is_rms: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, dc, dgamma_t and dbeta_t; an absent one is empty, and dc where it is not needed."""
    rows, channels = y.shape
    sizes = _sizes(y, c, gamma_t, beta_t, is_rms)
    gamma_dim, beta_dim, has_rms, units = sizes["GAMMA"], sizes["BETA"], bool(sizes["HAS_RMS"]), sizes["U"]
    block_o, unit_blocks = _channel_block(y.dtype), triton.cdiv(units, sizes["BLOCK_U"])
    grad_y, grad_c = y.new_empty(y.shape), c.new_empty(c.shape)
    partial = y.new_zeros(CHUNKS if rows else 1, gamma_dim + beta_dim, channels, dtype=torch.float32)
    if rows:
        wide = [c if t is None else t for t in (gamma_t, beta_t)]
        factor = rms.new_empty(rows if has_rms else 0, dtype=torch.float32)
        blocks = triton.cdiv(rows, BLOCK_N)
        if needs[1] or (needs[0] and has_rms):
            splits = max(1, min(PROGRAMS // blocks, triton.cdiv(channels, 2 * block_o)))
            split = triton.cdiv(triton.cdiv(channels, splits), block_o) * block_o
            splits = triton.cdiv(channels, split)
            sums = y.new_empty(splits, 2, rows, units, dtype=torch.float32)
            _unit_sums[(blocks, splits, unit_blocks)](
                grad, y, *wide, sums, rows, split,
                *grad.stride(), *y.stride(), *wide[0].stride(), *wide[1].stride(),
                OUT=channels, GAMMA=gamma_dim, BETA=beta_dim, U=units, BLOCK_U=sizes["BLOCK_U"],
                BLOCK_N=BLOCK_N, BLOCK_O=block_o,
            )  # fmt: skip
            _unit_gradients[(blocks,)](
                sums, c, rms, grad_c, factor, rows, splits, *c.stride(),
                OUT=channels, U=units, BETA=beta_dim, HAS_RMS=has_rms, PADDED_U=padded(units), BLOCK_N=BLOCK_N,
            )  # fmt: skip
        if needs[0] or needs[2] or needs[3]:
            chunk = triton.cdiv(triton.cdiv(rows, CHUNKS), BLOCK_N) * BLOCK_N
            _modulate_backward[(triton.cdiv(rows, chunk), triton.cdiv(channels, block_o), unit_blocks)](
                grad, y, c, wide[0], rms, factor, grad_y, partial, rows, chunk,
                *grad.stride(), *y.stride(), *c.stride(), *wide[0].stride(),
                BLOCK_N=BLOCK_N, BLOCK_O=block_o, **sizes,
            )  # fmt: skip
    weights = partial.sum(0).to(grad.dtype)
    nothing = c.new_empty(0)
    return (
        grad_y,
        grad_c if needs[1] else nothing,
        weights[:gamma_dim].clone() if gamma_dim else nothing.clone(),
        weights[gamma_dim:].clone() if beta_dim else nothing.clone(),
    )


@_backward.register_fake
def _(
    grad: torch.Tensor, y: torch.Tensor, c: torch.Tensor, gamma_t: torch.Tensor | None, beta_t: torch.Tensor | None,
    rms: torch.Tensor, is_rms: bool, needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    weights = [c.new_empty(0) if t is None else t.new_empty(t.shape) for t in (gamma_t, beta_t)]
    return y.new_empty(y.shape), c.new_empty(c.shape if needs[1] else 0), *weights


class _Context(Context, Protocol):
    is_rms: bool


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, bool]


def _setup(ctx: _Context, inputs: Inputs, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.is_rms = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: _Context, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    found = _backward(grad, *ctx.saved_tensors, ctx.is_rms, needs)
    return *(part if need else None for part, need in zip(found, needs, strict=True)), None


_update.register_autograd(_differentiate, setup_context=_setup)
_update.register_vmap(folding_rows(_update, (0, 1)))
_backward.register_vmap(looping(_backward))


@register_flop_formula(torch.ops.bem_peft.film_update)
def _forward_flops(y: Shape, c: Shape, gamma_t: Shape | None, beta_t: Shape | None, *_: object, **__: object) -> int:
    return int(sum(2 * y[0] * y[1] * t[0] for t in (gamma_t, beta_t) if t is not None))


@register_flop_formula(torch.ops.bem_peft.film_update_backward)
def _backward_flops(
    grad: Shape, y: Shape, c: Shape, gamma_t: Shape | None, beta_t: Shape | None, rms: Shape, is_rms: bool,
    needs: Sequence[bool], *_: object, **__: object,
) -> int:  # fmt: skip
    needs_y, needs_c, needs_gamma, needs_beta = needs
    products = 0 if gamma_t is None else gamma_t[0] * (needs_c + needs_gamma)
    if beta_t is not None:
        products += beta_t[0] * ((needs_c or (needs_y and is_rms)) + needs_beta)
    return int(2 * y[0] * y[1] * products)


def film_update(
    y: torch.Tensor, c: torch.Tensor, gamma_t: torch.Tensor | None, beta_t: torch.Tensor | None, is_rms: bool
) -> torch.Tensor:
    """As `bem_peft.kernels.film.film_update`."""
    out: torch.Tensor = _update(y, c, gamma_t, beta_t, is_rms)[0]
    return out
