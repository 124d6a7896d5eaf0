"""Axolotl's plugin for every method of bem_peft, written for axolotl 0.19.0:

    plugins: [bem_peft.integrations.axolotl.BemPlugin]
    adapter: kronecker
    bem_peft: {u_rank: 4, v_rank: 7}

`adapter` is a method as on the command line, `bem_peft` has the fields of its config. Axolotl imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel
from transformers import PreTrainedModel

from bem_peft.tuners.adapter_spec import config_of, own_method_names

_FOR_ALL = ("lora_model_dir", "peft_autocast_adapter_dtype")  # mean the same for every adapter


class BemArgs(BaseModel):
    """The key that the plugin adds to Axolotl's YAML."""

    bem_peft: dict[str, Any] | None = None


class BemPlugin(BasePlugin):
    """Builds, or loads from `lora_model_dir`, the adapter that `adapter` and `bem_peft` name."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys that it is to take."""
        return f"{__name__}.BemArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The values of `adapter` that this plugin answers for."""
        return [AdapterCapabilities(name=name) for name in own_method_names()]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PreTrainedModel | PeftModel | None, PeftConfig | None] | None:
        """The adapted model and its config; (None, config) where the trainer adapts; None for an adapter of others.

        Raises:
            ValueError: a key of LoRA that would do nothing, or a field that the method refuses.
        """
        if cfg.adapter not in own_method_names():
            return None
        _refuse_keys_of_lora(cfg)
        values = {"task_type": "CAUSAL_LM"} | _plain(cfg.bem_peft or {})
        config = config_of({**values, "method": cfg.adapter}, f"adapter: {cfg.adapter}")
        if config_only:
            return None, config
        options: dict[str, Any] = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
            return loaded, loaded.active_peft_config
        return get_peft_model(model, config, **options), config


def _refuse_keys_of_lora(cfg: Mapping[str, Any]) -> None:
    for key, value in cfg.items():
        is_of_lora = key.startswith(("lora_", "peft_")) or key in ("peft", "relora", "loraplus_lr_ratio")
        if is_of_lora and key not in _FOR_ALL and value not in (None, False, 0):  # Axolotl sets lora_dropout to 0
            raise ValueError(
                f"{key} = {value!r}: tells of a LoRA and would do nothing; the fields stand in `bem_peft`."
            )


def _plain(value: Any) -> Any:
    """Without Axolotl's mappings, which answer None where a key is missing."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
