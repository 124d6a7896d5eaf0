r"""Bounded feature-wise modulation:  y' = y + gamma * y + beta rms(y),  gamma = c G^T, beta = c T^T.

A row of coefficients is bounded as a whole:  G_i = bound * s w_i / (1 + s |w_i|_1),  so that |c| <= 1 gives
|G_i . c| < bound whatever w and c are, without a nonlinearity on the wide axis.

Source: Perez et al., FiLM: visual reasoning with a general conditioning layer, 2018, arXiv:1709.07871; theirs has
no bound.
"""

from __future__ import annotations

import torch


def bounded_rows(weight: torch.Tensor, scaling: float, bound: float, dtype: torch.dtype) -> torch.Tensor:
    """(rows, units) -> (rows, units) in `dtype`, each row's sum of absolute values below `bound`.

    The bound is kept in `dtype` as well: rounding may add one part in 1/eps, which is taken off before.
    """
    scaled = weight.float() * scaling
    rows = scaled / (1.0 + scaled.abs().sum(dim=1, keepdim=True))
    return (rows * (bound * (1.0 - 2.0 * torch.finfo(dtype).eps))).to(dtype)


def token_rms(y: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row of y (N, out), (N, 1), in y's dtype; of a norm that float16 may not hold."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return (torch.linalg.vector_norm(y, dim=1, keepdim=True, dtype=wide) * y.shape[1] ** -0.5).to(y.dtype)


def film_update(
    y: torch.Tensor, c: torch.Tensor, gamma_t: torch.Tensor | None, beta_t: torch.Tensor | None, is_rms: bool
) -> torch.Tensor:
    """y' = y (1 + c_g G^T) + (c_b rho) T^T, a value a channel.

    Args:
        y: (N, out). c: (N, units). gamma_t: G^T (gamma_dim, out), beta_t: T^T (beta_dim, out), or None; they read the
            first columns of c.
        is_rms: whether rho is the token's rms of y, else 1.

    Returns:
        (N, out) in the dtype of y.
    """
    out = y
    if gamma_t is not None:
        out = torch.addcmul(y, y, torch.mm(c[:, : gamma_t.shape[0]], gamma_t))
    if beta_t is not None:
        units = c[:, : beta_t.shape[0]]
        out = torch.addmm(out, units * token_rms(y) if is_rms else units, beta_t)
    return out
