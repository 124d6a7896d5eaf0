"""`PTTrainer`: transformers' Trainer with the methods' learning rates, a budget, norm caps, and a resume that holds.

All of it works without this class too: `parameter_groups`, `BudgetCallback`, `SpectralGovernance` and
`last_complete_checkpoint` are for a plain Trainer, for TRL's and for a loop of one's own.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from bem_peft import field_checks as check
from bem_peft.budget.check import BudgetConstraints, budget_of
from bem_peft.budget.enforce import POLICIES, BudgetCallback
from bem_peft.training.checkpoints import last_complete_checkpoint
from bem_peft.training.parameter_groups import VARIANT_LR_MULTIPLIERS, check_multipliers, parameter_groups
from bem_peft.training.suggested_rates import suggested_rate
from bem_peft.tuners.adapter_spec import parse_adapter
from bem_peft.tuners.base.adapter_config import AdapterConfig, add_loading_section
from bem_peft.tuners.calls.loop import AdapterCallback
from bem_peft.tuners.governance import SpectralGovernance

logger = logging.getLogger(__name__)


@dataclass
class PTTrainingConfig(TrainingArguments):
    """`TrainingArguments` with what bem_peft adds.

    Raises:
        ValueError, TypeError: a multiplier, cap, policy or tolerance that does not exist or is out of range.
    """

    learning_rate: float | None = field(  # a float in a Trainer's hands
        default=None,
        metadata={"help": "None: what was measured for the adapter's method, `LearningRates.suggest(model)`'s."},
    )
    variant_lr_multipliers: dict[str, float] = field(
        default_factory=lambda: dict(VARIANT_LR_MULTIPLIERS),
        metadata={"help": "Learning rate of a method over `learning_rate`: for 'PT1' to 'PT4'."},
    )
    group_lr_multipliers: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Learning rate of a group over its method's: 'projection', 'controller', 'mask', 'factors', "
            "'gamma', 'beta', or 'PT3/factors' for one method's."
        },
    )
    loraplus_lr_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of what writes into the output (B; gamma and beta of PT4; LoRA's lora_B) over that "
            "of the rest, as in LoRA+."
        },
    )
    max_singular_value: float | None = field(
        default=None, metadata={"help": "Cap on sigma_1 of every additive update, after each step."}
    )
    fro_budget: float | None = field(
        default=None, metadata={"help": "Cap on the Frobenius norm of every additive update, after each step."}
    )
    budget_anchor: str | None = field(
        default=None,
        metadata={
            "help": "Adapter whose cost the run must keep, as 'lora:r=8'; without target_modules it stands at the "
            "run's own sites. None: no budget."
        },
    )
    budget_quantities: list[str] = field(
        default_factory=lambda: ["params", "flops"], metadata={"help": "Of 'params', 'flops', 'memory', 'stored'."}
    )
    budget_tolerance_ratio: float = field(default=0.05, metadata={"help": "0.05 is 5 %, on both sides."})
    budget_policy: str = field(default="raise", metadata={"help": "'raise', 'warn' or 'stop'."})

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "variant_lr_multipliers", "group_lr_multipliers"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multipliers(self)
        for name in ("max_singular_value", "fro_budget"):
            check.check_optional_number(self, name, 0.0, exclusive=True)
        check.check_choice(self, "budget_policy", POLICIES)
        check.check_number(self, "budget_tolerance_ratio", 0.0, 1.0)
        known = ("params", "flops", "memory", "stored")
        if not self.budget_quantities or not set(self.budget_quantities) <= set(known):
            raise check.field_error("budget_quantities", self.budget_quantities, f"must be a choice of {known}")
        if self.budget_anchor is not None:
            parse_adapter(self.budget_anchor)


class PTTrainer(Trainer):
    """A Trainer for PEFT models; `args` may be a `PTTrainingConfig` or plain `TrainingArguments`.

    Args:
        budget: what the run must keep, in place of `budget_anchor`. Everything else as for Trainer.

    Raises:
        ValueError: both `budget` and `budget_anchor`, a cap without an additive update to cap, or no `learning_rate`
            and none that was measured for the method.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *pos: Any,
        budget: BudgetConstraints | None = None,
        **kwargs: Any,
    ) -> None:
        if args is not None and args.learning_rate is None:
            args = copy.copy(args)  # which may be for other adapters too
            if model is not None:
                choose_rate(args, model)
        super().__init__(model, args, *pos, **kwargs)
        config = self.args
        if budget is not None and getattr(config, "budget_anchor", None) is not None:
            raise ValueError("`budget` and `budget_anchor` are both given: set one of them.")
        if getattr(config, "budget_anchor", None) is not None:
            anchor = parse_adapter(config.budget_anchor)
            budget = budget_of(self.model, anchor, config.budget_quantities, config.budget_tolerance_ratio)
        if budget is not None:
            BudgetCallback(budget, policy=getattr(config, "budget_policy", "raise")).attach(self)
        caps = [getattr(config, name, None) for name in ("max_singular_value", "fro_budget")]
        if any(cap is not None for cap in caps):
            SpectralGovernance(*caps).attach(self.model)
        own = [c for c in self.callback_handler.callbacks if isinstance(c, AdapterCallback)]
        if not own:  # the adapter has nothing to watch now, and may have later
            own = [AdapterCallback()]
            self.callback_handler.callbacks.insert(0, own[0])
        own[0].trainer = self

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; the model's learning rate is chosen where none is given."""
        model: nn.Module = super().call_model_init(trial)
        if self.args.learning_rate is None:
            choose_rate(self.args, model)
        return model

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """The optimizer that `args.optim` names, over the methods' parameter groups."""
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        taken = sorted({"params", "model", "optimizer_dict"} & set(options))
        if taken:
            raise ValueError(
                f"`optim` = {args.optim!r}: this optimizer makes its own parameter groups, so the methods' learning "
                "rates would be lost; use transformers' Trainer for it."
            )
        return optimizer, {**options, "params": parameter_groups(model, args)}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the section on how to load the adapter, which its card would be without."""
        super().create_model_card(*args, **kwargs)
        config = getattr(self.accelerator.unwrap_model(self.model), "active_peft_config", None)
        if isinstance(config, AdapterConfig) and self.is_world_process_zero() and self.args.output_dir is not None:
            add_loading_section(self.args.output_dir, config)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As Trainer's; True goes on from the newest checkpoint that was written to its end.

        Raises:
            ValueError: True, and there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir or "trainer_output")
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in output_dir = {self.args.output_dir!r} to go on from.")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def choose_rate(args: TrainingArguments, model: nn.Module) -> None:
    """Give `args` the learning rate that was measured for the adapter of `model`, and say so."""
    found = suggested_rate(model)
    args.learning_rate = found.learning_rate
    logger.warning("learning rate %s", found.source)
