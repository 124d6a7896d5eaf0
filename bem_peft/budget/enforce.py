"""A budget that a run keeps: a callback for HF Trainer and TRL, and the same check for a bare accelerate loop.

    trainer = BudgetCallback(budget).attach(Trainer(...))     # or Trainer(..., callbacks=[BudgetCallback(budget)])
    check_budget(accelerator, model, budget)                  # bare accelerate: on every rank

Checked before the first step, at each evaluation and at each save. The report is `budget_report.json` beside the
adapter, and a section of its model card.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bem_peft.budget.check import BudgetConstraints, BudgetValidator
from bem_peft.budget.parameters import count_parameters
from bem_peft.budget.report import BudgetError, BudgetReport
from bem_peft.whole_file import write_whole

if TYPE_CHECKING:  # both take long to import
    from accelerate import Accelerator
    from transformers import Trainer

AnyTrainer = TypeVar("AnyTrainer", bound="Trainer")

POLICIES = ("raise", "warn", "stop")
REPORT_FILE = "budget_report.json"
CARD_START, CARD_END = "<!-- bem_peft: budget -->", "<!-- bem_peft: end of budget -->"


class BudgetWarning(UserWarning):
    """A run goes on although it does not keep its budget."""


class BudgetCallback(TrainerCallback):
    """Enforces a budget in HF Trainer and in TRL's trainers.

    Args:
        constraints: the budget.
        policy: what happens when it is not kept. "raise": `BudgetError` at once. "warn": a `BudgetWarning`, once for
            each event. "stop": training ends after the current step, as an early stop does; before the first step
            there is nothing to keep, so it raises.

    Raises:
        ValueError: an unknown policy.
    """

    def __init__(self, constraints: BudgetConstraints, policy: str = "raise") -> None:
        if policy not in POLICIES:
            raise ValueError(f"`policy` = {policy!r}: must be one of {', '.join(POLICIES)}.")
        self.validator, self.policy = BudgetValidator(constraints), policy
        self.report: BudgetReport | None = None
        self._trainable: int | None = None

    def attach(self, trainer: AnyTrainer) -> AnyTrainer:
        """Add the callback before the trainer's others, so that its trackers get the budget; returns the trainer."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        return trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        self._check(model, control, "before the first step")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        self._check(model, control, f"at the evaluation of step {state.global_step}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        if self.report is not None:
            logs.update(report_values(self.report))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        self._check(model, control, f"at the save of step {state.global_step}")
        if state.is_world_process_zero and self.report is not None and args.output_dir is not None:
            write_report(self.report, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero and self.report is not None and args.output_dir is not None:
            write_report(self.report, Path(args.output_dir))

    def _check(self, model: nn.Module, control: TrainerControl, when: str) -> None:
        """Count again; what depends on the adapter's structure alone only where its size has changed."""
        model = unwrapped(model)
        trainable = count_parameters(model).trainable
        is_first = self.report is None
        if is_first or trainable != self._trainable:
            self.report, self._trainable = self.validator.validate_all(model), trainable
        if self.report is None or self.report.is_met:
            return
        if self.policy == "raise" or (self.policy == "stop" and is_first):
            raise BudgetError(self.report)
        warnings.warn(f"{when}: {BudgetError(self.report)}", BudgetWarning, stacklevel=2)
        if self.policy == "stop":
            control.should_training_stop = True


def check_budget(
    accelerator: Accelerator, model: nn.Module, constraints: BudgetConstraints, *, policy: str = "raise"
) -> BudgetReport:
    """Check on every process of an accelerate run; call it on all of them, before training or at a save.

    Where one process finds a violation, or fails to measure, all of them raise: none is left waiting for the others.
    Rank 0 writes the values to the run's trackers.

    Returns:
        This process's report.

    Raises:
        ValueError: an unknown policy; "stop" is the callback's.
        BudgetError: some process's budget is not kept ("raise").
        RuntimeError: measuring failed on some process; the message has the rank and the reason.
    """
    from accelerate.utils import gather_object

    if policy not in POLICIES[:2]:
        raise ValueError(f"`policy` = {policy!r}: must be 'raise' or 'warn'.")
    report, failure = None, ""
    try:
        report = BudgetValidator(constraints).validate_all(unwrapped(model))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        failure = f"rank {accelerator.process_index}: {error}"
    is_met = report is not None and report.is_met
    found: list[tuple[bool, str]] = gather_object([(is_met, failure)])
    failures = [text for _, text in found if text]
    if failures or report is None:
        raise RuntimeError("the budget could not be measured: " + "; ".join(failures))
    if accelerator.is_main_process:
        accelerator.log(report_values(report))
    if not all(met for met, _ in found):
        if policy == "raise":
            raise BudgetError(report)
        if accelerator.is_main_process:
            warnings.warn(str(BudgetError(report)), BudgetWarning, stacklevel=2)
    return report


def report_values(report: BudgetReport) -> dict[str, float]:
    """For trackers: {"budget/params_deviation": ratio, ..., "budget/is_met": 0.0 or 1.0}."""
    values = {
        f"budget/{line.quantity}_deviation": line.deviation_ratio
        for line in report.lines
        if line.deviation_ratio is not None
    }
    return {**values, "budget/is_met": float(report.is_met)}


def write_report(report: BudgetReport, folder: Path) -> None:
    """Write `budget_report.json` into `folder`, and a section into its model card if it has one; each file at once."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / REPORT_FILE, report.to_json())
    card = folder / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if CARD_START in text:
        before, _, after = text.partition(CARD_START)
        text = before.rstrip() + "\n" + after.partition(CARD_END)[2].lstrip("\n")
    verdict = "kept" if report.is_met else "not kept"
    section = (
        f"## Budget\n\nThe budget is {verdict} (scope {report.scope}, tolerance {report.tolerance_ratio:.1%}).\n\n"
    )
    write_whole(card, f"{text.rstrip()}\n\n{CARD_START}\n\n{section}{report.to_markdown()}\n\n{CARD_END}\n")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DeepSpeed's engine or torch.compile."""
    from accelerate.utils import extract_model_from_parallel

    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner
