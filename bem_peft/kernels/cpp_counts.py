"""What the C++ operators count as, from shapes alone, and what they return, as fake tensors: nothing here computes.

FLOPs are those of the products, without the padding: what the torch forms are counted as. In a backward a product with
a weight costs two of its size, one of them where x wants no gradient. Fakes are of one process: what a budget is
counted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

LANES = 16
Shape = Sequence[int]
Results = tuple[torch.Tensor | None, ...]

# operator -> its FLOPs, of the shapes of its tensors; its results, of its tensors
FLOPS: dict[str, Callable[..., int]] = {}
FAKES: dict[str, Callable[..., torch.Tensor | Results]] = {}


def _add(
    method: str, flops: tuple[Callable[..., int], Callable[..., int], Callable[..., int]],
    fakes: tuple[Callable[..., Results], Callable[..., Results]],
) -> None:  # fmt: skip
    """The operators of one method: inference (whose fake is like any y), training and its backward."""
    names = (method, f"{method}_", f"{method}_train", f"{method}_backward")
    FLOPS.update(zip(names, (flops[0], *flops), strict=True))
    FAKES.update(zip(names, (_like_y, _y_itself, *fakes), strict=True))


def _like_y(x: torch.Tensor, y: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _y_itself(x: torch.Tensor, y: torch.Tensor, *rest: object) -> torch.Tensor:
    return y


def _rows(y: Shape) -> int:
    return math.prod(y[:-1])


def _coefficients(y: torch.Tensor, width: int) -> torch.Tensor:
    return y.new_empty(_rows(y.shape), width, dtype=torch.float32)


def _whole_vectors(width: int) -> int:
    return width + -width % LANES


def _gradients(needs_x: bool, x: torch.Tensor, *rest: torch.Tensor | None) -> Results:
    return (torch.empty_like(x) if needs_x else None, *(None if t is None else torch.empty_like(t) for t in rest))


# PT1


def _head_gating(
    x: Shape, y: Shape, a_t: Shape, b: Shape, gate_w: Shape, bias: Shape, heads: int, ranks: Sequence[int],
    *rest: object, **options: object,
) -> int:  # fmt: skip
    return 2 * _rows(y) * (x[-1] * max(ranks) + b[0] * y[-1] + gate_w[0] * len(ranks))


def _head_gating_train(
    x: Shape, y: Shape, a: Shape, b: Shape, gate_w: Shape, bias: Shape, heads: int, ranks: Sequence[int],
    *rest: object, **options: object,
) -> int:  # fmt: skip
    return 2 * _rows(y) * (x[-1] * max(ranks) + b[1] * y[-1] + gate_w[0] * gate_w[1])


def _head_gating_backward(
    gradient: Shape, x: Shape, a: Shape, b: Shape, gate_w: Shape, bias: Shape, low: Shape, half: Shape, heads: int,
    ranks: Sequence[int], temperature: float, scaling: float, needs_x: bool, **options: object,
) -> int:  # fmt: skip
    into_x = (x[-1] * max(ranks) + gate_w[0] * gate_w[1]) * (1 + needs_x)
    return 2 * _rows(gradient) * (into_x + 2 * b[1] * gradient[-1])


def _head_gating_train_fake(
    x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate_w: torch.Tensor, *rest: object
) -> Results:
    return torch.empty_like(y), _coefficients(y, a.shape[0]), _coefficients(y, _whole_vectors(gate_w.shape[0]))


def _head_gating_backward_fake(
    gradient: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate_w: torch.Tensor,
    bias: torch.Tensor, low: torch.Tensor, half: torch.Tensor, heads: int, ranks: Sequence[int], temperature: float,
    scaling: float, needs_x: bool,
) -> Results:  # fmt: skip
    return _gradients(needs_x, x, a, b, gate_w, bias)


_add(
    "head_gating",
    (_head_gating, _head_gating_train, _head_gating_backward),
    (_head_gating_train_fake, _head_gating_backward_fake),
)


# PT2


def _rank_mask_mixing(x: Shape, a: Shape, has_hadamard: bool) -> int:
    """Of the product with H, where A is of blocks and cannot be read as H A."""
    return a[0] * a[0] if has_hadamard and a[1] != x[-1] else 0


def _rank_mask(
    x: Shape, y: Shape, a: Shape, b: Shape, gate_t: Shape, mask_t: Shape, active: int, is_task_mask: bool,
    has_hadamard: bool, *rest: object, **options: object,
) -> int:  # fmt: skip
    rank = b[0]
    control = (rank if gate_t[0] else 0) + (0 if is_task_mask else rank)
    mixing = _rank_mask_mixing(x, a, has_hadamard)
    return 2 * _rows(y) * (rank * (a[1] + y[-1]) + mixing + rank * control)


def _rank_mask_train(
    x: Shape, y: Shape, a: Shape, b: Shape, c: Shape | None, m: Shape, active: int, is_task_mask: bool,
    has_hadamard: bool, *rest: object, **options: object,
) -> int:  # fmt: skip
    control = a[0] * a[0] * ((c is not None) + (not is_task_mask))
    return 2 * _rows(y) * (a[0] * (a[1] + y[-1]) + _rank_mask_mixing(x, a, has_hadamard) + control)


def _rank_mask_backward(
    gradient: Shape, x: Shape, a: Shape, b: Shape, c: Shape | None, m: Shape, z: Shape, active: int,
    is_task_mask: bool, has_hadamard: bool, temperature: float, scaling: float, needs_x: bool, **options: object,
) -> int:  # fmt: skip
    control = a[0] * a[0] * ((c is not None) + (not is_task_mask))
    mixing = _rank_mask_mixing(x, a, has_hadamard)
    return 2 * _rows(gradient) * (a[0] * a[1] * (1 + needs_x) + 2 * a[0] * gradient[-1] + mixing + 2 * control)


def _rank_mask_train_fake(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, *rest: object) -> Results:
    return torch.empty_like(y), _coefficients(y, _whole_vectors(a.shape[0]))


def _rank_mask_backward_fake(
    gradient: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None,
    m: torch.Tensor, z: torch.Tensor, active: int, is_task_mask: bool, has_hadamard: bool, temperature: float,
    scaling: float, needs_x: bool,
) -> Results:  # fmt: skip
    return _gradients(needs_x, x, a, b, c, m)


def _rank_mask_pack_fake(
    like: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, m: torch.Tensor, num_blocks: int,
    is_task_mask: bool, has_hadamard: bool,
) -> Results:  # fmt: skip
    rank = a.shape[0]
    gate, mask = (a.new_empty(rows, _whole_vectors(rank)) for rows in (0 if c is None else rank, m.numel() // rank))
    return torch.empty_like(a, dtype=like.dtype), like.new_empty(rank, b.shape[0]), gate, mask


_add(
    "rank_mask",
    (_rank_mask, _rank_mask_train, _rank_mask_backward),
    (_rank_mask_train_fake, _rank_mask_backward_fake),
)
FAKES["rank_mask_pack"] = _rank_mask_pack_fake


# PT3, whose backward projects x once more: what stands between its factors is not kept


def _kronecker(
    x: Shape, y: Shape, u: Shape, v_t: Shape, b: Shape, v_rank: int, *rest: object, **options: object
) -> int:
    return 2 * _rows(y) * (u[0] * x[-1] + u[0] * v_t[0] * v_rank + b[0] * y[-1])


def _kronecker_train(x: Shape, y: Shape, u: Shape, v: Shape, b: Shape, *rest: object, **options: object) -> int:
    return 2 * _rows(y) * (u[0] * x[-1] + u[0] * v[1] * v[0] + b[1] * y[-1])


def _kronecker_backward(
    gradient: Shape, x: Shape, u: Shape, v: Shape, b: Shape, z: Shape, scaling: float, needs_x: bool,
    **options: object,
) -> int:  # fmt: skip
    left, right = u[0] * x[-1], u[0] * v[1] * v[0]
    return 2 * _rows(gradient) * (left * (2 + needs_x) + 2 * right + 2 * b[1] * gradient[-1])


def _kronecker_train_fake(
    x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, b: torch.Tensor, scaling: float
) -> Results:
    return torch.empty_like(y), _coefficients(y, b.shape[1])


def _kronecker_backward_fake(
    gradient: torch.Tensor, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor, b: torch.Tensor, z: torch.Tensor,
    scaling: float, needs_x: bool,
) -> Results:  # fmt: skip
    return _gradients(needs_x, x, u, v, b)


_add(
    "kronecker",
    (_kronecker, _kronecker_train, _kronecker_backward),
    (_kronecker_train_fake, _kronecker_backward_fake),
)


# PT4


def _film(
    x: Shape, y: Shape, w: Shape, bias: Shape, gamma: Shape, beta: Shape, *rest: object, **options: object
) -> int:
    return 2 * _rows(y) * (x[-1] * w[0] + y[-1] * (gamma[0] + beta[0]))


def _film_units(gamma: Shape | None, beta: Shape | None) -> int:
    return sum(weight[1] for weight in (gamma, beta) if weight is not None)


def _film_train(
    x: Shape, y: Shape, w: Shape, bias: Shape, gamma: Shape | None, beta: Shape | None, *rest: object,
    **options: object,
) -> int:  # fmt: skip
    return 2 * _rows(y) * (x[-1] * w[0] + y[-1] * _film_units(gamma, beta))


def _film_backward(
    gradient: Shape, x: Shape, y: Shape, w: Shape, gamma: Shape | None, beta: Shape | None, c: Shape, read: Shape,
    rms: Shape, scaling: float, clamp_range: float, max_beta: float, is_rms: bool, needs_x: bool, **options: object,
) -> int:  # fmt: skip
    return 2 * _rows(y) * (x[-1] * w[0] * (1 + needs_x) + 2 * y[-1] * _film_units(gamma, beta))


def _film_train_fake(
    x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, gamma: torch.Tensor | None,
    beta: torch.Tensor | None, scaling: float, clamp_range: float, max_beta: float, is_relative: bool, is_rms: bool,
    *rest: object,
) -> Results:  # fmt: skip
    c = _coefficients(y, _whole_vectors(w.shape[0]))
    needs_rms = is_relative or (is_rms and beta is not None)
    rms = _coefficients(y, 1).squeeze(1) if needs_rms else y.new_empty(0, dtype=torch.float32)
    return torch.empty_like(y), c, torch.empty_like(c) if is_relative else c.new_empty(0, c.shape[1]), rms


def _film_backward_fake(
    gradient: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, gamma: torch.Tensor | None,
    beta: torch.Tensor | None, c: torch.Tensor, read: torch.Tensor, rms: torch.Tensor, scaling: float,
    clamp_range: float, max_beta: float, is_rms: bool, needs_x: bool,
) -> Results:  # fmt: skip
    return _gradients(needs_x, x, y, w, w[:, 0], gamma, beta)


def _film_pack_fake(
    like: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None,
    *bounds: float,
) -> Results:  # fmt: skip
    (out, *_) = (part.shape[0] for part in (gamma, beta) if part is not None)
    rows = (like.new_empty(0 if part is None else part.shape[1], out) for part in (gamma, beta))
    return torch.empty_like(w, dtype=like.dtype), w.new_empty(1, _whole_vectors(w.shape[0])), *rows


_add("film", (_film, _film_train, _film_backward), (_film_train_fake, _film_backward_fake))
FAKES["film_pack"] = _film_pack_fake
