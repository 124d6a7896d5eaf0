r"""The k-hot mask:  m_i = 1 where fewer than k logits stand before l_i (value descending, index ascending)."""

from __future__ import annotations

import torch


def k_hot_mask(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Exactly k ones per row; equal logits are taken in the order of their index, on every device.

    Args:
        logits: (..., R), float32.
        k: number of ones, 1 <= k <= R.

    Returns:
        (..., R) in {0, 1}, the dtype of `logits`.

    `torch.topk` leaves the order of ties to the device; a stable sort does not.
    """
    kept = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(logits).scatter_(-1, kept, 1.0)


def drop_all_but_k(z: torch.Tensor, logits: torch.Tensor, k: int) -> torch.Tensor:
    """`z * k_hot_mask(logits, k)`, in place: z (N, R) is overwritten where it is dropped; for inference."""
    dropped = logits.sort(dim=-1, descending=True, stable=True).indices[:, k:]
    return z.scatter_(-1, dropped, 0.0)


def straight_through_k_hot(logits: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    r"""`k_hot_mask` with the gradient of sigmoid((l - t) / temperature), t midway between k-th and next logit.

    The value is the hard mask exactly (soft - soft = 0 in floating point).

    Source: Bengio, Leonard, Courville, Estimating or propagating gradients through stochastic neurons, 2013
    (straight-through). Their threshold is fixed; ours moves with the token.
    """
    hard = k_hot_mask(logits.detach(), k)
    top = logits.detach().topk(min(k + 1, logits.shape[-1]), dim=-1).values
    threshold = (top[..., k - 1 : k] + top[..., -1:]) / 2
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
    mask = straight_through_k_hot(logits, k, temperature) if is_soft else k_hot_mask(logits, k)
    if gate is not None:
        z = torch.addcmul(z, z, gate if gate.dtype is z.dtype else gate.to(z.dtype))
    return torch.addmm(y, z * mask.to(z.dtype), b_t, alpha=scaling)
