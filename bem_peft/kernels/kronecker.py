r"""The Kronecker projection:  z = (U (x) V) x = vec(U X V^T),  X = x reshaped (u_dim, v_dim), row by row.

U (x) V, of u_rank*v_rank by u_dim*v_dim, is never built: two products of u_rank*u_dim*v_dim and u_rank*v_dim*v_rank
multiplications a token take its place.
"""

from __future__ import annotations

import torch


def kronecker_project(x: torch.Tensor, u: torch.Tensor, v_t: torch.Tensor) -> torch.Tensor:
    """Args: x (N, u_dim * v_dim), u (u_rank, u_dim), v_t = V^T (v_dim, v_rank). Returns: (N, u_rank * v_rank).

    `bmm` and not `matmul`: the latter folds its batch or not by whether a gradient is asked for, and so would give
    other bits in training than at inference.
    """
    tokens = x.shape[0]
    (u_rank, u_dim), (v_dim, v_rank) = u.shape, v_t.shape
    left = torch.bmm(u.expand(tokens, u_rank, u_dim), x.reshape(tokens, u_dim, v_dim))
    return torch.mm(left.view(tokens * u_rank, v_dim), v_t).view(tokens, u_rank * v_rank)
