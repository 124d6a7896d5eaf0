"""ms-swift's tuner for every method of bem_peft, written for ms-swift 4.6.0. A file of two lines, tuner.py,

    from bem_peft.integrations.ms_swift import register_tuner
    register_tuner("pt3", "kronecker:u_rank=4,v_rank=7")

makes it one of `swift sft --external_plugins tuner.py --tuner_type pt3 ...`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftConfig, get_peft_model
from swift.arguments.tuner_args import TunerArguments
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from bem_peft.tuners.adapter_spec import parse_adapter


def register_tuner(name: str, spec: str) -> None:
    """Make `spec`, a config in one line, a tuner type of ms-swift.

    Raises:
        AdapterSpecError: a spec that names no config.
    """
    config = parse_adapter(spec)
    config.inference_mode = False  # a saved config says True
    tuners_map[name] = type(f"BemTuner_{name}", (BemTuner,), {"config": config})


class BemTuner(PeftTuner):
    """Adapts a model by `config`; loads as PeftTuner does."""

    config: PeftConfig

    @classmethod  # ms-swift calls it on the class
    def prepare_model(cls, args: Any, model: nn.Module) -> nn.Module:
        """The adapted model.

        Raises:
            ValueError: an argument of ms-swift's own tuners, which would do nothing.
        """
        for field in dataclasses.fields(TunerArguments):
            default = field.default_factory() if callable(field.default_factory) else field.default
            value = getattr(args, field.name)
            if value != default and str(value).lower() != default:  # ms-swift makes True of "true"
                raise ValueError(
                    f"--{field.name} {value}: would do nothing with --tuner_type {args.tuner_type}; remove it."
                )
        if cls.config.task_type is None:
            cls.config.task_type = args.task_type.upper()
        return get_peft_model(model, cls.config)

    @staticmethod
    def save_pretrained(
        model: Any, save_directory: str, state_dict: dict[str, Any] | None = None,
        safe_serialization: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        """As PeftTuner, with the `state_dict` that DeepSpeed and FSDP have gathered, which that leaves out."""
        only_ours = {"selected_adapters": ["default"]} | kwargs
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, state_dict=state_dict, **only_ours)
