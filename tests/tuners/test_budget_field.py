"""`budget="lora:r=10"` of a config: sizes that are chosen when the model is known, and are what a file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    count_parameters,
    match_budget,
)
from bem_peft.tuners.base.adapter_config import AdapterConfig
from tests.tiny_models import build

CONFIGS: dict[str, Callable[..., AdapterConfig]] = {
    "rank_mask": DynamicRankMaskConfig,
    "film": ResidualFiLMConfig,
    "kronecker": KroneckerConfig,  # whose default ranks do not fit this width
    "composite": lambda **k: CompositeConfig([HeadGroupGatingConfig(num_groups=2), ResidualFiLMConfig()], **k),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_the_adapter_costs_what_the_named_one_costs(method: str, tmp_path: Path) -> None:
    base = build("llama")
    expected = match_budget(base, CONFIGS[method](), "lora:r=10")
    assert expected.is_met
    model = get_peft_model(base, CONFIGS[method](budget="lora:r=10"))
    sites = ["down_proj"] if method == "kronecker" else ["o_proj", "down_proj"]
    lora = get_peft_model(build("llama"), LoraConfig(r=10, target_modules=sites))
    found, goal = (count_parameters(m).trainable for m in (model, lora))
    assert abs(found / goal - 1) <= 0.05
    assert found == expected.measured["params"]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build("llama"), str(tmp_path / "adapter"), is_trainable=True)
    assert again.peft_config["default"].budget == "lora:r=10"
    assert [p.shape for p in again.parameters() if p.requires_grad] == [
        p.shape for p in model.parameters() if p.requires_grad
    ]
    ids = torch.arange(3, 9).unsqueeze(0)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_no_rate_is_counted_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate costs two counts of the whole model."""

    def refuse(*_: object) -> None:
        raise AssertionError("a learning rate was counted")

    monkeypatch.setattr("bem_peft.budget.match.suggest_rate", refuse)
    get_peft_model(build("llama"), ResidualFiLMConfig(budget="lora:r=10"))
    with pytest.raises(AssertionError, match="was counted"):
        match_budget(build("llama"), ResidualFiLMConfig(), "lora:r=10")


def test_what_no_sizes_can_be_chosen_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`budget` = 'lora:r=8' is not met: DynamicRankMaskConfig.*no choice of"):
        get_peft_model(build("llama"), DynamicRankMaskConfig(budget="lora:r=8"))
    model = get_peft_model(build("llama"), ResidualFiLMConfig(budget="lora:r=8"))
    with pytest.raises(ValueError, match=r"the model has an adapter already.*match_budget"):
        model.add_adapter("second", ResidualFiLMConfig(budget="lora:r=8"))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="did you mean 'lora'"):
        get_peft_model(build("llama"), ResidualFiLMConfig(budget="lorra:r=8"))
    with pytest.raises(TypeError, match="`budget` = 8: must be an adapter in one line"):
        ResidualFiLMConfig(budget=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`budget` of one of several methods"):
        CompositeConfig([ResidualFiLMConfig(budget="lora:r=8")])
