r"""Spectral governance: sigma_1 and the Frobenius norm of each update, as tokens meet it, capped after each step.

    Delta = B K,  K (R, in):  with singular values B K = U diag(sigma) V^T
    B <- B - U diag(max(0, sigma - cap)) V^T K^+,  then  B <- B min(1, budget / |Delta|_F)

All matrices are R by R. The first line is the nearest point of the spectral ball, the second that of the Frobenius
ball, which shrinks sigma as well, so both caps hold at the end. Gates count at their largest value; where a mask stands
between B and K, the caps hold for every mask (`mask_bounds`). B is measured again as it was rounded to its dtype.

Source: Yoshida and Miyato, Spectral norm regularization, 2017, arXiv:1705.10941 (the penalty; ours is a projection).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bem_peft import field_checks as check
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.loop import attach_to_trainers
from bem_peft.tuners.steps.optimizer_hooks import watch
from bem_peft.tuners.steps.sharded import own_part, whole, write


@dataclass(frozen=True)
class SpectralNorms:
    """The largest norms of one update over all tokens, in units of the weight.

    is_bound: they are upper bounds that no token may reach, since the masks are too many to try.
    """

    site: str
    adapter: str
    max_singular_value: float
    frobenius: float
    is_bound: bool = False


LOOK_EVERY = 50  # training forward passes between two looks at weights whose version has not changed


class LowRankAdapter(Adapter):
    """An additive update Delta = B K with B (out, R) the parameter `B`. A subclass gives `right_root`."""

    B: nn.Parameter

    def __init__(self, config: Any, site: SiteShape, call: CallState) -> None:
        super().__init__(config, site, call)
        self.max_singular_value: float | None = config.max_singular_value
        self.fro_budget: float | None = config.fro_budget
        self.dropout = float(config.dropout)
        self.seen: tuple[int, float] | None = None  # B as it was when its caps were last enforced or looked at
        self.forwards = 0
        self.register_state_dict_pre_hook(_check_before_saving)
        if self.is_capped:
            self.is_watched = True
            watch(self)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout on the adapter's input, while training."""
        if self.dropout > 0.0 and self.training:
            return torch.nn.functional.dropout(x, self.dropout)
        return x

    def right_root(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P diag(s) (R, n) with K K^T = P diag(s^2) P^T, and its pseudo-inverse; float64, largest gates included."""
        raise NotImplementedError

    @torch.no_grad()
    def singular_values(self) -> torch.Tensor:
        """Singular values (ascending, float64) of the update; the largest over all masks alone, where they differ."""
        return self._composed(whole(self.B).double()).flip(0)

    @torch.no_grad()
    def norms(self) -> tuple[float, float, bool]:
        """The largest sigma_1 and Frobenius norm over all tokens; whether these are bounds that may not be reached."""
        sigma = self.singular_values()
        return float(sigma[-1]), float(sigma.norm()), False

    def bounds(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper bounds of both norms over all tokens, for B = left (out, R) float64; scalars."""
        sigma = self._composed(left)
        return sigma[0], sigma.norm()

    def _composed(self, left: torch.Tensor) -> torch.Tensor:
        """Singular values (descending) of the update for B = left."""
        return torch.linalg.svdvals(_triangle(left) @ self.right_root()[0])

    def clipped(self, left: torch.Tensor, cap: float) -> torch.Tensor:
        """B = left (out, R), float64, moved to where sigma_1 is at most `cap`."""
        root, inverse = self.right_root()
        basis, triangle = torch.linalg.qr(left)
        u, sigma, v = torch.linalg.svd(triangle @ root, full_matrices=False)
        excess = (sigma - cap).clamp_min(0.0)
        return left - (basis @ (u * excess)) @ (v @ inverse)

    @torch.no_grad()
    def project(self, max_singular_value: float | None, fro_budget: float | None) -> None:
        """Move B to where both caps hold for every token.

        Raises:
            FloatingPointError: a parameter is not finite, so that the update has no norm. Nothing is written.
        """
        for name, parameter in self.named_parameters():
            if not torch.isfinite(whole(parameter)).all():
                raise FloatingPointError(
                    f"`{name}` at {self.site_name} is not finite after an optimizer step, so the norm of its update "
                    "cannot be capped (`max_singular_value`, `fro_budget`): lower the learning rate, or clip gradients."
                )
        self.call.caps.told.clear()
        left = whole(self.B).double()
        if self._share_allowed(left, max_singular_value, fro_budget) >= 1.0:
            return
        slack = 1.0 - 8.0 * torch.finfo(self.B.dtype).eps  # B is rounded once more when it is written back
        if max_singular_value is not None:
            left = self.clipped(left, slack * max_singular_value)
        left = left * self._share_allowed(left, max_singular_value, fro_budget, slack)
        rounded = left.to(self.B.dtype).double()
        for attempt in range(3):  # where B and A nearly cancel, rounding alone can exceed a cap
            share = self._share_allowed(rounded, max_singular_value, fro_budget)
            if share >= 1.0:
                break
            share = share * slack if attempt < 2 else 2.0 ** math.floor(math.log2(share))  # which rounds nothing
            rounded = (rounded * share).to(self.B.dtype).double()
        write(self.B, rounded)

    def _share_allowed(
        self, left: torch.Tensor, max_singular_value: float | None, fro_budget: float | None, slack: float = 1.0
    ) -> float:
        """The factor of B = left at which both caps, times `slack`, hold."""
        shares = [1.0]
        for cap, norm in zip((max_singular_value, fro_budget), self.bounds(left), strict=True):
            if cap is not None and norm > 0:
                shares.append(slack * cap / float(norm))
        return min(shares)

    # when

    @property
    def is_capped(self) -> bool:
        return self.max_singular_value is not None or self.fro_budget is not None

    def on_added(self) -> None:
        """Caps that `SpectralGovernance.attach` set on the model hold for adapters that come later, too."""
        caps = self.call.caps
        self.max_singular_value = self.max_singular_value or caps.max_singular_value
        self.fro_budget = self.fro_budget or caps.fro_budget
        if self.is_capped:
            self.is_watched = True
            self.call.is_watched = True
            watch(self)

    def after_optimizer_step(self, is_first: bool) -> None:
        if self.is_capped:
            self.project(self.max_singular_value, self.fro_budget)
            self.seen = self._sight()

    def before_forward(self) -> None:
        """Say so where the weights that a forward pass uses are not those that were capped: an optimizer that holds
        copies of the parameters, averaged weights, a file."""
        if not self.is_capped:
            return
        if not self.training or not torch.is_grad_enabled():
            if self.seen is None or self.seen[0] != self.B._version:
                self.check_caps("used")
                self.seen = self._sight()
            return
        self.forwards += 1
        if self.seen is None:
            self.seen = self._sight()
        elif self.seen[0] != self.B._version or (self.forwards % LOOK_EVERY == 0 and self.seen != self._sight()):
            self.check_caps("trained")
            self.seen = self._sight()

    def _sight(self) -> tuple[int, float]:
        """What tells that B was written: its version, which some writers leave, and its norm."""
        return self.B._version, float(torch.linalg.vector_norm(own_part(self.B.detach()).float()))

    @torch.no_grad()
    def check_caps(self, how: str) -> None:
        """Warn where a cap does not hold, of the first site alone. A shard is not looked at: its norm would take the
        whole group."""
        told = self.call.caps.told
        if how in told or not self.is_capped or isinstance(self.B, DTensor) or self.B.is_meta:
            return
        limit = 1.0 + 8.0 * torch.finfo(self.B.dtype).eps
        caps = self.max_singular_value, self.fro_budget
        found = [float(norm) for norm in self.bounds(self.B.double())]
        for name, cap, norm in zip(("max_singular_value", "fro_budget"), caps, found, strict=True):
            if cap is not None and not norm <= cap * limit:
                told.add(how)
                warnings.warn(
                    f"`{name}` = {cap:g} does not hold at {self.site_name}: the weights that are {how} now reach "
                    f"{norm:.4g} (SpectralGovernance.measure lists all sites). They were not written by a step of a "
                    "torch optimizer that holds the parameters (averaged weights, an optimizer with copies of its "
                    "own, a file): call "
                    "SpectralGovernance(...).project(model) after they are written.",
                    stacklevel=2,
                )

    def train(self, mode: bool = True) -> LowRankAdapter:
        if not mode and self.training:
            self.seen = None  # weights may have been exchanged for averages
        super().train(mode)
        return self


def _check_before_saving(module: nn.Module, *_: Any) -> None:
    cast(LowRankAdapter, module).check_caps("saved")


def _triangle(left: torch.Tensor) -> torch.Tensor:
    """R (R, R) of left = Q R: the same singular values in any product from the right."""
    triangle: torch.Tensor = torch.linalg.qr(left).R
    return triangle


def root_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P diag(s), rows (R, n) = P diag(s) Q^T, and its pseudo-inverse. Not of the Gram matrix, which would square the
    condition."""
    u, sigma, _ = torch.linalg.svd(_triangle(rows.t()).t(), full_matrices=False)
    floor = sigma[0] * 1e-13
    inverse = torch.where(sigma > floor, 1.0 / sigma.clamp_min(1e-300), torch.zeros_like(sigma))
    return u * sigma, (u * inverse).t()


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
        """Enforce the caps from now on, on adapters that are added later as well, and on the models that a Trainer
        makes anew of this one (`model_init`). Raises ValueError where the model has no additive update of ours."""
        adapters = low_rank_adapters(model)
        if not adapters:
            raise ValueError("the model has no head-gating, rank-mask or Kronecker adapter whose norm could be capped.")
        for _, _, adapter in adapters:
            for target in (adapter.call.caps, adapter):
                target.max_singular_value, target.fro_budget = self.max_singular_value, self.fro_budget
            adapter.on_added()
        attach_to_trainers()
        return self

    def project(self, model: nn.Module) -> None:
        """Enforce the caps once, now."""
        for _, _, adapter in low_rank_adapters(model):
            adapter.project(self.max_singular_value, self.fro_budget)

    @staticmethod
    def measure(model: nn.Module) -> list[SpectralNorms]:
        """The largest norms of every update over all masks and gates: see `SpectralNorms`."""
        return [SpectralNorms(site, name, *adapter.norms()) for site, name, adapter in low_rank_adapters(model)]
