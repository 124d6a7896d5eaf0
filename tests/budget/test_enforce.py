"""A budget stops a run that does not keep it, before any step, and is written beside the adapter of one that does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, IA3Config, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from bem_peft import (
    BudgetCallback,
    BudgetConstraints,
    BudgetError,
    BudgetValidator,
    BudgetWarning,
    KroneckerConfig,
    check_budget,
)
from bem_peft.budget.copies import adapted_copy
from bem_peft.budget.enforce import CARD_START, write_report
from tests.tiny_models import build, tokens

ROOT = Path(__file__).parents[2]
ANCHOR = LoraConfig(r=2, target_modules=["down_proj"])
KEPT = LoraConfig(r=2, target_modules=["down_proj"], use_rslora=True)
BROKEN = KroneckerConfig(u_rank=4, v_rank=4)


@pytest.fixture
def budget() -> BudgetConstraints:
    return BudgetConstraints.from_anchor(build("llama"), ANCHOR)


class Steps(TrainerCallback):
    """Counts the steps that ran, and keeps what was logged."""

    def __init__(self) -> None:
        self.count, self.logs = 0, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trainer(config: Any, folder: Path, callbacks: list[Any], **changes: Any) -> Trainer:
    ids = tokens(batch=6, length=10)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        logging_steps=1, save_steps=2, dataloader_pin_memory=False, disable_tqdm=True, **changes,
    )  # fmt: skip
    model = get_peft_model(build("llama"), config)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def test_a_run_within_budget_trains_and_leaves_its_report(budget: BudgetConstraints, tmp_path: Path) -> None:
    steps = Steps()
    run = BudgetCallback(budget).attach(trainer(KEPT, tmp_path, [steps], eval_strategy="steps", eval_steps=2))
    run.train()
    assert steps.count == 4
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        report = json.loads((folder / "budget_report.json").read_text())
        assert report["is_met"] is True
        assert {line["quantity"]: line["verdict"] for line in report["lines"]} == {"params": "PASS", "flops": "PASS"}
    card = (tmp_path / "checkpoint-4" / "README.md").read_text()
    assert card.count(CARD_START) == 1
    assert "| params | 320 | 320 | +0.00% |" in card
    assert any(log.get("budget/is_met") == 1.0 for log in steps.logs)


@pytest.mark.parametrize("policy", ["raise", "stop"])
def test_a_run_over_budget_ends_before_the_first_step_and_writes_nothing(
    policy: str, budget: BudgetConstraints, tmp_path: Path
) -> None:
    steps = Steps()
    run = trainer(BROKEN, tmp_path / "out", [steps, BudgetCallback(budget, policy)])
    with pytest.raises(BudgetError, match=r"(?s)the budget is not kept.*params .*FAIL.*match_budget"):
        run.train()
    assert steps.count == 0
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_a_warning_lets_the_run_go_on_and_says_so_in_the_report(budget: BudgetConstraints, tmp_path: Path) -> None:
    steps = Steps()
    run = trainer(BROKEN, tmp_path, [steps, BudgetCallback(budget, "warn")])
    with pytest.warns(BudgetWarning, match="the budget is not kept"):
        run.train()
    assert steps.count == 4
    assert json.loads((tmp_path / "budget_report.json").read_text())["is_met"] is False


class Grow(TrainerCallback):
    """Makes more parameters trainable after the second step, as a schedule of ranks might."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].get_input_embeddings().weight.requires_grad_(True)


@pytest.mark.parametrize("policy", ["raise", "stop"])
def test_a_budget_that_breaks_in_training_is_seen_at_the_next_save(
    policy: str, budget: BudgetConstraints, tmp_path: Path
) -> None:
    steps = Steps()
    run = trainer(KEPT, tmp_path, [steps, Grow(), BudgetCallback(budget, policy)])
    if policy == "raise":
        with pytest.raises(BudgetError):
            run.train()
    else:
        with pytest.warns(BudgetWarning, match="at the save of step 2"):
            run.train()
    assert steps.count == 2


def test_wrong_settings_are_named(budget: BudgetConstraints) -> None:
    with pytest.raises(ValueError, match="`policy` = 'ignore'"):
        BudgetCallback(budget, "ignore")
    with pytest.raises(ValueError, match="`policy` = 'stop'"):
        check_budget(Accelerator(cpu=True), build("llama"), budget, policy="stop")
    for values, message in (
        ({}, "nothing is constrained"),
        ({"params": 0}, "`params` = 0"),
        ({"flops": float("nan")}, "`flops` = nan"),
        ({"params": 10, "tolerance_ratio": 5}, "`tolerance_ratio` = 5: is a ratio"),
        ({"params": 10, "scope": "all"}, "`scope` = 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            BudgetConstraints(**values)
    with pytest.raises(TypeError, match="`memory` = '1 GB'"):
        BudgetConstraints(memory="1 GB")
    with pytest.raises(ValueError, match="must be one of bem-v1"):
        BudgetConstraints.from_preset("v1")
    with pytest.raises(ValueError, match="adapted already"):
        BudgetConstraints.from_anchor(get_peft_model(build("llama"), KEPT), ANCHOR)


def test_the_preset_of_the_performance_track() -> None:
    assert BudgetConstraints.from_preset("bem-v1.3").params == 524_288
    assert BudgetConstraints.from_preset("bem-v1.3", scope="total").params == 124_964_096


def test_what_cannot_be_measured_fails_and_says_why(budget: BudgetConstraints) -> None:
    model = get_peft_model(build("llama"), KEPT).requires_grad_(False)
    report = BudgetValidator(budget).validate_all(model)
    assert not report.is_met
    assert {line.quantity: line.measured for line in report.lines}["flops"] is None
    assert "not measured: no parameter is trainable" in report.lines[1].how


@pytest.mark.parametrize("quantity", ["params", "flops", "memory", "stored"])
def test_the_anchor_keeps_its_own_budget_exactly(quantity: str) -> None:
    for scope in ("adapter", "total"):
        limits = BudgetConstraints.from_anchor(build("llama"), ANCHOR, quantities=[quantity], scope=scope)
        (line,) = BudgetValidator(limits).validate_all(adapted_copy(build("llama"), ANCHOR)).lines
        assert (line.deviation_ratio, line.verdict) == (0.0, "PASS")


def test_latency_is_measured_against_the_anchor_s_model() -> None:
    limits = BudgetConstraints.from_anchor(build("llama"), ANCHOR, quantities=["latency"], tolerance_ratio=0.9)
    model = adapted_copy(build("llama"), ANCHOR).train()
    line = BudgetValidator(limits).validate_latency(model, blocks=8)
    assert line.how.startswith("measured: 8 ABBA blocks")
    assert line.verdict in ("PASS", "FAIL", "INCONCLUSIVE")
    assert ("; inconclusive: " in line.how) == (line.verdict == "INCONCLUSIVE")
    assert model.training


def test_other_methods_of_peft_are_checked_too(budget: BudgetConstraints) -> None:
    model = get_peft_model(build("llama"), AdaLoraConfig(init_r=2, target_modules=["down_proj"], total_step=10))
    report = BudgetValidator(budget).validate_all(model)
    assert report.lines[0].measured == 2 * (2 * (48 + 32) + 2)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["down_proj"], use_dora=True),
        LoKrConfig(r=2, target_modules=["down_proj"]),
        IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        VeraConfig(r=4, target_modules=["down_proj"]),
        OFTConfig(oft_block_size=4, target_modules=["down_proj"]),
    ],
    ids=["dora", "lokr", "ia3", "vera", "oft"],
)
def test_every_quantity_is_measured_for_other_methods(config: Any) -> None:
    limits = BudgetConstraints.from_anchor(build("llama"), ANCHOR, quantities=["params", "flops", "memory", "stored"])
    report = BudgetValidator(limits).validate_all(adapted_copy(build("llama"), config))
    assert all(line.measured is not None for line in report.lines), str(report)
    assert report.lines[0].measured > 0


def test_a_report_is_written_once_into_a_card(budget: BudgetConstraints, tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), KEPT)
    model.save_pretrained(tmp_path)
    report = BudgetValidator(budget).validate_all(model)
    write_report(report, tmp_path)
    first = (tmp_path / "README.md").read_text()
    write_report(report, tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("accelerate")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    found = {}
    cases = ("kept", "broken", "one_fails", "fsdp2")
    # torchrun, which `accelerate launch` starts for several processes; with --cpu it starts one only
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.budget.two_processes", str(folder), *cases]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    for case in cases:
        files = [folder / f"{case}_{rank}.txt" for rank in range(2)]
        assert all(file.is_file() for file in files), run.stdout[-2000:] + run.stderr[-4000:]
        found[case] = [file.read_text() for file in files]
    return found


def test_two_processes_agree(two_processes: dict[str, list[str]]) -> None:
    assert two_processes["kept"] == ["kept", "kept"]
    assert two_processes["broken"] == ["BudgetError False", "BudgetError False"]


def test_sharded_parameters_count_as_whole_ones(two_processes: dict[str, list[str]]) -> None:
    assert two_processes["fsdp2"] == ["cut True, same True"] * 2


def test_where_one_process_cannot_measure_both_stop(two_processes: dict[str, list[str]]) -> None:
    for outcome in two_processes["one_fails"]:
        assert outcome.startswith("BudgetError")


def test_budget_on_one_process() -> None:
    limits = BudgetConstraints.from_anchor(build("llama"), ANCHOR)
    report = check_budget(Accelerator(cpu=True), get_peft_model(build("llama"), KEPT), limits)
    assert report.is_met
    with pytest.raises(BudgetError):
        check_budget(Accelerator(cpu=True), get_peft_model(build("llama"), BROKEN), limits)
    with pytest.warns(BudgetWarning):
        check_budget(Accelerator(cpu=True), get_peft_model(build("llama"), BROKEN), limits, policy="warn")
    assert torch.is_grad_enabled()
