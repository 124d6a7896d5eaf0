"""Models around the weights of another, which stays as it is: what an adapter costs is counted on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from bem_peft.budget.fake_run import is_plain

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def copy_around_weights(model: AnyModule) -> AnyModule:
    """New modules around the same weights; freezing a parameter of the copy leaves the model's own as it is."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():  # PEFT freezes what it adapts: not the model's own parameters
        same = nn.Parameter(parameter.detach(), requires_grad=False) if is_plain(parameter) else parameter
        memo[id(parameter)] = same
    return copy.deepcopy(model, memo)


def adapted_copy(model: nn.Module, config: PeftConfig) -> PeftModel:
    """`get_peft_model(model, config)` on new modules around the same weights; `model` stays as it is.

    Raises:
        ValueError: `model` is adapted already.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model is adapted already: give the base model, before get_peft_model or add_adapter.")
    return get_peft_model(copy_around_weights(model), copy.deepcopy(config))


def unadapted_copy(model: PeftModel) -> nn.Module:
    """The base model of `model`, new modules around the same weights."""
    base: nn.Module = copy_around_weights(model).unload()
    return base


def adapted_sites(model: PeftModel) -> list[str]:
    """Names of the modules that the adapter of `model` stands at."""
    return [name for name, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)]


def at_sites_of(anchor: PeftConfig, adapted: Callable[[], PeftModel]) -> PeftConfig:
    """`anchor` as it is, or, where it names no target_modules, a copy at the sites of `adapted()`.

    A model that is built for this alone is built on the meta device.

    Raises:
        ValueError: these are fused experts, at which `anchor`'s method adapts no module.
    """
    if getattr(anchor, "target_modules", "") is not None:
        return anchor
    placed = copy.deepcopy(anchor)
    with torch.device("meta"):
        model = adapted()
    placed.target_modules = adapted_sites(model)
    fused = [name for name, m in model.get_base_model().named_modules() if hasattr(m, "experts_site")]
    if fused and not hasattr(anchor, "expert_sharing"):
        raise ValueError(
            f"the anchor {type(anchor).__name__} names no sites, and the adapter's own are fused experts ({fused[0]}, "
            "...), whose parameters PEFT adapts whole, at another cost: set the sizes yourself; or name the anchor's "
            "target_modules, or target_parameters with match=['params'] (`match_budget`)."
        )
    return placed
