"""Caps on the norms of a model's additive updates, and what the norms are now; see `base.low_rank`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bem_peft import field_checks as check
from bem_peft.tuners.base.low_rank import LowRankAdapter
from bem_peft.tuners.calls.loop import attach_to_trainers


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
