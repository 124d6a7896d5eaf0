"""The section `training`: fields of `PTTrainingConfig`, and whether a Trainer takes them together.

What depends on several fields, or on a package that is installed, the Trainer says only when it is made. So one is
made here, of a tiny model, with its optimizer and scheduler, in a folder that is removed.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_liger_kernel_available

from bem_peft.experiments.fields import Problems, blamed, check_keys
from bem_peft.experiments.sections import Experiment
from bem_peft.training.suggested_rates import is_measured, refusal

# set for each seed, or from another section
RESERVED = ("output_dir", "seed", "data_seed", "budget_anchor", "budget_policy", "budget_tolerance_ratio")
UNREAD = ("resume_from_checkpoint", "do_train", "do_eval", "do_predict")
NOT_NEGATIVE = ("learning_rate", "weight_decay", "warmup_steps", "warmup_ratio", "max_grad_norm", "adam_epsilon")
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
CAPS = ("max_singular_value", "fro_budget")
LOSSES = ("loss", "eval_loss")  # what an evaluation during training gives


def check_training(training: dict[str, Any], adapter: PeftConfig | None, problems: Problems) -> None:
    """Note all that is wrong with the fields. `adapter`: None where it is wrong itself."""
    from bem_peft.training.trainer import PTTrainingConfig

    before = len(problems)
    for name in [name for name in RESERVED if name in training]:
        other = "budget" if name.startswith("budget") else "seeds" if "seed" in name else "output_dir"
        problems.append(f"training.{name}: is set by `{other}`; remove it")
        del training[name]
    for name in [name for name in UNREAD if name in training]:
        problems.append(f"training.{name}: is read by no Trainer; a stopped run goes on by itself; remove it")
        del training[name]
    for name, value in training.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not math.isfinite(value):
            problems.append(f"training.{name} = {value}: must be finite")
        elif is_number and name in NOT_NEGATIVE and value < 0:
            problems.append(f"training.{name} = {value}: must be at least 0")
        elif is_number and name in AT_LEAST_ONE and value < 1:
            problems.append(f"training.{name} = {value}: must be at least 1")
        elif is_number and name == "max_steps" and value < 1 and value != -1:
            problems.append(f"training.max_steps = {value}: must be at least 1, or -1 for num_train_epochs")
        elif is_number and name == "num_train_epochs" and value <= 0:
            problems.append(f"training.num_train_epochs = {value}: must be above 0")
    if training.get("learning_rate") is None and adapter is not None and not is_measured(adapter):
        problems.append(f"training.learning_rate: is missing; {refusal(adapter)}")
    right = check_keys(PTTrainingConfig, training, "training", problems)
    given = {name: value for name, value in training.items() if name in right}
    made = blamed(PTTrainingConfig, given, "training", problems)
    if made is not None:
        _check_choice_of_best(made, given, problems)
        _check_caps(made, adapter, problems)
        if made.use_liger_kernel and not is_liger_kernel_available():
            problems.append("training.use_liger_kernel = True: needs the package liger-kernel; install it")
    if len(problems) == before:
        blamed(_rehearsed, given, "training", problems)


def rate_told(experiment: Experiment) -> str | None:
    """What is used where the file gives no learning rate; None where it gives one."""
    if experiment.training.get("learning_rate") is not None:
        return None
    return (
        "learning rate: `training` has none, so that the one measured for the method is taken when the model is "
        "loaded (docs/learning_rates.md)"
    )


def _check_choice_of_best(made: Any, given: Mapping[str, Any], problems: Problems) -> None:
    """`save_strategy` best and `load_best_model_at_end` choose a checkpoint by an evaluation during training."""
    is_best = made.save_strategy == "best" or made.load_best_model_at_end
    if made.save_strategy == "best" and made.eval_strategy == "no":
        problems.append("training.save_strategy = 'best': needs an `eval_strategy`, steps or epoch")
    if given.get("metric_for_best_model") not in (None, *LOSSES):
        problems.append(
            f"training.metric_for_best_model = {made.metric_for_best_model!r}: must be eval_loss, the only metric that "
            "is measured during training"
        )
    elif is_best and made.metric_for_best_model is None:
        problems.append("training.metric_for_best_model: is missing, and `save_strategy` = 'best' needs it: eval_loss")
    elif is_best and made.greater_is_better:
        problems.append("training.greater_is_better = True: would keep the checkpoint with the highest loss; remove it")


def _check_caps(made: Any, adapter: PeftConfig | None, problems: Problems) -> None:
    if adapter is None or any(hasattr(part, CAPS[0]) for part in (adapter, *getattr(adapter, "methods", ()))):
        return
    for name in CAPS:
        if getattr(made, name) is not None:
            problems.append(f"training.{name}: caps an additive update, and {type(adapter).__name__} makes none")


def _rehearsed(**given: Any) -> Any:
    """A Trainer with the fields. Raises ValueError with what the Trainer says."""
    from bem_peft.training.trainer import PTTrainer, PTTrainingConfig

    if given.get("deepspeed") or given.get("fsdp"):  # need the launcher that the run will have
        return given
    rows = [{"input_ids": [0], "labels": [0]}]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        off: dict[str, Any] = {"push_to_hub": False, **dict.fromkeys(CAPS)}
        if given.get("learning_rate") is None:  # chosen for the run's own adapter
            off["learning_rate"] = 1e-3
        arguments = PTTrainingConfig(folder, **{"report_to": "none", **given, **off})
        try:
            sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
            tiny = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, pad_token_id=0))
            model = get_peft_model(tiny, LoraConfig(r=1, target_modules=["o_proj"]))
            trainer = PTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
            trainer.create_optimizer_and_scheduler(1)
            trainer.get_train_dataloader()
        except (ImportError, RuntimeError, TypeError) as error:
            raise ValueError(str(error)) from error
    return trainer
