r"""The Kronecker projection:  z = (U (x) V) x = vec(U X V^T),  X = x reshaped (u_dim, v_dim), row by row.

U (x) V, of u_rank*v_rank by u_dim*v_dim, is never built: two products of u_dim*v_dim*v_rank and u_dim*v_rank*u_rank
multiplications a token take its place.
"""

from __future__ import annotations

import torch


def kronecker_project(x: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Args: x (N, u_dim * v_dim), u (u_rank, u_dim), v (v_rank, v_dim). Returns: (N, u_rank * v_rank).

    The wide axis is contracted first, as one product over all rows; what remains is small.
    """
    tokens = x.shape[0]
    (u_rank, u_dim), (v_rank, v_dim) = u.shape, v.shape
    right = torch.mm(x.reshape(tokens * u_dim, v_dim), v.t()).view(tokens, u_dim, v_rank)
    return torch.matmul(u, right).view(tokens, u_rank * v_rank)
