"""Learning rates that were best where methods were compared, each with its own search.

benchmarks/quality: SmolLM2-135M-Instruct, 48 steps of 8 sequences, AdamW, cosine schedule, one seed of each of three
tasks (archaic to modern English; records to JSON; a meaning's noun). Of five rates or more, half an octave apart, the
lowest point of a parabola through their losses on Slice-A, at the mean of the tasks (rates.csv). Sizes: LoRA r=8's
parameters at the same sites.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from bem_peft.budget.copies import adapted_copy, unadapted_copy
from bem_peft.budget.site_cost import ModelCost


class Measured(NamedTuple):
    """The system of the searches, its best rate, and the lowest and highest that was best for a task."""

    system: str
    rate: float
    lowest: float
    highest: float


# by PEFT type
MEASURED: Mapping[str, Measured] = {
    "LORA": Measured("lora_both", 6.8e-3, 4.9e-3, 8.5e-3),
    "BEM_HEAD_GATING": Measured("pt1_o", 9.4e-3, 6.6e-3, 1.4e-2),
    "BEM_RANK_MASK": Measured("pt2", 5.0e-3, 3.6e-3, 6.9e-3),
    "BEM_KRONECKER": Measured("pt3", 8.1e-3, 3.2e-3, 1.9e-2),
    "BEM_FILM": Measured("pt4", 6.7e-3, 3.5e-3, 9.4e-3),
    "BEM_COMPOSITE": Measured("composite", 7.6e-3, 5.3e-3, 1.0e-2),  # of PT1 and PT3
}
RANK = 8  # of the LoRA whose size they had


@dataclass(frozen=True)
class SuggestedRate:
    """A learning rate, and where it comes from."""

    learning_rate: float
    source: str


def is_measured(config: PeftConfig) -> bool:
    """Whether there is a rate to suggest for the method."""
    return _method(config) in MEASURED


def refusal(config: PeftConfig) -> str:
    """Why there is no rate to suggest."""
    return (
        f"no learning rate was measured for {type(config).__name__}, only for {', '.join(MEASURED)}: search its own "
        "(half an octave apart, the best not at an edge), or give `learning_rate`."
    )


def suggested_rate(model: nn.Module, config: PeftConfig | None = None) -> SuggestedRate:
    """For an adapter of `config` on the base `model`, whose weights are not read; None: for the one that `model` has.

    Raises:
        ValueError: no rate was measured for the method; `model` is adapted already, or, without `config`, no PeftModel.
    """
    is_adapted = config is None
    if config is None:
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"{type(model).__name__} is no PeftModel, whose adapter a learning rate could be suggested for: give "
                "`config` and the base model, or a `learning_rate`."
            )
        config = model.active_peft_config
    if not is_measured(config):
        raise ValueError(refusal(config))
    if is_adapted:
        model = unadapted_copy(model)
    config = _with_sizes(model, config, is_adapted)
    system, rate, lowest, highest = MEASURED[_method(config)]
    size = _size(model, config)
    source = (
        f"{rate:.1e}: the best of searches at LoRA r={RANK}'s size (benchmarks/quality, {system}: SmolLM2-135M, 48 "
        f"steps of 8, three tasks, one seed each; the best of a task {lowest:.1e} to {highest:.1e}). This adapter has "
        f"{size:.2g} times that size on its model"
    )
    if not 0.4 <= size <= 2.5:
        source += ", where nothing was measured: larger adapters want lower rates, smaller ones higher"
    for scale, measured in _scales(config):
        if scale != measured:
            source += f"; its update is scaled by {scale:g} where {measured:g} was: a larger scale wants a lower rate"
    return SuggestedRate(rate, f"{source}.")


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type)).upper()


def _with_sizes(model: nn.Module, config: PeftConfig, are_chosen: bool) -> PeftConfig:
    """`config` with the sizes that its `budget` gives it on `model`, and without the budget."""
    if getattr(config, "budget", None) is None:
        return config
    if not are_chosen:
        with torch.device("meta"):
            config = adapted_copy(model, config).active_peft_config
    config = copy.copy(config)
    config.budget = None
    return config


def _size(model: nn.Module, config: PeftConfig) -> float:
    """Parameters over those of LoRA of rank `RANK` at the same sites; at fused experts, of the adapter of one."""
    if isinstance(config, LoraConfig):
        return config.r / RANK
    config = copy.deepcopy(config)
    for part in getattr(config, "methods", [config]):
        part.expert_sharing = "shared"
    with torch.device("meta"):
        cost = ModelCost(model, config)
        return cost(config)["params"] / cost.lora_params(RANK)


def _scales(config: PeftConfig) -> Iterator[tuple[float, float]]:
    """What the update is multiplied by, and what it was where the rate was measured, of each method."""
    if isinstance(config, LoraConfig):
        yield config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r), 1.0
    for part in getattr(config, "methods", [config]):
        if "scaling" not in getattr(part, "inert_fields", dict)() and hasattr(part, "scaling"):
            yield part.scaling, type(part).scaling
