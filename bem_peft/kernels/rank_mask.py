r"""The k-hot mask:  m_i = 1 where fewer than k logits stand before l_i (value descending, index ascending).

A product of one row and one of many rows add in different orders, so that z = A x differs in its last bits between a
decoding step and a prefill, and a mask with it where two logits are that close. z is therefore summed in a dtype whose
last bits are far below those of x (`choice_dtype`), and no mask reads a z that was rounded to bfloat16 or float16.
"""

from __future__ import annotations

from typing import Any

import torch

from bem_peft.kernels import backend


def choice_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of z and of the sums that make the logits, for rows of `dtype`.

    Two orders of a sum differ by some 1e-16 of it in float64, by 1e-7 in float32, and a mask only where two logits are
    that close. float64 on a CPU; float32 elsewhere, where float64 costs up to 64 times as much or does not exist.
    """
    return torch.float64 if device.type == "cpu" else torch.promote_types(dtype, torch.float32)


def choice_projection(x: torch.Tensor, a_t: torch.Tensor) -> torch.Tensor:
    """z = x A^T (N, R) in `choice_dtype`, from x (N, in) and A^T (in, R) in the dtype of x or in that of z; or from
    the blocks of A^T (G, in / G, R / G), of which each reads its own part of x.

    Its gradients are products in the dtype of x, and nothing is kept for them but x and A^T.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(a_t, torch.Tensor)
    if is_traced or not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return _wide_product(x, a_t)
    z: torch.Tensor = _Projection.apply(x, a_t)
    return z


def placed_blocks(a: torch.Tensor, blocks: int) -> torch.Tensor:
    """A (..., R, in) with the rows of (..., R, in / blocks) in their places: R / blocks rows read each part of x."""
    if blocks == 1:
        return a
    *lead, rank, width = a.shape
    rows = a.view(*lead, blocks, rank // blocks, 1, width)
    is_own = torch.eye(blocks, dtype=torch.bool, device=a.device).view(blocks, 1, blocks, 1)
    return torch.where(is_own, rows, 0.0).reshape(*lead, rank, blocks * width)


def _wide_product(x: torch.Tensor, a_t: torch.Tensor) -> torch.Tensor:
    wide = choice_dtype(x.dtype, x.device)
    if isinstance(a_t, torch.Tensor) and a_t.dim() == 3:  # of each row's expert it is no tensor
        return _side_by_side(torch.bmm(_parts(x, a_t.shape[0]).to(wide), a_t.to(wide)))
    return torch.mm(x.to(wide), a_t.to(wide))


def _parts(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """(N, width) -> (blocks, N, width / blocks)."""
    return x.view(x.shape[0], blocks, x.shape[1] // blocks).transpose(0, 1)


def _side_by_side(parts: torch.Tensor) -> torch.Tensor:
    """(blocks, N, width) -> (N, blocks width)."""
    return parts.transpose(0, 1).flatten(1)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, a_t: torch.Tensor) -> torch.Tensor:
        return _wide_product(x, a_t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, a_t = ctx.saved_tensors
        of_z, (needs_x, needs_a) = gradients[0].to(x.dtype), ctx.needs_input_grad
        if a_t.dim() == 3:
            of_parts, blocks = _parts(of_z, a_t.shape[0]), a_t.shape[0]
            of_x = _side_by_side(torch.bmm(of_parts, a_t.to(x.dtype).mT)) if needs_x else None
            return of_x, torch.bmm(_parts(x, blocks).mT, of_parts).to(a_t.dtype) if needs_a else None
        return of_z @ a_t.to(x.dtype).t() if needs_x else None, (x.t() @ of_z).to(a_t.dtype) if needs_a else None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        x, a_t = ctx.saved_tensors
        of_x, of_a = tangents
        parts = [] if of_x is None else [_wide_product(of_x, a_t)]
        parts += [] if of_a is None else [_wide_product(x, of_a)]
        return torch.stack(parts).sum(0)


def k_hot_mask(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Exactly k ones per row; equal logits are taken in the order of their index, on every device.

    Args:
        logits: (..., R), float32.
        k: number of ones, 1 <= k <= R.

    Returns:
        (..., R) in {0, 1}, the dtype of `logits`.

    `torch.topk` leaves the order of ties to the device; a stable sort does not.
    """
    return torch.zeros_like(logits).scatter_(-1, _ranked(logits)[..., :k], 1.0)


def _ranked(logits: torch.Tensor) -> torch.Tensor:
    """The ranks (..., R) in the order in which they are kept."""
    return logits.sort(dim=-1, descending=True, stable=True).indices


def straight_through_k_hot(logits: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    r"""`k_hot_mask` with the gradient of sigmoid((l - t) / temperature), t midway between k-th and next logit.

    The value is the hard mask exactly (soft - soft = 0 in floating point). With k = R nothing is chosen, and the
    gradient is 0.

    Source: Bengio, Leonard, Courville, Estimating or propagating gradients through stochastic neurons, 2013
    (straight-through). Their threshold is fixed; ours moves with the token.
    """
    hard = k_hot_mask(logits.detach(), k)
    if k == logits.shape[-1]:
        return hard + 0.0 * (logits - logits.detach())
    top = logits.detach().topk(k + 1, dim=-1).values
    threshold = (top[..., k - 1 : k] + top[..., k:]) / 2
    soft = torch.sigmoid((logits - threshold) / temperature)
    return hard + (soft - soft.detach())


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
    """y' = y + s (m * z * (1 + g)) B^T, m the k-hot mask of the logits.

    Args:
        y: (N, out). z: (N, R). gate: g, (N, R), or None for 0. logits: (N, R) or (1, R), float32. b_t: (R, out).
        k: number of ones, 1 <= k <= R.
        is_soft: whether the logits take the straight-through gradient, at `temperature`.

    Returns:
        (N, out) in the dtype of y.
    """
    if backend.takes_triton(y, b_t):
        from bem_peft.kernels import triton_rank_mask

        return triton_rank_mask.masked_update(y, z, gate, logits, b_t, k, scaling, temperature, is_soft)
    if gate is not None:
        z = torch.addcmul(z, z, gate if gate.dtype is z.dtype else gate.to(z.dtype))
    if is_soft:
        kept = z * straight_through_k_hot(logits, k, temperature).to(z.dtype)
    elif torch.is_grad_enabled() or logits.shape[0] != z.shape[0]:
        kept = z * k_hot_mask(logits, k).to(z.dtype)
    else:
        kept = z.scatter(-1, _ranked(logits)[:, k:], 0.0)
    return torch.addmm(y, kept, b_t, alpha=scaling)
