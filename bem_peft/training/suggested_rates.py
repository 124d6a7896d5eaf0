"""Learning rates that were best where methods were compared, each with its own search.

benchmarks/quality: SmolLM2-135M-Instruct, verses, 48 steps of 8 sequences, AdamW, cosine schedule, one seed; of five
rates half an octave apart or more, the best on Slice-A (search.csv). Sizes: LoRA r=8's parameters at the same sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from bem_peft.budget.check import adapted_copy, at_sites_of
from bem_peft.budget.site_cost import ModelCost

BASE = 8e-3  # the search's rates are BASE * 2^(k/2)
# PEFT type -> the system of the search, and its best k
MEASURED: Mapping[str, tuple[str, int]] = {
    "LORA": ("lora_both", 0),
    "BEM_HEAD_GATING": ("pt1_o", 0),
    "BEM_RANK_MASK": ("pt2", 0),
    "BEM_KRONECKER": ("pt3", 1),
    "BEM_FILM": ("pt4", 2),
    "BEM_COMPOSITE": ("composite", 0),
}
RANK = 8  # of the LoRA whose size they had


@dataclass(frozen=True)
class SuggestedRate:
    """A learning rate, and where it comes from."""

    learning_rate: float
    source: str


def suggested_rate(model: nn.Module, config: PeftConfig) -> SuggestedRate:
    """For an adapter of `config` on the base `model`, whose weights are not read.

    Raises:
        ValueError: no rate was measured for the method, or `model` is adapted already.
    """
    method = str(getattr(config.peft_type, "value", config.peft_type)).upper()
    if method not in MEASURED:
        raise ValueError(
            f"no learning rate was measured for {type(config).__name__}, only for {', '.join(MEASURED)}: search its "
            "own (half an octave apart, the best not at an edge), or give `learning_rate`."
        )
    system, k = MEASURED[method]
    with torch.device("meta"):
        lora: Any = at_sites_of(LoraConfig(r=RANK), lambda: adapted_copy(model, config))
        size = ModelCost(model, config)(config)["params"] / ModelCost(model, lora)(lora)["params"]
    rate = BASE * 2 ** (k / 2)
    source = (
        f"{rate:.1e}: the best of a search at LoRA r={RANK}'s size (benchmarks/quality, {system}: SmolLM2-135M, 48 "
        f"steps of 8 verses, one seed). This adapter has {size:.2g} times that size on its model"
    )
    if not 0.4 <= size <= 2.5:
        source += ", where nothing was measured: larger adapters want lower rates, smaller ones higher"
    return SuggestedRate(rate, f"{source}.")
