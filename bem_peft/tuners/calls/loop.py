"""What a training loop tells the adapters, and hears from them.

A transformers Trainer (TRL's included) made after the adapter was added gets `AdapterCallback` by itself. A bare loop
needs nothing where the loss is the model's own; `set_loss_scale` is for a loss of one's own under a float16 scaler or
with an accumulation that accelerate does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bem_peft.tuners.calls.call_state import CallState, Caps, find_call_state
from bem_peft.tuners.calls.penalty_call import Scaler
from bem_peft.tuners.steps.brake import emergency_count
from bem_peft.tuners.steps.optimizer_hooks import Watched


def penalty_values(model: nn.Module) -> dict[str, float]:
    """Means of the penalties since the last call of this function, for the logs of a bare loop.

    Returns:
        "penalty/<name>": the unweighted penalty, averaged over calls and sites; "penalty/total": what was added to the
        loss. Empty where no penalty is on or nothing ran in training. The values are this process's own.
    """
    state = find_call_state(model)
    return {} if state is None else state.log.read()


def set_loss_scale(model: nn.Module, *, accumulation_steps: int | None = None, scaler: Scaler | None = None) -> None:
    """Tell the penalties of `model` how a loop scales a loss that is not the model's own.

    Args:
        accumulation_steps: what the loop divides the loss by; None: what accelerate's shared state says, or 1.
        scaler: the `GradScaler` that multiplies it, if any.

    Raises:
        ValueError: no adapter of ours in the model, or steps below 1.
    """
    state = find_call_state(model)
    if state is None:
        raise ValueError("the model has no bem_peft adapter: call get_peft_model or add_adapter first.")
    steps: Callable[[], int] | None = None
    if accumulation_steps is not None:
        if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
            raise ValueError(f"`accumulation_steps` = {accumulation_steps!r}: must be a whole number of at least 1.")
        fixed = accumulation_steps

        def steps() -> int:
            return fixed

    state.loop.accumulation_steps, state.loop.scaler = steps, scaler


class AdapterCallback(TrainerCallback):
    """Gives the penalties the Trainer's loss scale, and puts penalties and emergencies into its logs."""

    def __init__(self) -> None:
        self.trainer: Any = None  # known to PTTrainer only; elsewhere the steps follow from the dataloader's length
        self._steps = 1
        self._caps: Caps | None = None  # of the model that the Trainer was made with

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.learning_rate is None:  # of a PTTrainingConfig
            raise ValueError(
                "`learning_rate` = None: is chosen by PTTrainer; give this Trainer one, as "
                "LearningRates.suggest(model).learning_rate."
            )
        call = self._call(kwargs)
        self._caps = None if call is None else call.caps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        call = self._call(kwargs)
        if call is not None:
            self._steps = args.gradient_accumulation_steps
            call.loop.accumulation_steps = self._accumulation_steps
            call.loop.scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            call.log.entries.clear()
            if self._caps is not None and call.caps == Caps() != self._caps:  # `model_init` made the model anew
                call.caps = self._caps
                for module in kwargs["model"].modules():
                    if isinstance(module, Watched):
                        module.on_added()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps = micro_batches(args.gradient_accumulation_steps, state.global_step, kwargs.get("train_dataloader"))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, call = kwargs.get("logs"), self._call(kwargs)
        if call is None or logs is None or "loss" not in logs:  # not an evaluation, not the summary
            return
        values = call.log.read()
        count = emergency_count(kwargs["model"])
        if count:
            values["emergencies"] = float(count)
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        call = self._call(kwargs)
        if call is not None:
            call.loop.accumulation_steps = call.loop.scaler = None

    def _accumulation_steps(self) -> int:
        return self._steps if self.trainer is None else int(self.trainer.current_gradient_accumulation_steps)

    @staticmethod
    def _call(kwargs: dict[str, Any]) -> CallState | None:
        model = kwargs.get("model")
        return None if model is None else find_call_state(model)


def micro_batches(accumulation_steps: int, global_step: int, dataloader: Sized | None) -> int:
    """Micro-batches of the optimizer step `global_step` of a Trainer; the last one of an epoch may have fewer."""
    try:
        batches = len(dataloader)  # type: ignore[arg-type]
    except TypeError:  # of unknown length
        return accumulation_steps
    updates = -(-batches // accumulation_steps)
    if not updates or global_step % updates != updates - 1:
        return accumulation_steps
    return batches % accumulation_steps or accumulation_steps


def attach_to_trainers() -> None:
    """Let every Trainer that is made from now on have an `AdapterCallback`."""
    from transformers import trainer

    if AdapterCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(AdapterCallback)
