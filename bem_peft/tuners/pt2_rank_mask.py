r"""PT2, dynamic rank mask at W_O and W_down:  y' = y + s B (m(x) * (1 + tanh(C z/rms(z))) * z),  z = A x.

A (R, in), B (out, R), zero at the start; C (R, R), zero at the start (`value_gate`); s = `scaling`; m(x) in {0, 1}^R
with exactly k ones a token: the k largest of the logits W z, W (R, R). The order of the logits does not depend on the
length of z, nor, by the dtype in which z and they are computed (`kernels.rank_mask`), on what else is in the batch.
`use_hadamard_path`: A and B are read as H A and B H with the orthonormal Walsh-Hadamard matrix H, so that a mask drops
a direction, not a column. Every token executes the full R; k are active. With k = R nothing is chosen: a LoRA, gated by
its own values if `value_gate`. `num_blocks` G: rank i of A reads the part floor(i G / R) of x, one of G equal ones, so
that A is stored as (R, in / G), and its parameters go into more ranks of B; H A reads all of x.

Source: Valipour et al., DyLoRA, 2023, arXiv:2210.07558 and Zhang et al., AdaLoRA, 2023, arXiv:2303.10512 choose ranks
for the whole run; ours chooses them for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from bem_peft import field_checks as check
from bem_peft.kernels.hadamard import hadamard_basis, hadamard_transform, is_power_of_two
from bem_peft.kernels.rank_mask import (
    choice_dtype,
    choice_projection,
    k_hot_mask,
    masked_update,
    placed_blocks,
    straight_through_k_hot,
)
from bem_peft.tuners.base.adapter import SiteShape
from bem_peft.tuners.base.adapter_config import AdapterConfig, LowRankConfig
from bem_peft.tuners.base.expert_products import each_rows
from bem_peft.tuners.base.forms import transposed
from bem_peft.tuners.base.model import AdapterModel
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.penalty import mask_balance
from bem_peft.tuners.calls.penalty_call import Sequences
from bem_peft.tuners.masked_update import MaskedUpdate


@dataclass
class DynamicRankMaskConfig(LowRankConfig):
    """Config of PT2, y' = y + s B (m(x) * A x) at W_O and W_down."""

    total_rank: int = field(default=16, metadata={"help": "R, the ranks that are computed."})
    active_rank: int = field(default=8, metadata={"help": "k, the ranks that are kept for a token, at most R."})
    use_hadamard_path: bool = field(
        default=True, metadata={"help": "Mask directions of the Walsh-Hadamard basis; R must be a power of two."}
    )
    value_gate: bool = field(default=True, metadata={"help": "Multiply kept ranks by 1 + tanh(C z / rms(z))."})
    num_blocks: int = field(
        default=1,
        metadata={"help": "Equal parts of the input; a rank reads one. Must divide `total_rank` and the width."},
    )
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
    rank_fields: ClassVar[tuple[str, ...]] = ("total_rank", "active_rank", "num_blocks")
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
        check.check_int(self, "num_blocks")
        if self.total_rank % self.num_blocks:
            raise check.field_error("num_blocks", self.num_blocks, f"must divide `total_rank` = {self.total_rank}")
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


class DynamicRankMaskAdapter(MaskedUpdate):
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
        self.is_whole, self.num_blocks = config.active_rank == rank, config.num_blocks
        if site.in_features % config.num_blocks:
            rule = f"must divide the input width {site.in_features} of {site.name}"
            raise check.field_error("num_blocks", config.num_blocks, rule, "1, 2, 4 and 8 divide nearly all")
        self.hadamard, self.is_task_mask = config.use_hadamard_path, config.mask_scope == "task"
        self.has_value_gate = config.value_gate
        self.balance_strength = config.balance_strength
        self.is_penalised = self.reads_call = config.balance_strength > 0.0
        self.token_penalties = ("balance_strength",) if self.is_penalised and not self.is_task_mask else ()
        self.is_mergeable = self.is_summable = self.has_one_mask
        if self.is_task_mask and self.has_value_gate:
            self.merge_refusal = "its value gate depends on the token; set `value_gate=False` with a task mask"
        self.A = nn.Parameter(torch.empty(rank, site.in_features // self.num_blocks))
        self.B = nn.Parameter(torch.empty(site.out_features, rank))
        shape = (rank,) if self.is_task_mask else (rank, rank)
        self.mask_weight = nn.Parameter(torch.empty(shape))
        if self.has_value_gate:
            self.C = nn.Parameter(torch.empty(rank, rank))

    def idle_parameters(self) -> dict[str, int]:
        idle = self.rank - self.active_rank
        return {"A": idle * self.A.shape[-1], "B": idle * self.out_features}

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

        A config has one of the last two at least. Mirrored: [A^T, -A^T], and the control without its factor. Of blocks
        A^T is (G, in / G, R / G), and H (R, R), with `use_hadamard_path`, comes last.
        """
        if self.num_blocks == 1 or self.at_experts:
            return self.derive_few_rows(dtype)
        a_t, *rest = self._derived(self.A, dtype, is_folded=False)
        parts = a_t.mT.unflatten(0, (self.num_blocks, -1)).mT
        if not self.hadamard:
            return parts, *rest
        wide = choice_dtype(dtype, a_t.device)
        return parts, *rest, hadamard_transform(torch.eye(self.rank, dtype=wide, device=a_t.device))

    def derive_few_rows(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """As `derive` for one block; of several one matrix A^T: G times the multiplications, in fewer calls."""
        return self._derived(placed_blocks(self.A, self.num_blocks), dtype, is_folded=self.hadamard)

    def _derived(self, a: torch.Tensor, dtype: torch.dtype, is_folded: bool) -> tuple[torch.Tensor, ...]:
        """`derive` for this A; is_folded: it is to be read as H A."""
        b: torch.Tensor = self.B
        if is_folded:  # H z = (H A) x and B H h = (B H) h
            a, b = hadamard_basis(a, b)
        elif self.hadamard:
            b = hadamard_transform(b.mT).mT
        wide = choice_dtype(dtype, a.device)
        a = a.to(dtype)
        control: list[torch.Tensor] = [self.C] if self.has_value_gate else []
        control += [] if self.is_task_mask else [self.mask_weight]
        factor = rank_root(a)
        if control and self.is_mirrored(a):
            a, factor = torch.cat((a, -a)), 1.0
        is_wide = not torch.is_grad_enabled() and a.dim() == 2  # of stacks only what rows take is widened, in a product
        weights = [(a.to(wide) if is_wide else a).mT, transposed(b, dtype)]
        if control:
            both = torch.cat(control, dim=-2) if len(control) > 1 else control[0]
            weights.append(transposed(both.to(wide) * factor, wide))
        if self.is_task_mask:
            weights.append(self.mask_weight.float().unsqueeze(-2))
        return tuple(weights)

    def is_mirrored(self, a: torch.Tensor) -> bool:
        """Whether A is read as [A, -A], (2 R, in): in inference on a GPU, where launches are what a decoding step
        costs: three fewer a site. Never for blocks, nor for stacks, of each expert's.
        """
        is_one = self.num_blocks == 1 and a.dim() == 2
        return is_one and a.device.type != "cpu" and not torch.is_grad_enabled()

    def projection(self, x: torch.Tensor, a_t: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """z (N, R), or [z, -z], and what `derive` gives after A^T and B^T, without H."""
        z = choice_projection(x, a_t)
        if self.hadamard and isinstance(a_t, torch.Tensor) and a_t.dim() == 3:
            *control, mix = rest
            return torch.mm(z, mix), *control
        return z, *rest

    def transform(self, x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        if self.dropout:
            x = self.drop(x)
        z, *control = self.projection(x, weights[0], *weights[2:])  # (N, R), or [z, -z]
        logits, gate = self.control(z, *control)
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
        a_t, _, *rest = self.derive(x.dtype)
        logits, gate = self.control(*self.projection(x, a_t, *rest))
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


def rank_root(a: torch.Tensor) -> float:
    """sqrt(R): |z| is sqrt(R) times rms(z)."""
    return float(a.shape[-2]) ** 0.5


class DynamicRankMaskModel(AdapterModel, config=DynamicRankMaskConfig, adapter=DynamicRankMaskAdapter):
    """A model with PT2 at W_O and W_down; made by `get_peft_model(model, DynamicRankMaskConfig(...))`."""
