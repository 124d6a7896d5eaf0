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
from typing import Protocol, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.base.adapter_config import LowRankConfig
from bem_peft.tuners.base.expert_twins import twins
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.steps.sharded import own_part, whole, write

LOOK_EVERY = 50  # training forward passes between two looks at weights whose version has not changed


class Update(Protocol):
    """What stands between B and the rows, as it is now: all updates B D K that tokens meet."""

    def bounds(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper bounds of sigma_1 and the Frobenius norm over all tokens, for B = left (out, R) float64; scalars."""

    def clipped(self, left: torch.Tensor, cap: float) -> torch.Tensor:
        """B = left (out, R), float64, moved to where sigma_1 is at most `cap`."""

    def largest_norms(self, left: torch.Tensor) -> tuple[float, float, bool]:
        """The largest sigma_1 and Frobenius norm over all tokens; whether they are bounds that may not be reached."""


@dataclass(frozen=True)
class OneUpdate:
    """B K, the same for all tokens. root: P diag(s) (R, n), K K^T = P diag(s^2) P^T; inverse: its pseudo-inverse."""

    root: torch.Tensor
    inverse: torch.Tensor

    def bounds(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = torch.linalg.svdvals(_triangle(left) @ self.root)
        return sigma[0], sigma.norm()

    def clipped(self, left: torch.Tensor, cap: float) -> torch.Tensor:
        basis, triangle = torch.linalg.qr(left)
        u, sigma, v = torch.linalg.svd(triangle @ self.root, full_matrices=False)
        excess = (sigma - cap).clamp_min(0.0)
        return left - (basis @ (u * excess)) @ (v @ self.inverse)

    def largest_norms(self, left: torch.Tensor) -> tuple[float, float, bool]:
        sigma, norm = self.bounds(left)
        return float(sigma), float(norm), False


class LowRankAdapter(Adapter):
    """An additive update Delta = B K with B (out, R) the parameter `B`. A subclass gives `right_root`."""

    B: nn.Parameter
    factors = ("B",)

    def __init__(self, config: LowRankConfig, site: SiteShape, call: CallState) -> None:
        super().__init__(config, site, call)
        self.max_singular_value: float | None = config.max_singular_value
        self.fro_budget: float | None = config.fro_budget
        self.dropout = float(config.dropout)
        self.seen: tuple[int, float] | None = None  # B as it was when its caps were last enforced or looked at
        self.forwards = 0
        self.register_state_dict_pre_hook(_check_before_saving)
        if self.is_capped:
            self.watch()

    def right_root(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P diag(s) (R, n) with K K^T = P diag(s^2) P^T, and its pseudo-inverse; float64, largest gates included."""
        raise NotImplementedError

    def update(self) -> Update:
        """The update as tokens meet it, gates at their largest."""
        return OneUpdate(*self.right_root())

    def own(self) -> list[LowRankAdapter]:
        """The updates that have caps: this one, or that of each expert, on whole parameters."""
        if self.num_experts is None:
            return [self]
        return twins(self, values={name: whole(p.detach()) for name, p in self.named_parameters()})

    @torch.no_grad()
    def norms(self) -> tuple[float, float, bool]:
        """The largest sigma_1 and Frobenius norm over all tokens; whether these are bounds that may not be reached."""
        found = [own.update().largest_norms(whole(own.B).double()) for own in self.own()]
        sigma, norm, is_bound = zip(*found, strict=True)
        return max(sigma), max(norm), any(is_bound)

    has_gates: bool = False  # at constant `gate_values` the update is linear in x

    def gate_values(self, x: torch.Tensor) -> torch.Tensor:
        """The factors of ranks, or of groups of ranks, for inputs x (N, in): (N, R) or (N, G)."""
        raise NotImplementedError

    def lora_factors(self, gate: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, in) and B (out, R) with s B A the update; `gate`: at these constant gates, (R,) or (G,)."""
        raise NotImplementedError

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
        caps = (max_singular_value, fro_budget)
        projected = [own._projected(caps) for own in self.own()]
        if self.num_experts is None and projected[0] is not None:
            write(self.B, projected[0])
        elif any(left is not None for left in projected):
            kept = whole(self.B.detach()).double()
            write(self.B, torch.stack([b if left is None else left for b, left in zip(kept, projected, strict=True)]))

    def _projected(self, caps: tuple[float | None, float | None]) -> torch.Tensor | None:
        """B where both caps hold, float64 with the values of B's dtype; None: they do."""
        left, update, (max_singular_value, _) = whole(self.B).double(), self.update(), caps
        if _share_allowed(update, left, caps) >= 1.0:
            return None
        slack = 1.0 - 8.0 * torch.finfo(self.B.dtype).eps  # B is rounded once more when it is written back
        if max_singular_value is not None:
            left = update.clipped(left, slack * max_singular_value)
        left = left * _share_allowed(update, left, caps, slack)
        rounded = left.to(self.B.dtype).double()
        for attempt in range(3):  # where B and A nearly cancel, rounding alone can exceed a cap
            share = _share_allowed(update, rounded, caps)
            if share >= 1.0:
                break
            share = share * slack if attempt < 2 else 2.0 ** math.floor(math.log2(share))  # which rounds nothing
            rounded = (rounded * share).to(self.B.dtype).double()
        return rounded

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
            self.watch()
            self.call.is_watched = True

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
        bounds = [own.update().bounds(own.B.double()) for own in self.own()]
        found = [max(map(float, norms)) for norms in zip(*bounds, strict=True)]
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


def _check_before_saving(module: nn.Module, *_: object) -> None:
    cast(LowRankAdapter, module).check_caps("saved")


def _share_allowed(
    update: Update, left: torch.Tensor, caps: tuple[float | None, float | None], slack: float = 1.0
) -> float:
    """The factor of B = left at which both caps, times `slack`, hold."""
    shares = [1.0]
    for cap, norm in zip(caps, update.bounds(left), strict=True):
        if cap is not None and norm > 0:
            shares.append(slack * cap / float(norm))
    return min(shares)


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
