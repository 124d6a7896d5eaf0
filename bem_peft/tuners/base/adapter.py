"""What the methods share: the contract of one adapter at one site.

An `Adapter` maps what enters a site, x (..., in), and what the base layer returned, y (..., out), to y' (..., out).
A fresh adapter returns y. Its parameters are direct attributes, so that a saved key reads
`<site>.<prefix>_<container>.<parameter>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bem_peft.kernels import backend, cpp
from bem_peft.tuners.base.adapter_config import AdapterConfig
from bem_peft.tuners.base.expert_twins import by_expert
from bem_peft.tuners.base.forms import Formula
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.steps.sharded import full_size


@dataclass(frozen=True)
class SiteShape:
    """What an adapter may know of its site. `weight()` gives W (out, in), dequantised, and is called at most once.

    is_output: whether it is the W_O of a mixer; None: the model's structure is not known.
    """

    name: str
    in_features: int
    out_features: int
    num_heads: int | None = None
    weight: Callable[[], torch.Tensor] | None = None
    is_output: bool | None = None


class Adapter(Formula):
    """The maths of one method at one site; see the module docstring.

    A subclass defines `reset_parameters`, `derive` (what the forward reads: the parameters, folded, in its dtype)
    and `transform` (the formula, on rows).
    """

    variant: ClassVar[str] = ""  # PT1 to PT4
    lr_groups: ClassVar[dict[str, str]] = {}  # parameter -> group of the optimizer
    obsolete_keys: ClassVar[tuple[str, ...]] = ()  # beginnings of keys that older files hold and nothing reads
    retrieval: str = "none"  # what it reads of retrieval in a call: "quality", "scores" or "none"
    factors: ClassVar[tuple[str, ...]] = ()  # what writes into y; each expert's own with expert_sharing="factors"
    at_experts: bool = False  # its rows are tokens that a router chose
    experts_per_token: int | None = None  # how many of them a token reaches; None: unknown
    stacked: tuple[str, ...] = ()  # those parameters, (experts, ...)
    reads_output: ClassVar[bool] = False  # y' depends on y otherwise than by y + update(x)
    moves_zero: bool = False  # y' of x = 0 and y = 0 is not 0
    reads_attention_rows: bool = False  # reads the exact attention rows of its site's heads
    notice: str | None = None  # what a user is told once, when adapters of a new config are added
    is_mergeable: bool = False
    is_summable: bool = False  # a weighted sum of its updates is an update of the method
    merge_refusal: str = (
        "its update depends on the token, so no weight equals it; use `export_lora` for an approximation"
    )

    def __init__(self, config: AdapterConfig, site: SiteShape, call: CallState) -> None:
        super().__init__()
        if backend.chosen.is_cpp:
            cpp.build()  # before anything counts its products
        self.site_name = site.name
        self.in_features, self.out_features = site.in_features, site.out_features
        self.scaling = float(config.scaling)
        self.call = call

    def reset_parameters(self, init_weights: bool, site: SiteShape) -> None:
        """Fill the parameters; with `init_weights` the adapter is the identity."""
        raise NotImplementedError

    def idle_parameters(self) -> dict[str, int]:
        """Parameter -> how many of its numbers one token does not use; of each expert, where it is stacked."""
        return {}

    def num_active_parameters(self) -> int:
        """Parameters that one token uses; of stacked ones, those of the experts that it reaches."""
        idle, active = self.idle_parameters(), 0
        for name, parameter in self.named_parameters():
            size, times = full_size(parameter), 1
            if name in self.stacked:
                assert self.num_experts is not None
                size, times = size // self.num_experts, self.experts_per_token or self.num_experts
            active += times * (size - idle.get(name, 0))
        return active

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, may_overwrite: bool = False, experts: Any = None
    ) -> torch.Tensor:
        """As `Formula.forward`; experts: the id, or the ids (N,), of the experts whose rows these are."""
        if self.num_experts is not None:
            return by_expert(self, x, y, experts)
        return super().forward(x, y, may_overwrite)

    # merging

    def merge_obstacle(self, has_bias: bool) -> str | None:
        """Why the adapter cannot be merged into a layer with or without a bias; None: it can."""
        return None if self.is_mergeable else self.merge_refusal

    def refuse_merge(self, has_bias: bool) -> None:
        """Raise ValueError where there is an obstacle to merging."""
        obstacle = self.merge_obstacle(has_bias)
        if obstacle is not None:
            raise ValueError(f"{type(self).__name__} at {self.site_name} cannot be merged: {obstacle}.")

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W (out, in) and bias with the adapter in them. Raises ValueError where the update is not linear in x."""
        self.refuse_merge(bias is not None)
        raise NotImplementedError

    def unmerge_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inverse of `merge_into`."""
        self.refuse_merge(bias is not None)
        raise NotImplementedError

    # sums (`weighted`), of methods that have `is_summable`

    @staticmethod
    def weighted_fields(configs: Sequence[Any], weights: Sequence[float]) -> dict[str, Any]:
        """Fields of the sum's config, those of `weighted_sizes` left out. Raises ValueError where there are none."""
        raise NotImplementedError

    @staticmethod
    def weighted_sizes(parts: Sequence[tuple[Any, float]]) -> dict[str, Any]:
        """Fields of the sum's config that a site may have of its own. Raises ValueError where there are none."""
        raise NotImplementedError

    def fill_weighted(self, parts: Sequence[tuple[Any, float]]) -> None:
        """Become  sum_i w_i update_i  of the adapters."""
        raise NotImplementedError

    # loading

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for key in [key for key in state_dict if key.startswith(tuple(prefix + old for old in self.obsolete_keys))]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters())
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling}, {sizes}"
