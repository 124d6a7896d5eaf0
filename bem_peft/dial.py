"""One dial: `budget="lora:r=8"` of a config. Its sizes are chosen when the model is known, and a learning rate."""

from __future__ import annotations

import dataclasses

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from bem_peft.budget.match import match_sizes
from bem_peft.training.suggested_rates import is_measured, suggested_rate
from bem_peft.tuners.base.adapter_config import AdapterConfig


def choose_sizes(model: nn.Module, config: AdapterConfig) -> None:
    """Give `config` the sizes that cost on `model` what the adapter `config.budget` costs at the same sites.

    Raises:
        ValueError: no sizes are within 5 % of it, or `model` is adapted already.
    """
    assert config.budget is not None
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"`budget` = {config.budget!r}: the model has an adapter already, and sizes are counted on the base alone; "
            "choose them before, match_budget(base, config, budget).config, and add that."
        )
    match = match_sizes(model, config, config.budget)
    if not match.is_met:
        raise ValueError(f"`budget` = {config.budget!r} is not met: {match}")
    for field in dataclasses.fields(config):
        if field.name != "budget":
            setattr(config, field.name, getattr(match.config, field.name))


def rate_of(model: nn.Module, config: PeftConfig) -> tuple[float, str] | None:
    """The learning rate that was measured for an adapter on the base `model`, and where it comes from."""
    if not is_measured(config):
        return None
    found = suggested_rate(model, config)
    return found.learning_rate, found.source
