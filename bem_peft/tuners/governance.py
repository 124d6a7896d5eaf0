r"""Spectral governance: sigma_1 and the Frobenius norm of each composed update, capped after each optimizer step.

    Delta = B K,  K (R, in):  the squared singular values of Delta are the eigenvalues of L^T (B^T B) L,  K K^T = L L^T
    B <- B L V diag(min(1, cap / sigma)) V^T L^-1,  then  B <- B min(1, budget / |Delta|_F)

All matrices are R by R. The first line is the nearest point of the spectral ball, the second that of the Frobenius
ball, which shrinks sigma as well, so both caps hold at the end. Gates and masks count at their largest value.

Source: Yoshida and Miyato, Spectral norm regularization, 2017, arXiv:1705.10941 (the penalty; ours is a projection).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bem_peft.tuners import field_checks as check
from bem_peft.tuners.adapter import Adapter, SiteShape
from bem_peft.tuners.call_state import CallState
from bem_peft.tuners.optimizer_hooks import watch
from bem_peft.tuners.sharded import whole, write


@dataclass(frozen=True)
class SpectralNorms:
    """Norms of one composed update. `max_singular_value` and `frobenius` are in units of the weight."""

    site: str
    adapter: str
    max_singular_value: float
    frobenius: float


class LowRankAdapter(Adapter):
    """An additive update Delta = B K with B (out, R) the parameter `B`. A subclass gives `right_gram`."""

    B: nn.Parameter

    def __init__(self, config: Any, site: SiteShape, call: CallState) -> None:
        super().__init__(config, site, call)
        self.max_singular_value: float | None = config.max_singular_value
        self.fro_budget: float | None = config.fro_budget
        self.dropout = float(config.dropout)
        if self.max_singular_value is not None or self.fro_budget is not None:
            self.is_watched = True
            watch(self)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout on the adapter's input, while training."""
        if self.dropout > 0.0 and self.training:
            return torch.nn.functional.dropout(x, self.dropout)
        return x

    def right_gram(self) -> torch.Tensor:
        """K K^T (R, R) in float64, the scale and the largest gates included."""
        raise NotImplementedError

    @torch.no_grad()
    def singular_values(self) -> torch.Tensor:
        """The R singular values of the composed update (ascending, float64)."""
        left = whole(self.B).double()
        root = _root(self.right_gram())[0]
        return torch.linalg.eigvalsh(root.t() @ (left.t() @ left) @ root).clamp_min(0.0).sqrt()

    @torch.no_grad()
    def project(self, max_singular_value: float | None, fro_budget: float | None) -> None:
        """Move B to where both caps hold on the composed update. No host synchronisation."""
        slack = 1.0 - 8.0 * torch.finfo(self.B.dtype).eps  # B is rounded once more when it is written back
        left = whole(self.B).double()
        root, inverse = _root(self.right_gram())
        squared, vectors = torch.linalg.eigh(root.t() @ (left.t() @ left) @ root)
        sigma = squared.clamp_min(0.0).sqrt()
        keep = torch.ones_like(sigma)
        if max_singular_value is not None:
            keep = (slack * max_singular_value / sigma.clamp_min(1e-300)).clamp_max(1.0)
        shrink = torch.ones_like(sigma[0])
        if fro_budget is not None:
            norm = (sigma * keep).norm()
            shrink = (slack * fro_budget / norm.clamp_min(1e-300)).clamp_max(1.0)
        moved = (left @ (root @ vectors * keep) @ (vectors.t() @ inverse)) * shrink
        exceeded = (keep < 1.0).any() | (shrink < 1.0)
        write(self.B, torch.where(exceeded, moved, left))

    def after_optimizer_step(self, is_first: bool) -> None:
        if self.max_singular_value is not None or self.fro_budget is not None:
            self.project(self.max_singular_value, self.fro_budget)


def _root(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L with L L^T = gram (R, R) and its pseudo-inverse, from the eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0.0).sqrt()
    floor = values[-1] * 1e-12
    inverse = torch.where(values > floor, 1.0 / values.clamp_min(1e-300), torch.zeros_like(values))
    return vectors * values, (vectors * inverse).t()


def low_rank_adapters(model: nn.Module) -> list[tuple[str, str, LowRankAdapter]]:
    """(site, adapter name, adapter) of each additive update in the model."""
    return [
        (module.site_name, name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, LowRankAdapter)
    ]


class SpectralGovernance:
    """Caps on every additive update of a model, enforced after each step of any optimizer that trains it.

    The same as the config fields `max_singular_value` and `fro_budget`, for a model that exists.

    Args:
        max_singular_value: upper bound of sigma_1 of each composed update, > 0; None: no bound.
        fro_budget: upper bound of its Frobenius norm, > 0; None: no bound.

    Raises:
        ValueError: both are None, or one is not a positive number.
    """

    def __init__(self, max_singular_value: float | None = None, fro_budget: float | None = None) -> None:
        self.max_singular_value, self.fro_budget = max_singular_value, fro_budget
        if max_singular_value is None and fro_budget is None:
            raise ValueError("`max_singular_value` and `fro_budget` are both None: give at least one cap.")
        check.check_optional_number(self, "max_singular_value", 0.0, exclusive=True)
        check.check_optional_number(self, "fro_budget", 0.0, exclusive=True)

    def attach(self, model: nn.Module) -> SpectralGovernance:
        """Enforce the caps from now on. Raises ValueError where the model has no additive update of ours."""
        adapters = low_rank_adapters(model)
        if not adapters:
            raise ValueError("the model has no head-gating, rank-mask or Kronecker adapter whose norm could be capped.")
        for _, _, adapter in adapters:
            adapter.max_singular_value, adapter.fro_budget = self.max_singular_value, self.fro_budget
            adapter.is_watched = True
            adapter.call.watched = adapter
            watch(adapter)
        return self

    def project(self, model: nn.Module) -> None:
        """Enforce the caps once, now."""
        for _, _, adapter in low_rank_adapters(model):
            adapter.project(self.max_singular_value, self.fro_budget)

    @staticmethod
    def measure(model: nn.Module) -> list[SpectralNorms]:
        """The exact norms of every composed update."""
        norms = []
        for site, name, adapter in low_rank_adapters(model):
            sigma = adapter.singular_values()
            norms.append(SpectralNorms(site, name, float(sigma[-1]), float(sigma.norm())))
        return norms
