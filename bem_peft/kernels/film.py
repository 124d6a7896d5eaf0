r"""Bounded feature-wise modulation:  y' = y + gamma * y + beta rms(y),  gamma = c G^T, beta = c T^T,  c = tanh(u + b).

u = W x / rms(y), or W x: a controller that reads x in units of the token's RMS of y is at the same point of its tanh in
every layer and for every token, whose x and y differ by factors of 100 (the first token's, in the middle of a model).

A row of coefficients is bounded as a whole:  G_i = bound * s w_i / (1 + s |w_i|_1),  so that |c| <= 1 gives
|G_i . c| < bound whatever w and c are, without a nonlinearity on the wide axis.

Source: Perez et al., FiLM: visual reasoning with a general conditioning layer, 2018, arXiv:1709.07871; theirs has
no bound.
"""

from __future__ import annotations

import torch

from bem_peft.kernels import backend


def bounded_rows(weight: torch.Tensor, scaling: float, bound: float, dtype: torch.dtype) -> torch.Tensor:
    """(..., rows, units) -> the same in `dtype`, each row's sum of absolute values below `bound`.

    The bound is kept in `dtype` as well: rounding may add one part in 1/eps, which is taken off before.
    """
    scaled = weight.float() * scaling
    rows = scaled / (1.0 + scaled.abs().sum(dim=-1, keepdim=True))
    return (rows * (bound * (1.0 - 2.0 * torch.finfo(dtype).eps))).to(dtype)


SMALLEST_RMS = 1e-6  # by which u is divided


def token_rms(y: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row of y (N, out), (N, 1), in y's dtype; of a norm that float16 may not hold."""
    return (token_norm(y) * y.shape[1] ** -0.5).to(y.dtype)


def token_norm(y: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each row of y (N, out), (N, 1), in float32 or wider: float16 may not hold it."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return torch.linalg.vector_norm(y, dim=1, keepdim=True, dtype=wide)


def controller(y: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None, norm: torch.Tensor | None) -> torch.Tensor:
    """c (N, units) in the dtype of y: tanh(u / rms(y) + bias), or tanh(u + bias) where no norm is given.

    Args: u (N, units), bias (units,) or (N, units), norm: `token_norm(y)`.
    """
    if norm is None:
        return torch.tanh(u if bias is None else u + bias)
    root = y.shape[1] ** 0.5
    floor = norm.clamp_min(SMALLEST_RMS * root)
    if bias is None:
        return torch.tanh(torch.div(u.to(floor.dtype), floor) * root).to(y.dtype)
    return torch.tanh(torch.addcdiv(bias.to(floor.dtype), u.to(floor.dtype), floor, value=root)).to(y.dtype)


def film_update(
    y: torch.Tensor,
    u: torch.Tensor | None,
    bias: torch.Tensor | None,
    gamma_t: torch.Tensor | None,
    beta_t: torch.Tensor | None,
    is_relative: bool,
    is_rms: bool,
) -> torch.Tensor:
    """y' = y (1 + c_g G^T) + (c_b rho) T^T, (N, out) in the dtype of y.

    Args:
        y: (N, out).
        u: W x (N, units), or None: c = 1 for all tokens.
        bias: (units,), or None for 0.
        gamma_t: G^T (gamma_dim, out), beta_t: T^T (beta_dim, out), or None; they read the first columns of c. With one
            column in place of `out`: a value for all channels.
        is_relative: whether the controller reads u / rms(y), else u.
        is_rms: whether rho is the token's rms of y, else 1.
    """
    width = y.shape[1]
    has_each = (gamma_t is None or gamma_t.shape[1] == width) and (beta_t is None or beta_t.shape[1] == width)
    if u is not None and has_each and backend.takes_triton(y, gamma_t, beta_t):
        from bem_peft.kernels import triton_film

        return triton_film.film_update(y, u, bias, gamma_t, beta_t, is_relative, is_rms)
    is_relative, is_rms = is_relative and u is not None, is_rms and beta_t is not None
    norm = token_norm(y) if is_relative or is_rms else None
    c = y.new_ones(1, 1) if u is None else controller(y, u, bias, norm if is_relative else None)
    out = y
    if gamma_t is not None:
        out = torch.addcmul(y, y, torch.mm(c[:, : gamma_t.shape[0]], gamma_t))
    if beta_t is not None:
        units, is_product = c[:, : beta_t.shape[0]], has_each and (is_rms or c.shape[0] == y.shape[0])
        share = 1.0
        if (
            norm is not None and is_rms and is_product and y.dtype is not torch.float16
        ):  # the product scales for nothing
            units, share = units * norm.to(y.dtype), width**-0.5
        elif norm is not None and is_rms:
            units = units * (norm * width**-0.5).to(y.dtype)
        if is_product:
            out = torch.addmm(out, units, beta_t, alpha=share)
        else:  # what broadcasts cannot be the addend of addmm
            out = out + torch.mm(units, beta_t)
    return out
