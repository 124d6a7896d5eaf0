r"""Triton form of the modulation:  y' = y (1 + c_g G^T) + (c_b rho) T^T,  c = tanh(u / r + b).

rho = rms(y) of the token, or 1; r = max(rms(y), 1e-6), or 1. u (N, units), c_g and c_b the first columns of c; G^T
(gamma_dim, out), T^T (beta_dim, out); either may be absent. Forward: one kernel gives rms(y), (N,), and c, one a tile
of y' a program; gamma and beta, (N, out), are never written. Backward, gamma computed again, with dy' =: e:

    P = (e * y) G    Q = e T    dc = P + rho Q    db = dc (1 - c^2)    du = db / r
    dy = e (1 + gamma) + y (c_b . Q - (du . u) / r) / (out rms(y))
    dG^T = c_g^T (e * y)    dT^T = (rho c_b)^T e

One kernel sums P and Q over the channels, one makes du, db and the factor of y in dy of them, one gives dy and the sums
of dG^T and dT^T: y and e are read twice; c and rms(y) are kept. A program sums a fixed run of rows or channels and the
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

SMALLEST_RMS = 1e-6  # that of `kernels.film`
CHUNKS = 16  # of rows, whose gradients of G and T are summed apart
BLOCK_N = 16  # rows of a tile of the backward kernels: their blocks are fixed, and with them the order of every sum
PROGRAMS = 128  # wanted of the sums over channels, which are split to have them


def _channel_block(dtype: torch.dtype) -> int:
    """Channels of a tile of the backward kernels."""
    return 32 if IS_INTERPRETED or dtype is torch.float32 else 64


@triton.jit
def _tanh(x):
    """As exact for small x as for large."""
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    return tl.where(tl.abs(x) < 0.15, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _row_units(
    y, u, bias, rms, c, stride_y0, stride_y1, stride_u0, stride_u1,
    OUT: tl.constexpr, U: tl.constexpr, NEEDS_RMS: tl.constexpr, IS_RELATIVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SMALLEST: tl.constexpr, PADDED_U: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rms(y) and c (U,) of one row."""
    row = tl.program_id(0).to(tl.int64)
    units = tl.arange(0, PADDED_U)
    value = tl.load(u + row * stride_u0 + units * stride_u1, mask=units < U, other=0.0).to(tl.float32)
    if NEEDS_RMS:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, OUT, BLOCK):
            channels = start + tl.arange(0, BLOCK)
            part = tl.load(y + row * stride_y0 + channels * stride_y1, mask=channels < OUT, other=0.0).to(tl.float32)
            total += part * part
        rho = tl.sqrt(tl.sum(total, axis=0) / OUT)
        tl.store(rms + row, rho)
        if IS_RELATIVE:
            value = value / tl.maximum(rho, SMALLEST)
    if HAS_BIAS:
        value += tl.load(bias + units, mask=units < U, other=0.0).to(tl.float32)
    tl.store(c + row * U + units, rounded(_tanh(value), c.dtype.element_ty), mask=units < U)


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
    partial, u, bias, rms, grad_u, grad_sum, factor, N, SPLITS, stride_u0, stride_u1,
    OUT: tl.constexpr, U: tl.constexpr, HAS_RMS: tl.constexpr, IS_RELATIVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SMALLEST: tl.constexpr, PADDED_U: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """du, grad_sum (N, U) = db of each row, and factor (N,) of y in dy, 0 where rms(y) is."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.arange(0, PADDED_U)
    p = tl.zeros((BLOCK_N, PADDED_U), dtype=tl.float32)
    q = tl.zeros((BLOCK_N, PADDED_U), dtype=tl.float32)
    plane = partial
    for _ in range(SPLITS):
        p += load_tile(plane, rows, units, U, 1, N, U)
        q += load_tile(plane + N * U, rows, units, U, 1, N, U)
        plane += 2 * N * U
    given = load_tile(u, rows, units, stride_u0, stride_u1, N, U).to(tl.float32)
    slope = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_RMS or IS_RELATIVE:
        rho = tl.load(rms + rows, mask=rows < N, other=0.0)
    if IS_RELATIVE:
        divisor = tl.maximum(rho, SMALLEST)
        given = given / divisor[:, None]
    value = given
    if HAS_BIAS:
        value += tl.load(bias + units, mask=units < U, other=0.0).to(tl.float32)[None, :]
    value = _tanh(value)  # c, not rounded
    if HAS_RMS:
        slope += tl.sum(value * q, axis=1)
        q *= rho[:, None]
    before = (p + q) * (1.0 - value * value)
    store_tile(grad_sum, before, rows, units, U, 1, N, U)
    if IS_RELATIVE:
        slope -= tl.where(rho > SMALLEST, tl.sum(before * given, axis=1) / divisor, 0.0)
        before = before / divisor[:, None]
    store_tile(grad_u, before, rows, units, U, 1, N, U)
    if HAS_RMS or IS_RELATIVE:
        tl.store(factor + rows, tl.where(rho > 0, slope / tl.where(rho > 0, rho * OUT, 1.0), 0.0), mask=rows < N)


@tuned(({}, 4), key=["OUT", "U"], stages=1)
@triton.jit
def _modulate_backward(
    grad, y, c, gamma_t, rms, factor, grad_y, partial, N, CHUNK, stride_e0, stride_e1, stride_y0, stride_y1,
    stride_c0, stride_c1, stride_g0, stride_g1,
    OUT: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, HAS_RMS: tl.constexpr, HAS_FACTOR: tl.constexpr,
    U: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
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
            if HAS_FACTOR:
                result += value * tl.load(factor + rows, mask=rows < N, other=0.0)[:, None]
            store_tile(grad_y, result, rows, channels, OUT, 1, N, OUT)
    plane = partial + chunk.to(tl.int64) * (GAMMA + BETA) * OUT
    if GAMMA > 0:
        store_tile(plane, sum_g, units, channels, OUT, 1, GAMMA, OUT)
    if BETA > 0:
        store_tile(plane + GAMMA * OUT, sum_t, units, channels, OUT, 1, BETA, OUT)


def _sizes(
    y: torch.Tensor, u: torch.Tensor, gamma_t: torch.Tensor | None, beta_t: torch.Tensor | None, is_rms: bool
) -> dict[str, int]:
    return {
        "OUT": y.shape[1], "GAMMA": 0 if gamma_t is None else gamma_t.shape[0],
        "BETA": 0 if beta_t is None else beta_t.shape[0], "HAS_RMS": is_rms and beta_t is not None,
        "U": u.shape[1], "BLOCK_U": product_block(u.shape[1], y.dtype, 32),
    }  # fmt: skip


@torch.library.custom_op(
    "bem_peft::film_update",
    mutates_args=(),
    schema="(Tensor y, Tensor u, Tensor? bias, Tensor? gamma_t, Tensor? beta_t, bool is_relative, bool is_rms) "
    "-> (Tensor, Tensor, Tensor)",
)
def _update(
    y: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    gamma_t: torch.Tensor | None,
    beta_t: torch.Tensor | None,
    is_relative: bool,
    is_rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y', c (N, units), and rms(y) (N,), float32, which is not filled in where nothing reads it."""
    out, rms = y.new_empty(y.shape), y.new_empty(y.shape[0], dtype=torch.float32)
    c = u.new_empty(u.shape)
    if out.numel():
        sizes = _sizes(y, u, gamma_t, beta_t, is_rms)
        _row_units[(y.shape[0],)](
            y, u, u if bias is None else bias, rms, c, *y.stride(), *u.stride(),
            OUT=y.shape[1], U=u.shape[1], NEEDS_RMS=is_relative or sizes["HAS_RMS"], IS_RELATIVE=is_relative,
            HAS_BIAS=bias is not None, SMALLEST=SMALLEST_RMS, PADDED_U=padded(u.shape[1]),
            BLOCK=padded(y.shape[1], 1024),
        )  # fmt: skip
        wide = [c if t is None else t for t in (gamma_t, beta_t)]  # one that is absent is not read
        _modulate[tile_grid(*y.shape)](
            y, c, *wide, rms, out, y.shape[0], rows_key(y.shape[0]),
            *y.stride(), *c.stride(), *wide[0].stride(), *wide[1].stride(), **sizes,
        )  # fmt: skip
    return out, c, rms


@_update.register_fake
def _(
    y: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None, gamma_t: torch.Tensor | None,
    beta_t: torch.Tensor | None, is_relative: bool, is_rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return y.new_empty(y.shape), u.new_empty(u.shape), y.new_empty(y.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "bem_peft::film_update_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor y, Tensor u, Tensor? bias, Tensor? gamma_t, Tensor? beta_t, Tensor c, Tensor rms, "
    "bool is_relative, bool is_rms, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    gamma_t: torch.Tensor | None,
    beta_t: torch.Tensor | None,
    c: torch.Tensor,
    rms: torch.Tensor,
    is_relative: bool,
    is_rms: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, du, dbias, dgamma_t and dbeta_t; an absent one is empty, and du and dbias where neither is needed."""
    rows, channels = y.shape
    sizes = _sizes(y, u, gamma_t, beta_t, is_rms)
    gamma_dim, beta_dim, has_rms, units = sizes["GAMMA"], sizes["BETA"], bool(sizes["HAS_RMS"]), sizes["U"]
    has_factor, needs_units = has_rms or is_relative, needs[1] or needs[2]
    block_o, unit_blocks = _channel_block(y.dtype), triton.cdiv(units, sizes["BLOCK_U"])
    grad_y, grad_u = y.new_empty(y.shape), u.new_empty(u.shape)
    grad_sum = u.new_zeros(u.shape, dtype=torch.float32)
    partial = y.new_zeros(CHUNKS if rows else 1, gamma_dim + beta_dim, channels, dtype=torch.float32)
    if rows:
        wide = [c if t is None else t for t in (gamma_t, beta_t)]
        factor = rms.new_empty(rows if has_factor else 0, dtype=torch.float32)
        blocks = triton.cdiv(rows, BLOCK_N)
        if needs_units or (needs[0] and has_factor):
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
                sums, u, u if bias is None else bias, rms, grad_u, grad_sum, factor, rows, splits, *u.stride(),
                OUT=channels, U=units, HAS_RMS=has_rms, IS_RELATIVE=is_relative, HAS_BIAS=bias is not None,
                SMALLEST=SMALLEST_RMS, PADDED_U=padded(units), BLOCK_N=BLOCK_N,
            )  # fmt: skip
        if needs[0] or needs[3] or needs[4]:
            chunk = triton.cdiv(triton.cdiv(rows, CHUNKS), BLOCK_N) * BLOCK_N
            _modulate_backward[(triton.cdiv(rows, chunk), triton.cdiv(channels, block_o), unit_blocks)](
                grad, y, c, wide[0], rms, factor, grad_y, partial, rows, chunk,
                *grad.stride(), *y.stride(), *c.stride(), *wide[0].stride(),
                HAS_FACTOR=has_factor, BLOCK_N=BLOCK_N, BLOCK_O=block_o, **sizes,
            )  # fmt: skip
    weights = partial.sum(0).to(grad.dtype)
    nothing = u.new_empty(0)
    return (
        grad_y,
        grad_u if needs_units else nothing,
        nothing.clone() if bias is None or not needs_units else grad_sum.sum(0).to(bias.dtype),
        weights[:gamma_dim].clone() if gamma_dim else nothing.clone(),
        weights[gamma_dim:].clone() if beta_dim else nothing.clone(),
    )


@_backward.register_fake
def _(
    grad: torch.Tensor, y: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None, gamma_t: torch.Tensor | None,
    beta_t: torch.Tensor | None, c: torch.Tensor, rms: torch.Tensor, is_relative: bool, is_rms: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    needs_units = needs[1] or needs[2]
    weights = [u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (gamma_t, beta_t)]
    of_bias = u.new_empty(0) if bias is None or not needs_units else bias.new_empty(bias.shape)
    return y.new_empty(y.shape), u.new_empty(u.shape if needs_units else 0), of_bias, *weights


class _Context(Context, Protocol):
    units: tuple[bool, bool]


Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, bool, bool
]  # fmt: skip


def _setup(ctx: _Context, inputs: Inputs, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    *tensors, is_relative, is_rms = inputs
    ctx.units = is_relative, is_rms
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx: _Context, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    found = _backward(grad, *ctx.saved_tensors, *ctx.units, needs)
    return *(part if need else None for part, need in zip(found, needs, strict=True)), None, None


_update.register_autograd(_differentiate, setup_context=_setup)
_update.register_vmap(folding_rows(_update, (0, 1)))
_backward.register_vmap(looping(_backward))


@register_flop_formula(torch.ops.bem_peft.film_update)
def _forward_flops(
    y: Shape, u: Shape, bias: Shape | None, gamma_t: Shape | None, beta_t: Shape | None, *_: object, **__: object
) -> int:
    return int(sum(2 * y[0] * y[1] * t[0] for t in (gamma_t, beta_t) if t is not None))


@register_flop_formula(torch.ops.bem_peft.film_update_backward)
def _backward_flops(
    grad: Shape, y: Shape, u: Shape, bias: Shape | None, gamma_t: Shape | None, beta_t: Shape | None, c: Shape,
    rms: Shape, is_relative: bool, is_rms: bool, needs: Sequence[bool], *_: object, **__: object,
) -> int:  # fmt: skip
    needs_y, needs_u, needs_bias, needs_gamma, needs_beta = needs
    needs_c = needs_u or needs_bias or (needs_y and is_relative)
    products = 0 if gamma_t is None else gamma_t[0] * (needs_c + needs_gamma)
    if beta_t is not None:
        products += beta_t[0] * ((needs_c or (needs_y and is_rms)) + needs_beta)
    return int(2 * y[0] * y[1] * products)


def film_update(
    y: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    gamma_t: torch.Tensor | None,
    beta_t: torch.Tensor | None,
    is_relative: bool,
    is_rms: bool,
) -> torch.Tensor:
    """As `bem_peft.kernels.film.film_update`, with a controller."""
    out: torch.Tensor = _update(y, u, bias, gamma_t, beta_t, is_relative, is_rms)[0]
    return out
