"""The rates that are suggested are those that the committed search found best."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    LearningRates,
    ResidualFiLMConfig,
)
from bem_peft.training.suggested_rates import MEASURED
from tests.tiny_models import build

SEARCH = Path(__file__).parents[2] / "benchmarks" / "quality" / "results" / "search.csv"
CONFIGS: dict[str, PeftConfig] = {
    "lora_both": LoraConfig(r=4, target_modules=["o_proj", "down_proj"]),
    "pt1_o": HeadGroupGatingConfig(num_groups=2, rank_per_group=2),
    "pt2": DynamicRankMaskConfig(total_rank=4, active_rank=2),
    "pt3": KroneckerConfig(u_rank=2, v_rank=2),
    "pt4": ResidualFiLMConfig(gamma_dim=2, beta_dim=2),
    "composite": CompositeConfig([KroneckerConfig(u_rank=2, v_rank=2), ResidualFiLMConfig(gamma_dim=1, beta_dim=1)]),
}


@pytest.mark.parametrize("system", CONFIGS)
def test_a_suggested_rate_is_the_best_of_the_search(system: str) -> None:
    with SEARCH.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["task"], row["system"]) == ("verses", system)]
    best = min(rows, key=lambda row: float(row["loss"]))
    found = LearningRates.suggest(build("llama"), CONFIGS[system])
    assert found.learning_rate == pytest.approx(float(best["learning_rate"]), rel=1e-3)
    assert f"benchmarks/quality, {system}" in found.source
    assert system in {name for name, _ in MEASURED.values()}


def test_a_size_that_was_not_measured_is_said() -> None:
    base = build("llama")
    near = LearningRates.suggest(base, LoraConfig(r=8, target_modules=["o_proj"]))
    far = LearningRates.suggest(base, LoraConfig(r=64, target_modules=["o_proj"]))
    assert "has 1 times" in near.source
    assert "nothing was measured" not in near.source
    assert "has 8 times" in far.source
    assert "nothing was measured: larger adapters want lower rates" in far.source


def test_what_has_no_suggestion_is_refused() -> None:
    base = build("llama")
    with pytest.raises(ValueError, match="no learning rate was measured for VeraConfig"):
        LearningRates.suggest(base, VeraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="adapted already"):
        LearningRates.suggest(get_peft_model(base, CONFIGS["pt3"]), CONFIGS["pt4"])
