r"""Penalties that reach the gradient through a layer's own output, and never touch the loss that is reported.

    carry(y, p) = y,   d/dp = a,   where a is the gradient of the total with respect to the model's own loss

With a = 1 the gradient equals that of (loss + p).backward(); a loss that was divided (accumulation) or scaled (float16)
carries its factor to the penalty.

Source: the auxiliary-loss scaler of Megatron-LM's mixture of experts (MoEAuxLossAutoScaler). Its factor is a global
that the trainer sets; ours is read from the graph.
"""

from __future__ import annotations

from typing import Any

import torch


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, penalty: torch.Tensor, scale: list[torch.Tensor] | None) -> torch.Tensor:
        ctx.scale = scale
        ctx.penalty_like = (penalty.dtype, penalty.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        dtype, device = ctx.penalty_like
        factor = ctx.scale[0].to(dtype) if ctx.scale else torch.ones((), dtype=dtype, device=device)
        return gradients[0], factor, None


def carry(y: torch.Tensor, penalty: torch.Tensor, scale: list[torch.Tensor] | None) -> torch.Tensor:
    """y, whose backward pass also adds the gradient of the scalar `penalty`, times `scale[0]` where there is one."""
    return _Carrier.apply(y, penalty, scale)


def decorrelation(gates: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean squared off-diagonal correlation of the gates over real tokens.

    Args:
        gates: (N, G). mask: (N,), 1 at real tokens; None: all are.

    Returns:
        scalar, in [0, 1]; 0 where a gate does not vary.
    """
    groups = gates.shape[1]
    if groups == 1:
        return gates.sum() * 0.0
    weight = torch.ones_like(gates[:, :1]) if mask is None else mask.to(gates.dtype).unsqueeze(1)
    total = weight.sum().clamp_min(1.0)
    centred = (gates - (gates * weight).sum(0) / total) * weight
    covariance = centred.t() @ centred / total
    variance = covariance.diagonal()
    correlation_squared = covariance.square() / (variance.unsqueeze(0) * variance.unsqueeze(1) + 1e-12)
    off_diagonal = correlation_squared.sum() - correlation_squared.diagonal().sum()
    return off_diagonal / (groups * (groups - 1))


def orthogonality(factor: torch.Tensor) -> torch.Tensor:
    """Mean squared entry of F F^T - I for F (rank, dim): 0 where the rows are orthonormal."""
    gram = factor @ factor.t()
    return (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).square().mean()


def diversity(factor: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine between different rows of F (rank, dim): 0 where they are orthogonal, 1 where parallel."""
    rank = factor.shape[0]
    if rank == 1:
        return factor.sum() * 0.0
    cosine = torch.nn.functional.normalize(factor, dim=1) @ torch.nn.functional.normalize(factor, dim=1).t()
    return (cosine.square().sum() - cosine.diagonal().square().sum()) / (rank * (rank - 1))


def mask_balance(probabilities: torch.Tensor, k: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean squared deviation of each rank's mean probability from k / R over real tokens.

    Args:
        probabilities: (N, R), the soft mask. mask: (N,) or None.
    """
    weight = torch.ones_like(probabilities[:, :1]) if mask is None else mask.to(probabilities.dtype).unsqueeze(1)
    usage = (probabilities * weight).sum(0) / weight.sum().clamp_min(1.0)
    return (usage - k / probabilities.shape[1]).square().mean()
