r"""Penalties that reach the gradient through a layer's own output, and never touch the loss that is reported.

    carry(y, p) = y,   and backwards  dp = a w,   with a, w of the call (`penalty_call`)

so that the gradient equals that of (loss + w p).backward(). The penalties of tokens are means over sequences,

    p = sum_s weight_s p_s,   sum_s weight_s = 1,

and p_s reads the real tokens of sequence s alone: how sequences are batched, padded, packed, accumulated or spread over
processes changes nothing.

Source: the auxiliary-loss scaler of Megatron-LM's mixture of experts (MoEAuxLossAutoScaler), whose factor is a global
that the trainer sets; and the sequence-wise balance loss of DeepSeek-V2, 2024, arXiv:2405.04434 (eq. 23).
"""

from __future__ import annotations

from typing import Protocol

import torch

from bem_peft.tuners.calls.penalty_call import PenaltyCall, Sequences


class _Context(Protocol):
    """What autograd keeps of a call of `_Carrier`."""

    call: PenaltyCall
    owner: object
    mark: object
    penalty_like: tuple[torch.dtype, torch.device]


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, y: torch.Tensor, penalty: torch.Tensor, call: PenaltyCall, owner: object
    ) -> torch.Tensor:
        ctx.call, ctx.owner = call, owner
        ctx.mark = object()  # stands for this node: the node itself would hold the call that holds it, and its graph
        ctx.penalty_like = (penalty.dtype, penalty.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        dtype, device = ctx.penalty_like
        factor = ctx.call.factor_for(ctx.mark, ctx.owner)
        return gradients[0], factor.to(device=device, dtype=dtype), None, None


def carry(y: torch.Tensor, penalty: torch.Tensor, call: PenaltyCall, owner: object = None) -> torch.Tensor:
    """y, whose backward pass also adds the gradient of the scalar `penalty`, as `call` weighs it.

    `owner`: a penalty of parameters alone counts once a call for each owner, however often its layer runs.
    """
    out: torch.Tensor = _Carrier.apply(y, penalty, call, owner)
    return out


def decorrelation(gates: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Mean squared off-diagonal correlation of the gates (N, G) over the tokens of each sequence; a scalar in [0, 1].

    A gate that does not vary in a sequence counts 0.
    """
    groups = gates.shape[1]
    if groups == 1:
        return gates.sum() * 0.0
    centred = (gates - sequences.means(gates)[sequences.index]) * sequences.real.unsqueeze(1)
    products = centred.unsqueeze(2) * centred.unsqueeze(1)  # (N, G, G)
    covariance = sequences.means(products.flatten(1)).view(-1, groups, groups)
    variance = covariance.diagonal(dim1=1, dim2=2)
    squared = covariance.square() / (variance.unsqueeze(1) * variance.unsqueeze(2) + 1e-12)
    off_diagonal = squared.sum((1, 2)) - squared.diagonal(dim1=1, dim2=2).sum(1)
    return sequences.average(off_diagonal / (groups * (groups - 1)))


def gate_entropy(logits: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Mean binary entropy, in nats, of gate/2 = sigmoid(z), z (N, G), over the tokens of each sequence; at most log 2.

    H = log(1 + e^-a) + a sigmoid(-a),  a = |z|:  from the gate itself, log(0) would come in once it rounds to 0 or 2.
    """
    size = logits.abs().clamp_max(1e4)  # e^-1e4 is 0 in every dtype
    entropy = torch.nn.functional.softplus(-size) + size * torch.sigmoid(-size)
    return sequences.average(sequences.means(entropy).mean(1))


def mask_balance(masks: torch.Tensor, k: int, sequences: Sequences) -> torch.Tensor:
    """Mean squared deviation of each rank's use, the mean of masks (N, R), from k / R over the tokens of each sequence.

    Of hard masks with a straight-through gradient: 0, and without a gradient, where each rank is kept for k / R of the
    tokens, however sharp the logits are.
    """
    usage = sequences.means(masks)
    return sequences.average((usage - k / masks.shape[1]).square().mean(1))


def _at_least_float32(factor: torch.Tensor) -> torch.Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def orthogonality(factor: torch.Tensor) -> torch.Tensor:
    """Mean squared entry of F F^T - I for F (rank, dim): 0 where the rows are orthonormal; the sum of a stack's."""
    factor = _at_least_float32(factor)
    gram = factor @ factor.mT
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram - eye).square().mean((-2, -1)).sum()


def diversity(factor: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine between different rows of F (rank, dim): 0 where they are orthogonal, 1 where parallel; the
    sum of a stack's."""
    factor, rank = _at_least_float32(factor), factor.shape[-2]
    if rank == 1:
        return factor.sum() * 0.0
    rows = torch.nn.functional.normalize(factor, dim=-1)
    squared = (rows @ rows.mT).square()
    return (squared.sum() - squared.diagonal(dim1=-2, dim2=-1).sum()) / (rank * (rank - 1))
