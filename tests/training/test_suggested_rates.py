"""The rates that are suggested are those that the committed searches found best."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from transformers import Trainer

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    LearningRates,
    PTTrainer,
    PTTrainingConfig,
    ResidualFiLMConfig,
    count_parameters,
    match_budget,
    parameter_groups,
)
from bem_peft.training.suggested_rates import MEASURED
from tests.tiny_models import build
from tests.tuners.test_experts import small

RATES = Path(__file__).parents[2] / "benchmarks" / "quality" / "results" / "rates.csv"
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
    with RATES.open(encoding="utf-8") as file:
        (row,) = [row for row in csv.DictReader(file) if row["system"] == system]
    found = LearningRates.suggest(build("llama"), CONFIGS[system])
    assert f"{found.learning_rate:.1e}" == f"{float(row['learning_rate']):.1e}"
    tasks = [name for name, value in row.items() if name not in ("system", "learning_rate") and value]
    ks = [float(row[task]) for task in tasks]
    lowest, highest = (8e-3 * 2 ** (k / 2) for k in (min(ks), max(ks)))
    number = ["one task", "two tasks", "three tasks"][len(tasks) - 1]
    assert f"{number}, one seed each; the best of a task {lowest:.1e} to {highest:.1e}" in found.source
    assert f"benchmarks/quality, {system}" in found.source
    assert system in {measured.system for measured in MEASURED.values()}


def test_a_size_that_was_not_measured_is_said() -> None:
    base = build("llama")
    near = LearningRates.suggest(base, LoraConfig(r=8, target_modules=["o_proj"]))
    far = LearningRates.suggest(base, LoraConfig(r=64, target_modules=["o_proj"]))
    assert "has 1 times" in near.source
    assert "nothing was measured" not in near.source
    assert "has 8 times" in far.source
    assert "nothing was measured: larger adapters want lower rates" in far.source


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj"]), "scaled by 2 where 1 was"),
        (LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["o_proj"]), "scaled by 4 where 1 was"),
        (KroneckerConfig(u_rank=2, v_rank=2, scaling=1.0), "scaled by 1 where 2 was"),
        (CompositeConfig([KroneckerConfig(u_rank=2, v_rank=2, scaling=4.0)]), "scaled by 4 where 2 was"),
    ],
)
def test_a_scale_that_was_not_measured_is_said(config: PeftConfig, said: str) -> None:
    assert said in LearningRates.suggest(build("llama"), config).source


@pytest.mark.parametrize("system", CONFIGS)
def test_the_scale_that_was_measured_is_not_spoken_of(system: str) -> None:
    """The LoRA here has a rank of 4 and PEFT's alpha of 8."""
    source = LearningRates.suggest(build("llama"), CONFIGS[system]).source
    assert ("scaled by 2 where 1" in source) == ("scaled by" in source) == (system == "lora_both")


@pytest.mark.parametrize("system", CONFIGS)
def test_an_adapted_model_has_the_rate_of_its_base_and_config(system: str) -> None:
    config = copy.deepcopy(CONFIGS[system])
    model = get_peft_model(build("llama"), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert LearningRates.suggest(model) == LearningRates.suggest(build("llama"), CONFIGS[system])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_size_is_the_ratio_of_the_parameters_that_are_trained() -> None:
    config = KroneckerConfig(u_rank=2, v_rank=4, target_modules=["o_proj", "down_proj"])
    model = get_peft_model(build("llama"), config)
    lora = get_peft_model(build("llama"), LoraConfig(r=8, target_modules=["o_proj", "down_proj"]))
    size = count_parameters(model).trainable / count_parameters(lora).trainable
    assert f"has {size:.2g} times" in LearningRates.suggest(model).source
    with_gpt2 = LearningRates.suggest(build("gpt2"), LoraConfig(r=16, target_modules=["c_proj"]))
    assert "has 2 times" in with_gpt2.source


@pytest.mark.parametrize("sharing", ["shared", "each", "factors"])
def test_at_fused_experts_the_size_is_that_of_one_adapter(sharing: str) -> None:
    """Each expert has a token's own adapter: how many of them there are does not change how fast one learns."""
    config = KroneckerConfig(u_rank=2, v_rank=2, expert_sharing=sharing)
    shared = KroneckerConfig(u_rank=2, v_rank=2)
    assert LearningRates.suggest(small("mixtral"), config) == LearningRates.suggest(small("mixtral"), shared)
    assert LearningRates.suggest(get_peft_model(small("mixtral"), config)).source


def test_a_budget_gives_sizes_and_a_rate() -> None:
    """In `match_budget`, and in a config, before and after the model has it."""
    match = match_budget(build("llama"), ResidualFiLMConfig(), "lora:r=10")
    rates = LearningRates.suggest(build("llama"), match.config)
    assert (match.learning_rate, match.learning_rate_source) == (rates.learning_rate, rates.source)
    dial = ResidualFiLMConfig(budget="lora:r=10")
    assert LearningRates.suggest(build("llama"), dial) == rates
    assert dial.budget == "lora:r=10"
    model = get_peft_model(build("llama"), dial)
    assert LearningRates.suggest(model) == rates
    assert model.peft_config["default"].budget == "lora:r=10"
    unmeasured = match_budget(build("llama"), LoKrConfig(target_modules=["o_proj"]), "lora:r=2", match=["params"])
    assert (unmeasured.learning_rate, unmeasured.learning_rate_source) == (None, "")


def test_what_has_no_suggestion_is_refused() -> None:
    base = build("llama")
    with pytest.raises(ValueError, match="no learning rate was measured for VeraConfig"):
        LearningRates.suggest(base, VeraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is no PeftModel.*give `config`"):
        LearningRates.suggest(base)
    with pytest.raises(ValueError, match="adapted already"):
        LearningRates.suggest(get_peft_model(base, CONFIGS["pt3"]), CONFIGS["pt4"])


ROWS = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    return {"output_dir": str(folder), "max_steps": 1, "save_strategy": "no", "logging_steps": 1, **fixed, **changes}


def test_a_trainer_takes_it_where_none_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the arguments stay as they are, so that another method's trainer takes its own."""
    arguments = PTTrainingConfig(**options(tmp_path, lr_scheduler_type="constant"))
    for system in ("pt3", "pt4"):
        model = get_peft_model(build("llama"), copy.deepcopy(CONFIGS[system]))
        expected = LearningRates.suggest(model)
        trainer = PTTrainer(model, arguments, train_dataset=ROWS)
        assert f"learning rate {expected.source}" in caplog.text
        trainer.train()
        assert trainer.state.log_history[0]["learning_rate"] == expected.learning_rate
        assert arguments.learning_rate is None
    trainer = PTTrainer(args=arguments, train_dataset=ROWS, model_init=lambda: get_peft_model(build("llama"), dial()))
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == LearningRates.suggest(build("llama"), dial()).learning_rate
    given = PTTrainer(model, PTTrainingConfig(**options(tmp_path, learning_rate=3e-4)), train_dataset=ROWS)
    assert given.args.learning_rate == 3e-4


def dial() -> ResidualFiLMConfig:
    return ResidualFiLMConfig(budget="lora:r=10")


def test_where_no_rate_is_known_one_must_be_given(tmp_path: Path) -> None:
    arguments = PTTrainingConfig(**options(tmp_path))
    model = get_peft_model(build("llama"), LoKrConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=r"no learning rate was measured for LoKrConfig.*give `learning_rate`"):
        PTTrainer(model, arguments, train_dataset=ROWS)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is no PeftModel.*or a `learning_rate`"):
        PTTrainer(build("llama"), arguments, train_dataset=ROWS)
    ours = get_peft_model(build("llama"), copy.deepcopy(CONFIGS["pt3"]))
    with pytest.raises(ValueError, match="`learning_rate` = None: is chosen by PTTrainer"):
        Trainer(ours, arguments, train_dataset=ROWS)
    with pytest.raises(ValueError, match="`learning_rate` = None: is chosen by PTTrainer"):
        parameter_groups(ours, arguments)
