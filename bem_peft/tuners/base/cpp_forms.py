"""What each method's C++ operator takes of an adapter: packed weights and sizes, or the masters in training.

A form reads an adapter by the names that its protocol lists; the operators are `kernels.cpp`'s, of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bem_peft.kernels import cpp, cpp_operators

Weights = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class CppForm:
    """How one method runs as an operator.

    masters: the parameters that the training operator takes, in that order.
    pack(adapter, dtype): what the operator reads in inference, wide weights in `dtype`, small ones in float32 of their
        values rounded to it. sizes(adapter): its arguments after these.
    train(adapter, x, y): the operator that autograd knows, on contiguous rows of one dtype.
    fits_training(adapter): whether that knows what the adapter does in training.
    """

    masters: tuple[str, ...]
    pack: Callable[[Any, torch.dtype], Weights]
    sizes: Callable[[Any], tuple[Any, ...]]
    train: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    fits_training: Callable[[Any], bool] = lambda adapter: True


class _Adapted(cpp_operators.Caller, Protocol):
    scaling: float
    dropout: float

    def derive(self, dtype: torch.dtype) -> Weights: ...
    def held_masters(self) -> list[torch.Tensor | None]: ...
    def drop(self, x: torch.Tensor) -> torch.Tensor: ...


def _are_plain(masters: list[torch.Tensor | None]) -> bool:
    """Whether an operator can pack them: float32, as they are saved."""
    return all(m is None or (m.dtype is torch.float32 and m.is_contiguous()) for m in masters)


# PT1


class _HeadGating(_Adapted, Protocol):
    A: torch.Tensor
    B: torch.Tensor
    gate_weight: torch.Tensor
    gate_bias: torch.Tensor
    num_heads: int
    ranks: list[int]
    temperature: float
    gate_dropout: float


def _pack_head_gating(adapter: _HeadGating, dtype: torch.dtype) -> Weights:
    gate = adapter.gate_weight.float().t(), adapter.gate_bias.float().unsqueeze(0)
    padded = (cpp.padded(part / adapter.temperature) for part in gate)
    return adapter.A.to(dtype).contiguous(), adapter.B.to(dtype).t().contiguous(), *padded


def _train_head_gating(adapter: _HeadGating, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    sizes = adapter.num_heads, adapter.ranks, adapter.temperature, adapter.scaling
    return cpp.train(adapter, "head_gating", x, y, adapter.held_masters(), sizes)


def _head_gating_drops_nothing(adapter: _HeadGating) -> bool:
    return not (adapter.training and (adapter.dropout or adapter.gate_dropout))


# PT2


class _RankMask(_Adapted, Protocol):
    C: torch.Tensor
    mask_weight: torch.Tensor
    active_rank: int
    num_blocks: int
    temperature: float
    hadamard: bool
    is_task_mask: bool
    has_value_gate: bool


def _pack_rank_mask(adapter: _RankMask, dtype: torch.dtype) -> Weights:
    """The control is multiplied in float32, as the training operator does it: both choose by the same logits."""
    masters = adapter.held_masters()
    if _are_plain(masters):
        like, options = torch.empty(0, dtype=dtype), (adapter.num_blocks, adapter.is_task_mask, adapter.hadamard)
        packed: Weights = cpp_operators.call("rank_mask_pack", like, *masters, *options)
        return packed
    a_t, b_t, *_ = adapter.derive(dtype)
    rank, root = b_t.shape[0], math.sqrt(b_t.shape[0])
    gate = adapter.C.float().t() * root if adapter.has_value_gate else b_t.new_zeros(0, rank)
    mask = adapter.mask_weight.float()
    mask = mask.unsqueeze(0) if adapter.is_task_mask else mask.t() * root
    a = a_t.mT.reshape(rank, -1)  # of blocks (G, R / G, in / G) as well
    return a.to(dtype).contiguous(), b_t.contiguous(), cpp.padded(gate), cpp.padded(mask)


def _train_rank_mask(adapter: _RankMask, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    temperature = adapter.temperature if adapter.training else math.inf  # no slope: the mask has no gradient
    sizes = adapter.active_rank, adapter.is_task_mask, adapter.hadamard, temperature, adapter.scaling
    return cpp.train(adapter, "rank_mask", adapter.drop(x), y, adapter.held_masters(), sizes)


# PT3


class _Kronecker(_Adapted, Protocol):
    v_rank: int


def _pack_kronecker(adapter: _Kronecker, dtype: torch.dtype) -> Weights:
    u, v, b_t = adapter.derive(dtype)
    return u.float().contiguous(), cpp.padded(v.t()), b_t.contiguous()


def _train_kronecker(adapter: _Kronecker, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cpp.train(adapter, "kronecker", adapter.drop(x), y, adapter.held_masters(), (adapter.scaling,))


# PT4


class _FiLM(_Adapted, Protocol):
    out_features: int
    clamp_range: float
    max_beta: float
    is_relative: bool
    is_rms: bool
    explosion_threshold: float

    def is_watching_output(self) -> bool: ...
    def flag_with_gradient(self, out: torch.Tensor, flag: torch.Tensor) -> None: ...


def _pack_film(adapter: _FiLM, dtype: torch.dtype) -> Weights:
    masters = adapter.held_masters()
    if _are_plain(masters):
        like, bounds = torch.empty(0, dtype=dtype), (adapter.scaling, adapter.clamp_range, adapter.max_beta)
        packed: Weights = cpp_operators.call("film_pack", like, *masters, *bounds)
        return packed
    weight, bias, *rows = adapter.derive(dtype)
    none = weight.new_zeros(0, adapter.out_features)
    gamma = rows[0] if adapter.clamp_range > 0 else none
    beta = rows[-1] if adapter.max_beta > 0 else none
    return weight.t().contiguous(), cpp.padded(bias.unsqueeze(0)), gamma.contiguous(), beta.contiguous()


def _train_film(adapter: _FiLM, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The operator judges its output itself, and sets `unstable`."""
    unstable = torch.zeros((), dtype=torch.bool, device=y.device) if adapter.is_watching_output() else None
    bounds = adapter.scaling, adapter.clamp_range, adapter.max_beta, adapter.is_relative, adapter.is_rms
    options = (*bounds, unstable, adapter.explosion_threshold)
    out = cpp.train(adapter, "film", x, y, adapter.held_masters(), options)
    if unstable is not None:
        adapter.flag_with_gradient(out, unstable)
    return out


CPP_FORMS: dict[str, CppForm] = {
    "head_gating": CppForm(
        ("A", "B", "gate_weight", "gate_bias"), _pack_head_gating,
        lambda adapter: (adapter.num_heads, adapter.ranks, adapter.scaling), _train_head_gating,
        _head_gating_drops_nothing,
    ),
    "rank_mask": CppForm(
        ("A", "B", "C", "mask_weight"), _pack_rank_mask,
        lambda adapter: (adapter.active_rank, adapter.is_task_mask, adapter.hadamard, adapter.scaling),
        _train_rank_mask,
    ),
    "kronecker": CppForm(
        ("U", "V", "B"), _pack_kronecker, lambda adapter: (adapter.v_rank, adapter.scaling), _train_kronecker
    ),
    "film": CppForm(
        ("controller_weight", "controller_bias", "gamma", "beta"), _pack_film,
        lambda adapter: (adapter.is_relative, adapter.is_rms), _train_film,
    ),
}  # fmt: skip
