"""Parameter groups: each trainable parameter once, in a stable order, with the learning rate that was asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments

from bem_peft import (
    BudgetConstraints,
    BudgetError,
    HeadGroupGatingConfig,
    LearningRates,
    PTTrainer,
    PTTrainingConfig,
    SpectralGovernance,
    parameter_groups,
)
from bem_peft.training.parameter_groups import GROUPS
from bem_peft.tuners.base.adapter import Adapter
from tests.contract.methods import EVERY, adapted
from tests.tiny_models import build
from tests.training.equalities import collate, rows, text, word_tokenizer


@pytest.mark.parametrize("method", EVERY)
def test_every_trainable_parameter_stands_in_one_group(method: str) -> None:
    model = adapted(method, "llama")
    groups = parameter_groups(model, LearningRates(1e-3))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(group["name"].split("/")[1] in GROUPS for group in groups)
    again = parameter_groups(adapted(method, "llama"), LearningRates(1e-3))
    shapes = [[(g["name"], [tuple(p.shape) for p in g["params"]]) for g in found] for found in (groups, again)]
    assert shapes[0] == shapes[1]
    torch.optim.AdamW(groups)  # raises where a parameter stands in two groups


def test_groups_are_what_their_names_say() -> None:
    model = adapted("composite", "llama")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        g["name"]: {names[id(p)].rpartition(".")[2] for p in g["params"]}
        for g in parameter_groups(model, LearningRates(1.0))
    }
    assert groups == {
        "PT1/projection": {"A", "B"},
        "PT1/controller": {"gate_weight"},
        "PT1/controller/no_decay": {"gate_bias"},
        "PT3/projection": {"B"},
        "PT3/factors": {"U", "V"},
        "PT4/controller": {"controller_weight"},
        "PT4/controller/no_decay": {"controller_bias"},
        "PT4/gamma": {"gamma"},
        "PT4/beta": {"beta"},
    }
    rank_mask = parameter_groups(adapted("rank_mask", "llama"), LearningRates(1.0))
    assert [g["name"] for g in rank_mask] == ["PT2/projection", "PT2/controller", "PT2/mask"]


def test_learning_rates_multiply_and_one_methods_group_goes_before_all_methods() -> None:
    rates = LearningRates(
        1e-2,
        weight_decay=0.1,
        variant_lr_multipliers={"PT3": 2.0},
        group_lr_multipliers={"projection": 0.5, "PT1/projection": 3.0, "factors": 4.0},
    )
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in parameter_groups(adapted("composite", "llama"), rates)}
    assert found["PT1/projection"] == (pytest.approx(3e-2), 0.1)
    assert found["PT3/projection"] == (pytest.approx(1e-2), 0.1)
    assert found["PT3/factors"] == (pytest.approx(8e-2), 0.1)
    assert found["PT4/gamma"] == (pytest.approx(1e-2), 0.1)
    assert found["PT1/controller/no_decay"] == (pytest.approx(1e-2), 0.0)


def test_what_is_no_adapter_of_ours_stands_in_a_group_of_its_own() -> None:
    model = get_peft_model(build("llama"), HeadGroupGatingConfig(modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    groups = {
        g["name"]: g for g in parameter_groups(model, LearningRates(1e-3, group_lr_multipliers={"projection": 9.0}))
    }
    assert len(groups["other"]["params"]) == 1
    assert groups["other"]["lr"] == 1e-3
    lora = parameter_groups(get_peft_model(build("llama"), LoraConfig(target_modules=["o_proj"])), LearningRates(1e-3))
    assert [g["name"] for g in lora] == ["other"]


def rates_by_name(model: torch.nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_the_ratio_is_that_of_lora_plus_for_lora() -> None:
    model = get_peft_model(build("gpt2"), LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True, lora_bias=True))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    ours = parameter_groups(model, LearningRates(1e-3, loraplus_lr_ratio=16.0))
    assert [g["name"] for g in ours] == ["other", "other/output", "other/output/no_decay"]
    assert rates_by_name(model, ours) == pytest.approx(rates_by_name(model, theirs.param_groups))


@pytest.mark.parametrize("method", EVERY)
def test_the_ratio_is_for_what_writes_into_the_output(method: str) -> None:
    """What is zero at the start of a method, but for its gates, and nothing else."""
    model = adapted(method, "llama")
    rates = LearningRates(1e-3, variant_lr_multipliers={"PT3": 2.0}, loraplus_lr_ratio=4.0)
    groups = parameter_groups(model, rates)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    plain = rates_by_name(model, parameter_groups(model, LearningRates(1e-3, variant_lr_multipliers={"PT3": 2.0})))
    for name, rate in rates_by_name(model, groups).items():
        writes = name.rpartition(".")[2] in ("B", "gamma", "beta")
        assert rate == pytest.approx(plain[name] * (4.0 if writes else 1.0)), name
    torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` = 0.0"),
        ({"weight_decay": -1.0}, ValueError, "`weight_decay` = -1.0"),
        ({"variant_lr_multipliers": {"PT5": 1.0}}, ValueError, "'PT5' is none of PT1, PT2, PT3, PT4"),
        ({"group_lr_multipliers": {"mask": 0.0}}, ValueError, "'mask' must be above 0"),
        ({"loraplus_lr_ratio": 0.0}, ValueError, "`loraplus_lr_ratio` = 0.0"),
        ({"loraplus_lr_ratio": "4"}, TypeError, "`loraplus_lr_ratio` = '4'"),
        ({"group_lr_multipliers": {"masks": 1.0}}, ValueError, "'masks' is none of"),
        ({"group_lr_multipliers": [1.0]}, TypeError, "`group_lr_multipliers`"),
    ],
)
def test_wrong_multipliers_are_refused(fields: dict[str, Any], error: type, text: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=re.escape(text)):
        LearningRates(**{"learning_rate": 1e-3, **fields})
    if "learning_rate" not in fields and "weight_decay" not in fields:
        with pytest.raises(error, match=re.escape(text)):
            PTTrainingConfig(str(tmp_path), use_cpu=True, **fields)


def test_nothing_to_train_is_refused() -> None:
    model = adapted("film", "llama")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model, LearningRates(1e-3))


def arguments(folder: Path, **changes: Any) -> PTTrainingConfig:
    options = {
        "max_steps": 3, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
        "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1, **changes,
    }  # fmt: skip
    return PTTrainingConfig(str(folder), **options)


def test_pt_trainer_equals_a_plain_trainer_with_the_same_groups(tmp_path: Path) -> None:
    """The scheduler scales every group; the weights are those of groups given to transformers' Trainer."""
    multipliers = {
        "variant_lr_multipliers": {"PT1": 2.0}, "group_lr_multipliers": {"gamma": 0.5}, "loraplus_lr_ratio": 4.0,
    }  # fmt: skip
    weights = []
    for is_ours in (True, False):
        model = adapted("composite", "llama").train()
        config = arguments(tmp_path, lr_scheduler_type="linear", **multipliers)
        if is_ours:
            trainer: Trainer = PTTrainer(model, config, train_dataset=rows(), data_collator=collate)
        else:
            plain = TrainingArguments(
                **{
                    k: v
                    for k, v in config.to_dict().items()
                    if k in TrainingArguments.__dataclass_fields__ and k != "use_cpu"
                },
                use_cpu=True,
            )
            fused = config.optim == "adamw_torch_fused"  # the default with torch 2.8 and newer
            optimizer = torch.optim.AdamW(parameter_groups(model, LearningRates(1e-2, **multipliers)), fused=fused)
            trainer = Trainer(model, plain, train_dataset=rows(), data_collator=collate, optimizers=(optimizer, None))
        trainer.train()
        last = {g["name"]: g["lr"] / g["initial_lr"] for g in trainer.optimizer.param_groups}
        assert set(last.values()) == {0.0}  # the end of a linear schedule, in every group
        initial = {g["name"]: g["initial_lr"] for g in trainer.optimizer.param_groups}
        assert initial["PT1/projection"] == pytest.approx(2e-2)
        assert initial["PT1/projection/output"] == pytest.approx(8e-2)
        assert initial["PT4/gamma/output"] == pytest.approx(2e-2)
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_norm_caps_hold_after_training(tmp_path: Path) -> None:
    model = adapted("kronecker", "llama").train()
    config = arguments(tmp_path, max_singular_value=0.3, fro_budget=0.35)
    PTTrainer(model, config, train_dataset=rows(), data_collator=collate).train()
    for norms in SpectralGovernance.measure(model):
        assert norms.max_singular_value <= 0.3
        assert norms.frobenius <= 0.35


def test_a_budget_by_the_anchors_name_stops_a_run_that_breaks_it(tmp_path: Path) -> None:
    kept = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    trainer = PTTrainer(
        kept, arguments(tmp_path, budget_anchor="lora:r=2"), train_dataset=rows(), data_collator=collate
    )
    trainer.train()
    assert trainer.state.global_step == 3
    broken = PTTrainer(
        adapted("kronecker", "llama").train(), arguments(tmp_path, budget_anchor="lora:r=1"), train_dataset=rows(),
        data_collator=collate,
    )  # fmt: skip
    with pytest.raises(BudgetError):
        broken.train()
    assert broken.state.global_step == 0
    with pytest.raises(ValueError, match="both given"):
        PTTrainer(kept, arguments(tmp_path, budget_anchor="lora:r=2"), budget=BudgetConstraints(params=1))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_singular_value": -1.0}, "`max_singular_value` = -1.0"),
        ({"budget_policy": "ignore"}, "`budget_policy` = 'ignore'"),
        ({"budget_anchor": "loro:r=8"}, "loro"),
        ({"budget_tolerance_ratio": 5.0}, "`budget_tolerance_ratio` = 5.0"),
        ({"budget_quantities": ["speed"]}, "speed"),
    ],
)
def test_wrong_training_fields_are_refused(fields: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        arguments(tmp_path, **fields)


def test_an_optimizer_that_groups_by_itself_is_refused(tmp_path: Path) -> None:
    config = arguments(tmp_path, optim="galore_adamw", optim_target_modules=["o_proj"])
    trainer = PTTrainer(adapted("film", "llama").train(), config, train_dataset=rows(), data_collator=collate)
    with pytest.raises((ValueError, ImportError), match=r"galore|GaLore"):
        trainer.create_optimizer()


def test_the_trainers_card_says_how_to_load(tmp_path: Path) -> None:
    model = adapted("film", "llama").train()
    trainer = PTTrainer(model, arguments(tmp_path), train_dataset=rows(), data_collator=collate)
    trainer.train()
    trainer.save_model(str(tmp_path))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.count("import bem_peft") == 1
    assert "peft" in card


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
def test_groups_in_sft_trainer_survive_its_scheduler_and_its_checkpoint(tmp_path: Path) -> None:
    """An optimizer over the groups, given to SFTTrainer: stopped at a checkpoint and resumed, the same weights."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def run(folder: Path, resume: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = adapted("composite", "llama").train()
        config = SFTConfig(
            str(folder), max_steps=4, save_steps=2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, gradient_checkpointing=False, lr_scheduler_type="cosine", seed=2,
        )  # fmt: skip
        rates = LearningRates(1e-2, group_lr_multipliers={"factors": 0.5})
        trainer = SFTTrainer(
            model=model, args=config, processing_class=word_tokenizer(),
            optimizers=(torch.optim.AdamW(parameter_groups(model, rates)), None),
            train_dataset=Dataset.from_dict({"text": [text(row["input_ids"]) for row in rows()]}),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        found = {g["name"]: g["initial_lr"] for g in trainer.optimizer.param_groups}
        assert found["PT3/factors"] == pytest.approx(5e-3)
        assert found["PT4/beta"] == pytest.approx(1e-2)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    never = run(tmp_path, None)
    resumed = run(tmp_path, str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(never[name], resumed[name]) for name in never)


def test_a_method_that_the_groups_do_not_know_trains_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("kronecker", "llama")
    expected = {id(p) for p in model.parameters() if p.requires_grad}
    kind = type(next(m for m in model.modules() if isinstance(m, Adapter)))
    for variant, groups in (("PT9", kind.lr_groups), ("PT3", {"U": "new"}), ("PT3", {})):
        monkeypatch.setattr(kind, "variant", variant)
        monkeypatch.setattr(kind, "lr_groups", groups)
        held = [id(p) for group in parameter_groups(model, LearningRates(1e-3)) for p in group["params"]]
        assert sorted(held) == sorted(expected), "a parameter is in no group, or in two"
