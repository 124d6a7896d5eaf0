"""Parameter groups for the optimizer: each trainable parameter once, in a stable order, with its learning rate.

    optimizer = torch.optim.AdamW(parameter_groups(model, LearningRates(learning_rate=8e-3)))
    Trainer(model, arguments, optimizers=(optimizer, None), ...)      # SFTTrainer takes it the same way

A group's learning rate is  learning_rate * variant multiplier * group multiplier, times `loraplus_lr_ratio` for what
writes into the output. A scheduler scales what it finds, and a checkpoint stores it, so neither has to know.

Source: the ratio is that of Hayou et al., LoRA+, 2024, arXiv:2402.12354, which PEFT has for LoRA alone
(`create_loraplus_optimizer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import TrainingArguments

from bem_peft import field_checks as check
from bem_peft.training.suggested_rates import suggested_rate
from bem_peft.tuners.base.adapter import Adapter

# 1 throughout is what short runs on real text ask for (benchmarks/learning_rates.py); the multipliers of the document
# that the methods come from are SEED_VARIANT_LR_MULTIPLIERS
VARIANT_LR_MULTIPLIERS: Mapping[str, float] = {"PT1": 1.0, "PT2": 1.0, "PT3": 1.0, "PT4": 1.0}
SEED_VARIANT_LR_MULTIPLIERS: Mapping[str, float] = {"PT1": 1.0, "PT2": 0.5, "PT3": 1.5, "PT4": 0.1}
GROUPS = ("projection", "controller", "mask", "factors", "gamma", "beta")
OTHER = "other"  # of modules_to_save, or of another PEFT method
OUTPUT = "/output"  # what `loraplus_lr_ratio` is for, in groups of its own where that is not 1


@dataclass
class LearningRates:
    """What `parameter_groups` reads; a `PTTrainingConfig` has the same fields.

    Args:
        learning_rate: before multipliers, > 0.
        weight_decay: for all but biases, >= 0.
        variant_lr_multipliers: for "PT1" to "PT4", > 0; what is left out is 1.
        group_lr_multipliers: for the groups of a method: "projection", "controller", "mask", "factors", "gamma",
            "beta", or one method's alone as "PT3/factors"; > 0; what is left out is 1.
        loraplus_lr_ratio: the rate of what writes into the output (B; gamma and beta of PT4; LoRA's lora_B) over that
            of the rest, > 0.
        source: where the rate comes from; for people.

    Raises:
        ValueError, TypeError: a key that does not exist, or a value that is no positive number.
    """

    learning_rate: float
    weight_decay: float = 0.0
    variant_lr_multipliers: dict[str, float] = field(default_factory=lambda: dict(VARIANT_LR_MULTIPLIERS))
    group_lr_multipliers: dict[str, float] = field(default_factory=dict)
    loraplus_lr_ratio: float = 1.0
    source: str = ""

    @classmethod
    def suggest(cls, model: nn.Module, config: PeftConfig | None = None) -> LearningRates:
        """The rate that was best for the method where it was measured; `source` says where, and for which size.

        Args:
            model: the base model, or, without `config`, a PeftModel; its weights are not read.

        Raises:
            ValueError: no rate was measured for the method; `model` is adapted already, or, without `config`, not.
        """
        found = suggested_rate(model, config)
        return cls(found.learning_rate, source=found.source)

    def __post_init__(self) -> None:
        check.check_number(self, "learning_rate", 0.0, exclusive=True)
        check.check_number(self, "weight_decay", 0.0)
        check_multipliers(self)


def check_multipliers(config: LearningRates | TrainingArguments) -> None:
    """Raise ValueError or TypeError where a multiplier's name or value, or the ratio, is wrong."""
    check.check_number(config, "loraplus_lr_ratio", 0.0, exclusive=True)
    pairs = {f"{variant}/{group}" for variant in VARIANT_LR_MULTIPLIERS for group in GROUPS}
    allowed = {
        "variant_lr_multipliers": set(VARIANT_LR_MULTIPLIERS),
        "group_lr_multipliers": set(GROUPS) | pairs,
    }
    for name, keys in allowed.items():
        given = getattr(config, name)
        if not isinstance(given, dict):
            raise TypeError(f"`{name}` = {given!r}: must map names to multipliers.")
        for key, value in given.items():
            if key not in keys:
                known = sorted(keys) if name.startswith("variant") else [*GROUPS, "PT<n>/<group>"]
                raise check.field_error(name, given, f"{key!r} is none of {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
                raise check.field_error(
                    name, given, f"the multiplier of {key!r} must be above 0 and finite", "freeze what is not to learn"
                )


def parameter_groups(model: nn.Module, config: LearningRates | TrainingArguments) -> list[dict[str, Any]]:
    """The optimizer's groups of all trainable parameters of `model`.

    Args:
        config: `LearningRates`, a `PTTrainingConfig`, or plain `TrainingArguments` (multipliers of 1).

    Returns:
        Groups {"name": "PT3/factors", "params": [...], "lr": ..., "weight_decay": ...}; biases in groups of their own,
        "PT1/controller/no_decay", and with a `loraplus_lr_ratio` what writes into the output, "PT1/projection/output".
        Each trainable parameter is in exactly one; the order depends on the methods alone.

    Raises:
        ValueError: the model has nothing to train, or `config` has no learning rate.
    """
    if config.learning_rate is None:  # of a PTTrainingConfig
        raise ValueError(
            "`learning_rate` = None: is chosen by PTTrainer; elsewhere give one, as LearningRates.suggest(model)'s."
        )
    ratio = getattr(config, "loraplus_lr_ratio", 1.0)
    owners: dict[int, str] = {}
    writers: set[int] = set()
    for module in model.modules():
        if isinstance(module, Adapter):
            for name, parameter in module.named_parameters(recurse=False):
                if name in module.lr_groups:
                    owners[id(parameter)] = f"{module.variant}/{module.lr_groups[name]}"
                if name in module.factors:
                    writers.add(id(parameter))
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = owners.get(id(parameter), OTHER)
            if ratio != 1.0 and (id(parameter) in writers or (key == OTHER and "lora_B" in name)):
                key += OUTPUT
            is_bias = parameter.dim() == 1 and "bias" in name.rpartition(".")[2]
            found.setdefault(key + "/no_decay" * is_bias, []).append(parameter)
    if not found:
        raise ValueError("the model has no trainable parameter: load the adapter with is_trainable=True.")
    known = [f"{v}/{g}" for v in VARIANT_LR_MULTIPLIERS for g in GROUPS]
    others = {"/".join(key.split("/")[:2]) for key in found if not key.startswith(OTHER)} - set(known)  # not ours
    order = [*known, *sorted(others), OTHER]
    ends = ("", "/no_decay", OUTPUT, f"{OUTPUT}/no_decay")
    names = [f"{key}{end}" for key in order for end in ends if f"{key}{end}" in found]
    return [
        {
            "name": name,
            "params": found[name],
            "lr": config.learning_rate * _multiplier(name, config) * (ratio if OUTPUT in name else 1.0),
            "weight_decay": 0.0 if name.endswith("/no_decay") else config.weight_decay,
        }
        for name in names
    ]


def _multiplier(name: str, config: LearningRates | TrainingArguments) -> float:
    if name.startswith(OTHER):
        return 1.0
    of_variants, of_groups = (getattr(config, f"{of}_lr_multipliers", {}) or {} for of in ("variant", "group"))
    variant, group = name.split("/")[:2]
    own = of_groups.get(f"{variant}/{group}", of_groups.get(group, 1.0))
    return float(of_variants.get(variant, 1.0) * own)
