"""What PT2's update is for all tokens at once: bounds of its norm, and one matrix where all tokens meet one mask.

s B D(x) A,  D(x) = diag(m(x) (1 + tanh)): any k entries in [0, 2]; or one m for all tokens, which merges, adds up
and exports exactly
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bem_peft.kernels.hadamard import hadamard_transform
from bem_peft.kernels.rank_mask import k_hot_mask, placed_blocks
from bem_peft.tuners.base.low_rank import LowRankAdapter, Update, root_of
from bem_peft.tuners.mask_bounds import RankMasks
from bem_peft.tuners.steps.sharded import whole


class MaskedUpdate(LowRankAdapter):
    """s B D A, or s B H D H A with `hadamard`; see the module docstring."""

    A: nn.Parameter
    mask_weight: nn.Parameter
    active_rank: int
    num_blocks: int
    is_whole: bool
    hadamard: bool
    is_task_mask: bool
    has_value_gate: bool

    @property
    def has_one_mask(self) -> bool:
        """Whether every token meets the same update."""
        return not self.has_value_gate and (self.is_task_mask or self.is_whole)

    def right_root(self) -> tuple[torch.Tensor, torch.Tensor]:
        root, inverse = root_of(self.masked_a().double())
        return root * self.scaling, inverse / self.scaling

    def update(self) -> Update:
        """One update, or the masks and gates that a token may meet, between B and A."""
        if self.has_one_mask:
            return super().update()
        a, kept = self.wide_a().double(), None
        if self.hadamard:
            a = hadamard_transform(a)
        if self.is_task_mask:
            kept = k_hot_mask(whole(self.mask_weight.detach()).float(), self.active_rank) > 0
        largest = 2.0 if self.has_value_gate else 1.0
        return RankMasks(a * self.scaling, self.active_rank, largest, kept, self.hadamard)

    def wide_a(self) -> torch.Tensor:
        """A as a matrix (R, in), of its blocks (R, in / blocks)."""
        return placed_blocks(whole(self.A.detach()), self.num_blocks)

    def masked_a(self) -> torch.Tensor:
        """The A of the one update that all tokens meet, (R, in): H (m * (H A)) for the task's mask, A with k = R."""
        a = self.wide_a()
        if self.is_whole:
            return a
        mask = k_hot_mask(whole(self.mask_weight.detach()).float(), self.active_rank).to(a.dtype).unsqueeze(1)
        if not self.hadamard:
            return a * mask
        return hadamard_transform(hadamard_transform(a) * mask)

    def lora_factors(self, gate: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, in) and B (out, R) with s B A the update at constant mask values (R,), or with the one mask."""
        if gate is None:
            return self.masked_a(), self.B.detach()
        a, b = self.wide_a(), self.B.detach()
        if self.hadamard:
            a, b = hadamard_transform(a), hadamard_transform(b.t()).t()
        return a * gate.to(a.dtype).unsqueeze(1), b

    @staticmethod
    def weighted_fields(configs: Sequence[Any], weights: Sequence[float]) -> dict[str, Any]:
        return {"mask_scope": "task", "value_gate": False, "use_hadamard_path": False, "num_blocks": 1}

    @staticmethod
    def weighted_sizes(parts: Sequence[tuple[Any, float]]) -> dict[str, Any]:
        """The ranks that the masks keep, all of them active."""
        rank = sum(part.active_rank for part, _ in parts)
        return {"total_rank": rank, "active_rank": rank}

    def fill_weighted(self, parts: Sequence[tuple[Any, float]]) -> None:
        """[w_i (s_i / s) B_i], [A_i], of the ranks that are kept, in the masks' basis."""
        left, right = [], []
        for part, weight in parts:
            mask = (
                torch.ones_like(part.B[0]) if part.is_whole else k_hot_mask(part.mask_weight.float(), part.active_rank)
            )
            a, b = part.lora_factors(mask)
            left.append(b[:, mask > 0] * (weight * part.scaling / self.scaling))
            right.append(a[mask > 0])
        self.A.copy_(torch.cat(right))
        self.B.copy_(torch.cat(left, dim=1))
        self.mask_weight.zero_()

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.is_mergeable:
            return super().merge_into(weight, bias)
        return weight + (self.B.detach() @ self.masked_a() * self.scaling).to(weight), bias

    def unmerge_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.is_mergeable:
            return super().unmerge_from(weight, bias)
        return weight - (self.B.detach() @ self.masked_a() * self.scaling).to(weight), bias
