r"""Rows at fused experts: which token each belongs to, so that a penalty of tokens counts there what it does elsewhere.

An adapter there meets the rows of one expert, or of all of them; how often a sequence's tokens use a rank is known when
the pass through the experts is over. Until then a `Routing` holds what the rows gave. A sequence's rows are the pairs
of its tokens and their experts; where each expert has parameters of its own, each is judged by its rows,

    p = sum_s weight_s sum_e (n_se / n_s) p_se,   n_se rows of sequence s at expert e, n_s of it altogether.

The order of the rows is that of transformers' implementations of the experts interface.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bem_peft.tuners.calls.penalty_call import Sequences

if TYPE_CHECKING:
    from bem_peft.tuners.calls.penalised import Penalised

CHOICES = ("top_k_index", "router_indices")  # the experts' second argument: which of them a token takes


def tells_tokens(experts: nn.Module) -> bool:
    """Whether the rows of these experts come in an order that is known: they are of transformers' experts interface."""
    arguments = list(inspect.signature(type(experts).forward).parameters)
    return hasattr(experts, "has_gate") and len(arguments) > 2 and arguments[2] in CHOICES


@dataclass(eq=False)
class Routing:
    """One pass through fused experts, of transformers' `implementation`, with penalties of tokens.

    choice: (T, k), the experts of each token. rows: the tokens of the rows that an adapter meets now.
    """

    choice: torch.Tensor
    implementation: str
    rows: torch.Tensor | None = None
    found: list[tuple[Penalised, torch.Tensor, torch.Tensor, torch.Tensor | None]] = field(default_factory=list)

    def meet(self, experts: Any, site: str) -> None:
        """The next rows are those of `experts`, an id or the ids of the rows.

        Raises:
            RuntimeError: another implementation than those whose order is known.
        """
        count = self.choice.shape[1]
        if self.implementation == "eager":  # by place among the token's experts, then by token
            self.rows = torch.where((self.choice == experts).t())[1]
        elif self.implementation == "batched_mm":
            self.rows = torch.arange(self.choice.numel(), device=self.choice.device) // count
        elif self.implementation == "grouped_mm":
            self.rows = torch.sort(self.choice.reshape(-1)).indices // count
        else:
            raise RuntimeError(
                f"a penalty of tokens at {site}: the order of the rows of experts_implementation="
                f"{self.implementation!r} is not known; choose eager, batched_mm or grouped_mm, or set it to 0."
            )

    def take(self, order: torch.Tensor) -> None:
        """The rows come in another order."""
        assert self.rows is not None
        self.rows = self.rows[order]

    def add(self, owner: Penalised, values: torch.Tensor, experts: int | torch.Tensor | None) -> None:
        """What the rows gave to `owner`; experts: whose parameters they met, where each has its own."""
        assert self.rows is not None
        if isinstance(experts, int):
            experts = torch.full_like(self.rows, experts)
        self.found.append((owner, values, self.rows, experts))

    def carry(self, out: torch.Tensor) -> torch.Tensor:
        """What leaves the experts, carrying the penalties of all rows."""
        owners: list[Penalised] = []
        for owner, *_ in self.found:
            if not any(owner is known for known in owners):
                owners.append(owner)
        for owner in owners:
            of_owner = [part for part in self.found if part[0] is owner]
            values = torch.cat([values for _, values, _, _ in of_owner])
            rows = torch.cat([rows for _, _, rows, _ in of_owner])
            experts = [part[3] for part in of_owner if part[3] is not None]
            sequences = of_rows(owner.sequences(self.choice.shape[0]), rows, experts, owner.num_experts)
            out = owner.penalise_rows(out, values, sequences)
        return out


def of_rows(
    sequences: Sequences, rows: torch.Tensor, experts: Sequence[torch.Tensor], num_experts: int | None
) -> Sequences:
    """The sequences of the rows' tokens, each split by expert where `experts` says whose rows they are."""
    index, real, weight = sequences.index[rows], sequences.real[rows], sequences.weight
    if not experts or num_experts is None:
        return Sequences(index, real, weight)
    whole = torch.zeros_like(weight).index_add(0, index, real)
    index = index * num_experts + torch.cat(list(experts))
    part = weight.new_zeros(weight.shape[0] * num_experts).index_add(0, index, real)
    weight = (weight / whole.clamp_min(1.0)).repeat_interleave(num_experts) * part
    return Sequences(index, real, weight)
