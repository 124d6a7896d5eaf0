r"""PT2, dynamic rank mask at W_O and W_down:  y' = y + s B (m(x) * (1 + tanh(C z/rms(z))) * z),  z = A x.

A (R, in), B (out, R), zero at the start; C (R, R), zero at the start (`value_gate`); s = `scaling`; m(x) in {0, 1}^R
with exactly k ones a token: the k largest of the logits W z, W (R, R). The order of the logits does not depend on the
length of z, nor, by the dtype in which z and they are computed (`kernels.rank_mask`), on what else is in the batch.
`use_hadamard_path`: A and B are read as H A and B H with the orthonormal Walsh-Hadamard matrix H, so that a mask drops
a direction, not a column. Every token executes the full R; k are active. With k = R nothing is chosen: a LoRA, gated by
its own values if `value_gate`.

Source: Valipour et al., DyLoRA, 2023, arXiv:2210.07558 and Zhang et al., AdaLoRA, 2023, arXiv:2303.10512 choose ranks
for the whole run; ours chooses them for each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from bem_peft import field_checks as check
from bem_peft.kernels.hadamard import hadamard_basis, hadamard_transform, is_power_of_two
from bem_peft.kernels.rank_mask import (
    choice_dtype,
    choice_projection,
    k_hot_mask,
    masked_update,
    straight_through_k_hot,
)
from bem_peft.tuners.base.adapter import SiteShape
from bem_peft.tuners.base.adapter_config import AdapterConfig, LowRankConfig
from bem_peft.tuners.base.expert_products import each_rows
from bem_peft.tuners.base.forms import transposed
from bem_peft.tuners.base.low_rank import LowRankAdapter, Update, root_of
from bem_peft.tuners.base.model import AdapterModel
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.penalty import mask_balance
from bem_peft.tuners.calls.penalty_call import Sequences
from bem_peft.tuners.mask_bounds import RankMasks
from bem_peft.tuners.steps.sharded import whole


@dataclass
class DynamicRankMaskConfig(LowRankConfig):
    """Config of PT2, y' = y + s B (m(x) * A x) at W_O and W_down."""

    total_rank: int = field(default=16, metadata={"help": "R, the ranks that are computed."})
    active_rank: int = field(default=8, metadata={"help": "k, the ranks that are kept for a token, at most R."})
    use_hadamard_path: bool = field(
        default=True, metadata={"help": "Mask directions of the Walsh-Hadamard basis; R must be a power of two."}
    )
    value_gate: bool = field(default=True, metadata={"help": "Multiply kept ranks by 1 + tanh(C z / rms(z))."})
    mask_scope: str = field(
        default="token", metadata={"help": "'token': a mask for each token; 'task': one learned mask, mergeable."}
    )
    mask_temperature: float = field(
        default=1.0, metadata={"help": "Width of the sigmoid whose gradient stands in for the mask's, > 0."}
    )
    balance_strength: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared deviation of each rank's use, by a sequence's tokens, from k / R."},
    )

    method: ClassVar[str] = "bem_rank_mask"
    aliases: ClassVar[tuple[str, ...]] = ("pt2", "dynamic_rank_mask")
    neighbours: ClassVar[Mapping[str, str]] = {
        **LowRankConfig.neighbours,
        "r": "`total_rank`, of which `active_rank` are used by a token",
        "rank": "`total_rank`, of which `active_rank` are used by a token",
    }
    rank_fields: ClassVar[tuple[str, ...]] = ("total_rank", "active_rank")
    size_fields: ClassVar[tuple[str, ...]] = ("total_rank",)  # what a budget search may change

    def __post_init__(self) -> None:
        check.check_int(self, "total_rank")
        check.check_int(self, "active_rank", maximum=self.total_rank)
        for name in ("use_hadamard_path", "value_gate"):
            check.check_bool(self, name)
        if self.use_hadamard_path and not is_power_of_two(self.total_rank):
            raise check.field_error(
                "total_rank",
                self.total_rank,
                "must be a power of two with `use_hadamard_path`",
                f"use {1 << self.total_rank.bit_length()} or set use_hadamard_path=False",
            )
        check.check_choice(self, "mask_scope", ("token", "task"))
        check.check_number(self, "mask_temperature", 0.0, exclusive=True)
        check.check_number(self, "balance_strength", 0.0)
        super().__post_init__()

    def inert_fields(self) -> dict[str, str]:
        if self.active_rank == self.total_rank:
            why = "`active_rank` = `total_rank` keeps every rank, so that there is no mask"
            return {"mask_temperature": why, "balance_strength": why}
        if self.mask_scope == "task":
            return {"balance_strength": "one mask for all tokens keeps a rank for all of them or none"}
        return {}

    def with_sizes(self, **sizes: int) -> AdapterConfig:
        """Where `total_rank` alone changes, `active_rank` keeps its share of it."""
        if "total_rank" in sizes and "active_rank" not in sizes:
            sizes["active_rank"] = max(1, sizes["total_rank"] * self.active_rank // self.total_rank)
        return super().with_sizes(**sizes)


class DynamicRankMaskAdapter(LowRankAdapter):
    """y' = y + s B (m(x) * (1 + tanh(C z/rms(z))) * z),  z = A x."""

    variant = "PT2"
    lr_groups = {
        "A": "projection",
        "B": "projection",
        "mask_weight": "mask",
        "C": "controller",
    }
    kernel, has_operator = "rank_mask", True
    has_gates = True

    def __init__(self, config: DynamicRankMaskConfig, site: SiteShape, call: CallState) -> None:
        super().__init__(config, site, call)
        rank = config.total_rank
        self.rank, self.active_rank, self.temperature = rank, config.active_rank, config.mask_temperature
        self.is_whole = config.active_rank == rank
        self.hadamard, self.is_task_mask = config.use_hadamard_path, config.mask_scope == "task"
        self.has_value_gate = config.value_gate
        self.balance_strength = config.balance_strength
        self.is_penalised = self.reads_call = config.balance_strength > 0.0
        self.token_penalties = ("balance_strength",) if self.is_penalised and not self.is_task_mask else ()
        self.is_mergeable = self.is_summable = self.has_one_mask
        if self.is_task_mask and self.has_value_gate:
            self.merge_refusal = "its value gate depends on the token; set `value_gate=False` with a task mask"
        self.A = nn.Parameter(torch.empty(rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, rank))
        shape = (rank,) if self.is_task_mask else (rank, rank)
        self.mask_weight = nn.Parameter(torch.empty(shape))
        if self.has_value_gate:
            self.C = nn.Parameter(torch.empty(rank, rank))

    def idle_parameters(self) -> dict[str, int]:
        idle = self.rank - self.active_rank
        return {"A": idle * self.in_features, "B": idle * self.out_features}

    def reset_parameters(self, init_weights: bool, site: SiteShape) -> None:
        nn.init.normal_(self.A, std=self.A.shape[1] ** -0.5)
        nn.init.normal_(self.mask_weight, std=self.mask_weight.shape[-1] ** -0.5)
        if self.has_value_gate:
            nn.init.zeros_(self.C)
        if init_weights:
            nn.init.zeros_(self.B)
        else:
            nn.init.normal_(self.B, std=self.B.shape[1] ** -0.5)

    def derive(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """A^T, B^T; the control sqrt(R) [C^T W^T], (R, 2 R), or (R, R) of one of the two; a task mask's logits, (1, R).

        A config has one of the last two at least. Mirrored: [A^T, -A^T], and the control without its factor.
        """
        a: torch.Tensor = self.A
        b: torch.Tensor = self.B
        if self.hadamard:  # H z = (H A) x and B H h = (B H) h
            a, b = hadamard_basis(a, b)
        wide = choice_dtype(dtype, a.device)
        a = a.to(dtype)
        control: list[torch.Tensor] = [self.C] if self.has_value_gate else []
        control += [] if self.is_task_mask else [self.mask_weight]
        factor = rank_root(a)
        if control and is_mirrored(a):
            a, factor = torch.cat((a, -a)), 1.0
        is_wide = not torch.is_grad_enabled() and a.dim() == 2  # of stacks only what rows take is widened, in a product
        weights = [(a.to(wide) if is_wide else a).mT, transposed(b, dtype)]
        if control:
            both = torch.cat(control, dim=-2) if len(control) > 1 else control[0]
            weights.append(transposed(both.to(wide) * factor, wide))
        if self.is_task_mask:
            weights.append(self.mask_weight.float().unsqueeze(-2))
        return tuple(weights)

    def transform(self, x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        if self.dropout:
            x = self.drop(x)
        z = choice_projection(x, weights[0])  # (N, R), or [z, -z]
        logits, gate = self.control(z, *weights[2:])
        scaling = self.scaling
        if z.shape[1] > self.rank:
            z = z[:, : self.rank]
            if gate is not None:  # 1 + tanh(g) = 2 sigmoid(2 g), and softplus_backward is z sigmoid(2 g)
                z, gate, scaling = torch.ops.aten.softplus_backward(z, gate, 2.0, 40.0), None, 2.0 * scaling
        elif gate is not None:
            gate = torch.tanh(gate)
        z = z.to(y.dtype)
        if self.carries_penalties(y):
            y = self.carry_penalty(y, logits)
        if self.observer is not None:
            self.observer.append(k_hot_mask(logits.detach(), self.active_rank).expand(z.shape[0], -1))
        is_soft = self.training and torch.is_grad_enabled()
        choice = self.active_rank, scaling, self.temperature, is_soft
        return masked_update(y, z, gate, logits, weights[1], *choice)

    def control(self, z: torch.Tensor, *control: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits W z/rms(z), (N, R), or (1, R) of a task's mask, float32, and C z/rms(z), from z (N, R) or [z, -z]."""
        if self.is_task_mask:
            logits = each_rows(control[-1])
            if len(control) == 1:
                return logits, None
        if z.shape[1] > self.rank:  # the mean of [z, -z] is 0, so that its layer norm is z / rms(z), in one operator
            unit = torch.nn.functional.layer_norm(z, z.shape[1:], eps=1e-38)[:, : self.rank]
        else:
            unit = z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1e-20)
        parts = torch.mm(unit, control[0]).split(self.rank, dim=1)
        gate = parts[0] if self.has_value_gate else None
        if self.is_task_mask:
            return logits, gate
        return parts[-1].float(), gate  # rounded: what is equal but for its sum's order is a tie

    @torch.no_grad()
    def gate_values(self, x: torch.Tensor) -> torch.Tensor:
        """m * (1 + tanh(C z/rms(z))), (N, R)."""
        weights = self.derive(x.dtype)
        logits, gate = self.control(choice_projection(x, weights[0]), *weights[2:])
        mask = k_hot_mask(logits, self.active_rank)
        return (mask if gate is None else mask * (1.0 + torch.tanh(gate))).expand(x.shape[0], -1)

    def carry_penalty(self, y: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """y with the squared deviation of each rank's use from k / R, for logits (N, R), or (1, R) of a task's mask."""
        if self.is_task_mask:  # of an old file: its use is 0 or 1
            mask = straight_through_k_hot(logits, self.active_rank, self.temperature)
            value = (mask - self.active_rank / mask.shape[1]).square().mean()
            return self.penalise(y, "balance", self.balance_strength, value, once=True)
        owner = self if self.twin_of is None else self.twin_of
        return owner.penalise_tokens(y, logits, self.expert if self.rows is None else self.rows.ids)

    def penalise_rows(self, y: torch.Tensor, values: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        mask = straight_through_k_hot(values, self.active_rank, self.temperature)
        return self.penalise(y, "balance", self.balance_strength, mask_balance(mask, self.active_rank, sequences))

    # caps: s B D A with D = diag(m (1 + tanh)); one D for all tokens, or any with k entries in [0, 2]

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
        a, kept = whole(self.A.detach()).double(), None
        if self.hadamard:
            a = hadamard_transform(a)
        if self.is_task_mask:
            kept = k_hot_mask(whole(self.mask_weight.detach()).float(), self.active_rank) > 0
        largest = 2.0 if self.has_value_gate else 1.0
        return RankMasks(a * self.scaling, self.active_rank, largest, kept, self.hadamard)

    def masked_a(self) -> torch.Tensor:
        """The A of the one update that all tokens meet, (R, in): H (m * (H A)) for the task's mask, A with k = R."""
        a = whole(self.A.detach())
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
        a, b = self.A.detach(), self.B.detach()
        if self.hadamard:
            a, b = hadamard_transform(a), hadamard_transform(b.t()).t()
        return a * gate.to(a.dtype).unsqueeze(1), b

    @staticmethod
    def weighted_fields(configs: Sequence[Any], weights: Sequence[float]) -> dict[str, Any]:
        return {"mask_scope": "task", "value_gate": False, "use_hadamard_path": False}

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


def is_mirrored(a: torch.Tensor) -> bool:
    """Whether A is read as [A, -A], (2 R, in): in inference on a GPU, where launches are what a decoding step costs:
    three fewer a site. Never for stacks, of each expert's.
    """
    return a.device.type != "cpu" and not torch.is_grad_enabled() and a.dim() == 2


def rank_root(a: torch.Tensor) -> float:
    """sqrt(R): |z| is sqrt(R) times rms(z)."""
    return float(a.shape[-2]) ** 0.5


class DynamicRankMaskModel(AdapterModel, config=DynamicRankMaskConfig, adapter=DynamicRankMaskAdapter):
    """A model with PT2 at W_O and W_down; made by `get_peft_model(model, DynamicRankMaskConfig(...))`."""
