r"""Triton form of the masked update:  y' = y + s (m * z * (1 + g)) B^T,  m the k-hot mask of the logits.

m_i = 1 where fewer than k logits stand before l_i (value descending, index ascending): counted, not sorted, so that
ties fall as in `rank_mask.k_hot_mask`; NaN stands with +inf. Forward: one kernel, a tile of y' a program, which counts
its own masks; y is read once, y' written once, the mask never. Backward, with D = dy' B, the product over the whole of
dy', left to `torch.mm`, and e = s D * z * (1 + g), soft = sigmoid((l - t) / T), t midway between k-th and next logit
(with k = R there is none, and dl = 0):

    dz = s D * m * (1 + g)    dg = s D * m * z    dl = e * soft (1 - soft) / T    dB^T = s (m * z * (1 + g))^T dy'

One kernel counts the masks again and gives dz, dg, dl and m * z * (1 + g); dB^T is `torch.mm`'s. Nothing is kept but
the inputs. z (1 + g) is rounded once, and g not before it.
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
def _orderable(logit):
    """NaN as +inf, so that of every row k logits are kept."""
    return tl.where(logit == logit, logit, float("inf"))


@triton.jit
def _number_before(logits, logit, rows, ranks, stride_0, stride_1, N, R: tl.constexpr):
    """How many logits of its row stand before each of `logit`, those at rows x ranks."""
    before = tl.zeros(logit.shape, dtype=tl.int32)
    start = logits + rows.to(tl.int64) * stride_0
    for j in range(R):
        other = _orderable(tl.load(start + j * stride_1, mask=rows < N, other=0.0))[:, None]
        stands_before = (other > logit) | ((other == logit) & (ranks > j)[None, :])
        before += stands_before.to(tl.int32)
    return before


@triton.jit
def _gated(z, gate, rows, ranks, stride_z0, stride_z1, stride_g0, stride_g1, N, R, HAS_GATE: tl.constexpr):
    """z and 1 + g at rows x ranks, float32."""
    value = load_tile(z, rows, ranks, stride_z0, stride_z1, N, R).to(tl.float32)
    factor = tl.full(value.shape, 1.0, tl.float32)
    if HAS_GATE:
        factor += load_tile(gate, rows, ranks, stride_g0, stride_g1, N, R).to(tl.float32)
    return value, factor


@tuned(*UPDATE_TILES, key=["ROWS_KEY", "OUT", "R"])
@triton.jit
def _masked_update(
    y, z, gate, logits, b_t, out, scaling, N, ROWS_KEY, stride_y0, stride_y1, stride_z0, stride_z1,
    stride_g0, stride_g1, stride_m0, stride_m1, stride_b0, stride_b1,
    OUT: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HAS_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        value, factor = _gated(z, gate, rows, ranks, stride_z0, stride_z1, stride_g0, stride_g1, N, R, HAS_GATE)
        logit = _orderable(load_tile(logits, rows, ranks, stride_m0, stride_m1, N, R))
        is_kept = _number_before(logits, logit, rows, ranks, stride_m0, stride_m1, N, R) < K
        left = tl.where(is_kept, value * factor, 0.0)
        right = load_tile(b_t, ranks, channels, stride_b0, stride_b1, R, OUT)
        total += dot(rounded(left, b_t.dtype.element_ty), right)
    before = load_tile(y, rows, channels, stride_y0, stride_y1, N, OUT).to(tl.float32)
    store_tile(out, before + scaling * total, rows, channels, OUT, 1, N, OUT)


@triton.jit
def _mask_gradients(
    grad_rank, z, gate, logits, grad_z, grad_gate, grad_logits, kept, scaling, temperature, N,
    stride_z0, stride_z1, stride_g0, stride_g1, stride_m0, stride_m1,
    R: tl.constexpr, K: tl.constexpr, HAS_GATE: tl.constexpr, IS_SOFT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    threshold = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if IS_SOFT and K < R:
        for start in range(0, R, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            logit = _orderable(load_tile(logits, rows, ranks, stride_m0, stride_m1, N, R))
            before = _number_before(logits, logit, rows, ranks, stride_m0, stride_m1, N, R)
            inside = (ranks < R)[None, :]
            threshold += tl.sum(tl.where(inside & (before == K - 1), logit, 0.0), axis=1) * 0.5
            threshold += tl.sum(tl.where(inside & (before == K), logit, 0.0), axis=1) * 0.5
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        value, factor = _gated(z, gate, rows, ranks, stride_z0, stride_z1, stride_g0, stride_g1, N, R, HAS_GATE)
        logit = _orderable(load_tile(logits, rows, ranks, stride_m0, stride_m1, N, R))
        is_kept = _number_before(logits, logit, rows, ranks, stride_m0, stride_m1, N, R) < K
        grad = load_tile(grad_rank, rows, ranks, R, 1, N, R).to(tl.float32) * scaling
        store_tile(kept, tl.where(is_kept, value * factor, 0.0), rows, ranks, R, 1, N, R)
        store_tile(grad_z, tl.where(is_kept, grad * factor, 0.0), rows, ranks, R, 1, N, R)
        if HAS_GATE:
            store_tile(grad_gate, tl.where(is_kept, grad * value, 0.0), rows, ranks, R, 1, N, R)
        if IS_SOFT:
            soft = tl.sigmoid((logit - threshold[:, None]) / temperature)
            soft_slope = soft * (1.0 - soft) / temperature if K < R else tl.zeros(soft.shape, tl.float32)
            slope = grad * value * factor * soft_slope
            store_tile(grad_logits, slope, rows, ranks, R, 1, N, R)


@torch.library.custom_op(
    "bem_peft::masked_update",
    mutates_args=(),
    schema="(Tensor y, Tensor z, Tensor? gate, Tensor logits, Tensor b_t, int k, float scaling, float temperature, "
    "bool is_soft) -> Tensor",
)
def _update(
    y: torch.Tensor,
    z: torch.Tensor,
    gate: torch.Tensor | None,
    logits: torch.Tensor,
    b_t: torch.Tensor,
    k: int,
    scaling: float,
    temperature: float,
    is_soft: bool,
) -> torch.Tensor:
    (rows, channels), rank = y.shape, z.shape[1]
    out = y.new_empty(rows, channels)
    if out.numel():
        gate_or_any = z if gate is None else gate
        _masked_update[tile_grid(rows, channels)](
            y, z, gate_or_any, logits, b_t, out, scaling, rows, rows_key(rows),
            *y.stride(), *z.stride(), *gate_or_any.stride(), *logits.stride(), *b_t.stride(),
            OUT=channels, R=rank, K=k, HAS_GATE=gate is not None, BLOCK_R=product_block(rank, y.dtype),
        )  # fmt: skip
    return out


@_update.register_fake
def _(y: torch.Tensor, *_: object) -> torch.Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op(
    "bem_peft::masked_update_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor? gate, Tensor logits, Tensor b_t, int k, float scaling, float temperature, "
    "bool is_soft, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: torch.Tensor,
    z: torch.Tensor,
    gate: torch.Tensor | None,
    logits: torch.Tensor,
    b_t: torch.Tensor,
    k: int,
    scaling: float,
    temperature: float,
    is_soft: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz, dgate and dlogits where `needs[0]`, db_t where `needs[1]`; what is not needed or not there is empty."""
    rows, rank = z.shape
    grad_rank = torch.mm(grad, b_t.t()) if needs[0] else grad.new_zeros(rows, rank)
    kept, grad_z = torch.empty_like(grad_rank), z.new_empty(z.shape)
    gate_or_any = z if gate is None else gate
    grad_gate = gate_or_any.new_empty(0 if gate is None else gate.shape)
    grad_logits = logits.new_empty(logits.shape if is_soft else 0)
    if rows:
        block = 32
        _mask_gradients[(triton.cdiv(rows, block),)](
            grad_rank, z, gate_or_any, logits, grad_z, grad_gate, grad_logits, kept, scaling, temperature, rows,
            *z.stride(), *gate_or_any.stride(), *logits.stride(),
            R=rank, K=k, HAS_GATE=gate is not None, IS_SOFT=is_soft, BLOCK_R=padded(rank, 64), BLOCK_N=block,
        )  # fmt: skip
    grad_b = torch.mm(kept.t(), grad).mul_(scaling) if needs[1] else grad.new_empty(0)
    if not needs[0]:
        return grad.new_empty(0), gate_or_any.new_empty(0), logits.new_empty(0), grad_b
    return grad_z, grad_gate, grad_logits, grad_b


@_backward.register_fake
def _(
    grad: torch.Tensor, z: torch.Tensor, gate: torch.Tensor | None, logits: torch.Tensor, b_t: torch.Tensor, k: int,
    scaling: float, temperature: float, is_soft: bool, needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    gate_or_any = z if gate is None else gate
    return (
        z.new_empty(z.shape if needs[0] else 0),
        gate_or_any.new_empty(gate.shape if needs[0] and gate is not None else 0),
        logits.new_empty(logits.shape if needs[0] and is_soft else 0),
        grad.new_empty(b_t.shape if needs[1] else 0),
    )


class _Context(Context, Protocol):
    settings: list[float]  # k, scaling, temperature, is_soft


Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, int, float, float, bool
]  # fmt: skip


def _setup(ctx: _Context, inputs: Inputs, output: torch.Tensor) -> None:
    _, z, gate, logits, b_t, *ctx.settings = inputs
    ctx.save_for_backward(z, gate, logits, b_t)


def _differentiate(ctx: _Context, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    _, z, gate, logits, b_t = ctx.needs_input_grad[:5]
    logits = logits and bool(ctx.settings[3])
    narrow = z or gate or logits
    if not (narrow or b_t):
        return grad, *[None] * 8
    found = _backward(grad, *ctx.saved_tensors, *ctx.settings, [narrow, b_t])
    grads = [part if need else None for part, need in zip(found, (z, gate, logits, b_t), strict=True)]
    return grad, *grads, None, None, None, None


_update.register_autograd(_differentiate, setup_context=_setup)
_update.register_vmap(folding_rows(_update, (0, 1, 2, 3)))
_backward.register_vmap(looping(_backward))


@register_flop_formula(torch.ops.bem_peft.masked_update)
def _forward_flops(y: Shape, z: Shape, gate: Shape | None, logits: Shape, b_t: Shape, *_: object, **__: object) -> int:
    return int(2 * y[0] * b_t[0] * b_t[1])


@register_flop_formula(torch.ops.bem_peft.masked_update_backward)
def _backward_flops(
    grad: Shape, z: Shape, gate: Shape | None, logits: Shape, b_t: Shape, k: int, scaling: float, temperature: float,
    is_soft: bool, needs: Sequence[bool], **__: object,
) -> int:  # fmt: skip
    return int(2 * grad[0] * b_t[0] * b_t[1] * sum(needs))


def masked_update(
    y: torch.Tensor,
    z: torch.Tensor,
    gate: torch.Tensor | None,
    logits: torch.Tensor,
    b_t: torch.Tensor,
    k: int,
    scaling: float,
    temperature: float = 1.0,
    is_soft: bool = False,
) -> torch.Tensor:
    """As `bem_peft.kernels.rank_mask.masked_update`."""
    out: torch.Tensor = _update(y, z, gate, logits.expand(z.shape), b_t, k, scaling, temperature, is_soft)
    return out
