r"""The Kronecker projection:  z = (U (x) V) x = vec(U X V^T),  X = x reshaped (u_dim, v_dim), row by row.

U (x) V, of u_rank*v_rank by u_dim*v_dim, is never built: two products of u_rank*u_dim*v_dim and u_rank*v_dim*v_rank
multiplications a token take its place.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from bem_peft.kernels import backend


def kronecker_project(x: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Args: x (N, u_dim * v_dim), u (u_rank, u_dim), v (v_rank, v_dim). Returns: (N, u_rank * v_rank).

    `bmm` and not `matmul`: the latter folds its batch or not by whether a gradient is asked for, and so would give
    other bits in training than at inference.
    """
    if x.shape[0] == 1:  # a decoding step
        return linear(torch.mm(u, x.view(u.shape[1], -1)), v).view(1, -1)
    tokens, (u_rank, u_dim), (v_rank, v_dim) = x.shape[0], u.shape, v.shape
    left = torch.bmm(u.expand(tokens, u_rank, u_dim), x.reshape(tokens, u_dim, v_dim))
    return linear(left.view(tokens * u_rank, v_dim), v).view(tokens, u_rank * v_rank)


def kronecker_update(
    x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, b_t: torch.Tensor, scaling: float
) -> torch.Tensor:
    """y' = y + s z B^T, z as above. Args: y (N, out), b_t (u_rank * v_rank, out). Returns: (N, out)."""
    if backend.takes_triton(y, b_t):
        from bem_peft.kernels import triton_kronecker

        return triton_kronecker.kronecker_update(x, y, u, v, b_t, scaling)
    return torch.addmm(y, kronecker_project(x, u, v), b_t, alpha=scaling)
