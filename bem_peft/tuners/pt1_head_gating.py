r"""PT1, head-group gating at W_O:  y' = y + s sum_g gate_g(x) B_g A_g x_g.

The input x of W_O is the heads' outputs side by side; x_g are the heads of group g. A_g (r_g, in / G),
B_g (out, r_g), zero at the start; s = `scaling`. gate = 2 sigmoid(z / temperature) with z = W f + b, f the statistics
of the heads (see `attention_stats`) and b, W zero at the start, so that every gate is 1.
Stored: A (sum r_g, in / G), B (out, sum r_g), W (G, 2 heads), b (G).

Source: the group split is that of multi-head adaptation as in He et al., Towards a unified view of parameter-efficient
transfer learning, 2022, arXiv:2110.04366 (multi-head parallel adapter); theirs has no gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from bem_peft import field_checks as check
from bem_peft.kernels.head_gating import gated_update
from bem_peft.sites.find import ATTENTION_OUTPUT
from bem_peft.tuners.base.adapter import SiteShape
from bem_peft.tuners.base.adapter_config import AdapterConfig, LowRankConfig, default_of
from bem_peft.tuners.base.forms import transposed
from bem_peft.tuners.base.low_rank import LowRankAdapter, root_of
from bem_peft.tuners.base.model import AdapterModel
from bem_peft.tuners.calls.attention_stats import AttentionRows, head_output_statistics
from bem_peft.tuners.calls.call_frame import take_rows
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.penalty import decorrelation, gate_entropy
from bem_peft.tuners.calls.retrieval_feature import RetrievalReader
from bem_peft.tuners.head_groups import resolve_head_groups
from bem_peft.tuners.steps.sharded import whole


@dataclass
class HeadGroupGatingConfig(LowRankConfig):
    """Config of PT1, y' = y + s sum_g gate_g(x) B_g A_g x_g at W_O."""

    num_groups: int = field(
        default=4, metadata={"help": "Groups of heads, G; where it does not divide the heads, the nearest divisor."}
    )
    strict_groups: bool = field(
        default=False, metadata={"help": "True: a `num_groups` that does not divide is an error."}
    )
    num_heads: int | None = field(
        default=None, metadata={"help": "Heads side by side in W_O's input; None: read from the model."}
    )
    rank_per_group: int | list[int] = field(
        default=4, metadata={"help": "Rank r_g of every group, or a list of one rank a group."}
    )
    total_rank: int | None = field(
        default=None, metadata={"help": "Sum of the groups' ranks, spread evenly; in place of `rank_per_group`."}
    )
    gate_temperature: float = field(default=1.0, metadata={"help": "Divides the gate's logit, > 0."})
    gate_dropout: float = field(default=0.0, metadata={"help": "Share of gates set to 0 while training, in [0, 1)."})
    decorrelation_strength: float = field(
        default=0.0,
        metadata={"help": "Weight of the mean squared correlation between the gates over a sequence's tokens."},
    )
    decorrelation_anneal_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps in which `decorrelation_strength` falls to 0, linearly; None: it stays."},
    )
    gate_entropy_strength: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean binary entropy of gate/2: above 0 the gates are led to decide (0 or 2), "
            "below 0 to stay undecided (1)."
        },
    )
    attention_stats: str = field(
        default="output",
        metadata={
            "help": "'output': log energy and spread of the heads' outputs; 'exact': entropy and variance of the "
            "attention rows themselves."
        },
    )
    retrieval: str = field(
        default="none",
        metadata={
            "help": "'quality': the gates read `retrieval_quality` in [0, 1]; 'scores': they read `retrieval_scores` "
            "through a learned scorer; 'none'."
        },
    )

    method: ClassVar[str] = "bem_head_gating"
    roles: ClassVar[tuple[str, ...]] = (ATTENTION_OUTPUT,)
    aliases: ClassVar[tuple[str, ...]] = ("pt1", "head_group_gating")
    neighbours: ClassVar[Mapping[str, str]] = {
        **LowRankConfig.neighbours,
        "r": "`rank_per_group`, a group's, or `total_rank`, of all groups together",
        "rank": "`rank_per_group`, a group's, or `total_rank`, of all groups together",
    }
    rank_fields: ClassVar[tuple[str, ...]] = ("rank_per_group", "total_rank", "num_groups", "num_heads")
    size_fields: ClassVar[tuple[str, ...]] = ("total_rank",)  # what a budget search may change

    def __post_init__(self) -> None:
        check.check_int(self, "num_groups")
        check.check_bool(self, "strict_groups")
        if self.num_heads is not None:
            check.check_int(self, "num_heads")
        ranks = self.rank_per_group if isinstance(self.rank_per_group, list) else [self.rank_per_group]
        for rank in ranks:
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"`rank_per_group` = {self.rank_per_group!r}: must be an int or a list of ints.")
        if not ranks or min(ranks) < 1:
            raise check.field_error("rank_per_group", self.rank_per_group, "every rank must be at least 1")
        if self.total_rank is not None:
            check.check_int(self, "total_rank")
        check.check_number(self, "gate_temperature", 0.0, exclusive=True)
        check.check_share(self, "gate_dropout")
        check.check_number(self, "decorrelation_strength", 0.0)
        if self.decorrelation_anneal_steps is not None:
            check.check_int(self, "decorrelation_anneal_steps")
            if not self.decorrelation_strength:
                name, rule = "decorrelation_anneal_steps", "needs `decorrelation_strength` above 0"
                raise check.field_error(name, self.decorrelation_anneal_steps, rule, "set both or neither")
        check.check_number(self, "gate_entropy_strength")
        check.check_choice(self, "attention_stats", ("output", "exact"))
        check.check_choice(self, "retrieval", ("none", "quality", "scores"))
        super().__post_init__()
        if not self.is_from_file:
            self._say_pattern_in_full()

    def _say_pattern_in_full(self) -> None:
        """A `rank_per_group` beside `total_rank` unsets it, which is said: files of older versions do not say it."""
        if self.total_rank is not None:
            self.rank_pattern = {key: self.implied(self.pattern_sizes(s)) for key, s in self.rank_pattern.items()}

    def inert_fields(self) -> dict[str, str]:
        return {} if self.total_rank is None else {"rank_per_group": "`total_rank` takes its place"}

    def implied(self, sizes: dict[str, Any]) -> dict[str, Any]:
        """Where one of `rank_per_group` and `total_rank` is given, the other is not."""
        if "rank_per_group" in sizes and "total_rank" not in sizes:
            return {**sizes, "total_rank": None}
        if "total_rank" in sizes and "rank_per_group" not in sizes:
            return {**sizes, "rank_per_group": default_of(self, "rank_per_group")}
        return sizes

    def with_sizes(self, **sizes: int) -> AdapterConfig:
        """Where `total_rank` alone changes, it takes the place of `rank_per_group`."""
        resized = super().with_sizes(**self.implied(sizes))
        if isinstance(resized, HeadGroupGatingConfig) and not self.is_from_file:
            resized._say_pattern_in_full()
        return resized


class HeadGroupGatingAdapter(RetrievalReader, LowRankAdapter):
    """y' = y + s sum_g gate_g(x) B_g A_g x_g."""

    variant = "PT1"
    lr_groups = {
        "A": "projection",
        "B": "projection",
        "gate_weight": "controller",
        "gate_bias": "controller",
        **RetrievalReader.lr_groups,
    }
    kernel = "head_gating"
    has_gates = True
    steps_taken: torch.Tensor

    def __init__(self, config: HeadGroupGatingConfig, site: SiteShape, call: CallState) -> None:
        super().__init__(config, site, call)
        groups = resolve_head_groups(config, site)
        self.num_heads, self.ranks, self.num_groups = groups.heads, groups.ranks, len(groups.ranks)
        self.is_even, self.slots = len(set(groups.ranks)) == 1, groups.slots
        if site.is_output is False and config.num_heads is None and not config.is_from_file:
            name, width = site.name.rpartition(".")[2], site.in_features // self.num_groups
            self.notice = (
                f"PT1 at {name}, whose input is no heads side by side: each of its {self.num_groups} groups is {width} "
                "neighbouring channels, and the gates read their energy. Leave `target_modules` out to adapt W_O, or "
                f"give `num_heads` if {name} does read heads."
            )
        self.temperature, self.gate_dropout = config.gate_temperature, config.gate_dropout
        self.decorrelation_strength = config.decorrelation_strength
        self.reads_attention_rows = config.attention_stats == "exact"
        self.has_operator = not self.reads_attention_rows and config.retrieval == "none"
        self.gate_entropy_strength = config.gate_entropy_strength
        self.token_penalties = tuple(
            name for name in ("decorrelation_strength", "gate_entropy_strength") if getattr(config, name)
        )
        self.is_penalised = bool(self.token_penalties)
        self.reads_call = config.retrieval != "none" or self.is_penalised
        self.anneal_steps = config.decorrelation_anneal_steps
        if self.anneal_steps is not None:
            self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))  # saved: a resumed run goes on
            self.watch()
        self.A = nn.Parameter(torch.empty(sum(self.ranks), site.in_features // self.num_groups))
        self.B = nn.Parameter(torch.empty(site.out_features, sum(self.ranks)))
        self.gate_weight = nn.Parameter(torch.empty(self.num_groups, 2 * self.num_heads))
        self.gate_bias = nn.Parameter(torch.empty(self.num_groups))
        self.add_retrieval_parameters(config.retrieval, self.num_groups)

    def reset_parameters(self, init_weights: bool, site: SiteShape) -> None:
        nn.init.normal_(self.A, std=self.A.shape[1] ** -0.5)
        nn.init.zeros_(self.gate_weight)
        nn.init.zeros_(self.gate_bias)
        if init_weights:
            nn.init.zeros_(self.B)
        else:
            nn.init.normal_(self.B, std=self.B.shape[1] ** -0.5)
        self.reset_retrieval_parameters()

    def derive(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """A as (G, in/G, r), B^T, and the controller's weight and bias in float32."""
        a: torch.Tensor = self.A
        widest = max(self.ranks)
        if not self.is_even:
            padded = a.new_zeros(self.num_groups * widest, a.shape[1])
            a = padded.index_copy(0, torch.tensor(self.slots, device=a.device), a)
        grouped = a.view(self.num_groups, widest, -1).transpose(1, 2)
        return (
            grouped.to(dtype),
            transposed(self.B, dtype),
            transposed(self.gate_weight, torch.float32),
            self.gate_bias.float(),
        )

    def derive_few_rows(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """As `derive`, but A as one block-diagonal (in, G r): G times the multiplications, a quarter of the calls."""
        a, *rest = self.derive(dtype)
        return torch.block_diag(*a), *rest

    def transform(self, x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        a, b_t, gate_weight, gate_bias = weights
        logits = self.logits(self.statistics(x), gate_weight, gate_bias)
        gate = torch.sigmoid(logits)  # half the gate, (N, G), float32
        if self.carries_penalties(y):
            y = self.carry_penalties(y, logits, gate)
        if self.gate_dropout and self.training:
            gate = torch.nn.functional.dropout(gate, self.gate_dropout)
        if self.dropout:
            x = self.drop(x)
        if a.dim() == 2:
            low = torch.mm(x, a).view(x.shape[0], self.num_groups, a.shape[1] // self.num_groups)
        else:
            groups = x.view(x.shape[0], self.num_groups, x.shape[1] // self.num_groups).transpose(0, 1)
            low = torch.bmm(groups, a).transpose(0, 1)
        return gated_update(y, low, gate, b_t, 2.0 * self.scaling, None if self.is_even else self.slots)

    def statistics(self, x: torch.Tensor) -> torch.Tensor:
        """The two statistics of each head, (N, 2 heads), float32."""
        if not self.reads_attention_rows:
            return head_output_statistics(x, self.num_heads)
        rows: AttentionRows | None = take_rows(self)
        if rows is None:
            raise RuntimeError(
                f"attention_stats='exact': no attention row reached {self.site_name}; its attention did not go through "
                "transformers' attention interface in this call. Use attention_stats='output'."
            )
        return rows.features().to(x.device)

    def gate_values(self, x: torch.Tensor) -> torch.Tensor:
        return self.gates(self.statistics(x))

    def gates(self, statistics: torch.Tensor) -> torch.Tensor:
        """2 sigmoid(z / temperature), (N, G), for the statistics (N, 2 heads) of N tokens."""
        weight, bias = self.gate_weight.float().t(), self.gate_bias.float()
        return torch.sigmoid(self.logits(statistics, weight, bias)) * 2.0

    def logits(self, statistics: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """z / temperature, (N, G); the retrieval feature is 2q - 1, and 0 where no quality was given."""
        logits = torch.addmm(bias, statistics, weight)
        if self.retrieval != "none":
            logits = logits + self.retrieval_feature(statistics.shape[0]) * self.retrieval_weight.float()
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits

    def carry_penalties(self, y: torch.Tensor, logits: torch.Tensor, half_gates: torch.Tensor) -> torch.Tensor:
        """y with the penalties of the gates 2 sigmoid(logits), (N, G)."""
        sequences = self.sequences(half_gates.shape[0])
        if self.decorrelation_strength:
            strength = self.decorrelation_strength * self.annealing()
            y = self.penalise(y, "decorrelation", strength, decorrelation(half_gates, sequences))
        if self.gate_entropy_strength:
            y = self.penalise(y, "gate_entropy", self.gate_entropy_strength, gate_entropy(logits, sequences))
        return y

    def annealing(self) -> float | torch.Tensor:
        """The share of `decorrelation_strength` that holds now, from 1 down to 0."""
        return 1.0 if self.anneal_steps is None else (1.0 - self.steps_taken / self.anneal_steps).clamp_min(0.0)

    def after_optimizer_step(self, is_first: bool) -> None:
        super().after_optimizer_step(is_first)
        if self.anneal_steps is not None:
            self.steps_taken += is_first

    def right_root(self) -> tuple[torch.Tensor, torch.Tensor]:
        roots = [root_of(rows) for rows in whole(self.A).double().split(self.ranks)]
        largest = 2.0 * self.scaling  # a gate is at most 2; groups read different inputs, so that none cancels another
        root, inverse = (torch.block_diag(*parts) for parts in zip(*roots, strict=True))
        return root * largest, inverse / largest

    def lora_factors(self, gate: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A (sum r_g, in) and B (out, sum r_g) with s B A the update at constant gates (G,), all 1 by default."""
        width, start, rows = self.A.shape[1], 0, self.A.new_zeros(self.A.shape[0], self.in_features)
        gate = torch.ones(self.num_groups, device=self.A.device) if gate is None else gate
        for g, rank in enumerate(self.ranks):
            piece = self.A.detach()[start : start + rank]
            rows[start : start + rank, g * width : (g + 1) * width] = piece * gate[g]
            start += rank
        return rows, self.B.detach()


class HeadGroupGatingModel(AdapterModel, config=HeadGroupGatingConfig, adapter=HeadGroupGatingAdapter):
    """A model with PT1 at W_O; made by `get_peft_model(model, HeadGroupGatingConfig(...))`."""
