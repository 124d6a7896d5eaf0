"""The one place that knows what differs between versions of peft and transformers; nothing else compares versions.

Where all versions have a public name, that name is used and nothing stands here. `check_upstream` asks the installed
versions for everything that bem_peft takes from them beside their public API: an upgrade that renames one of these is
told by name, before anything is trained. `docs/upgrading.md` says what to do then.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

OLDEST = {"peft": "0.18.0", "transformers": "4.56.0"}  # below: see pyproject.toml
CACHE_NAMES = ("cache", "past_key_values")  # what the key-value cache is called: since transformers 5.24, and before
QUANTISED_WEIGHTS = ("Params4bit", "Int8Params")  # of bitsandbytes


class UpstreamError(ImportError):
    """The installed peft or transformers is too old, or has renamed something that bem_peft needs."""


class RefusedByTransformersError(ValueError):
    """transformers' own `add_adapter` and `load_adapter` do not take the installed peft."""


def installed(package: str) -> Version:
    """The version of `package` ("peft" or "transformers") that is imported."""
    module = {"peft": peft, "transformers": transformers}[package]
    return Version(str(module.__version__))


def require_supported() -> None:
    """Raise where a package is older than what bem_peft was ever tried with.

    Raises:
        UpstreamError: names the package, the version that was found, and the command that mends it.
    """
    for package, oldest in OLDEST.items():
        found = installed(package)
        if Version(found.base_version) < Version(oldest):
            raise UpstreamError(
                f"bem_peft needs {package} >= {oldest}, found {found}: pip install -U '{package}>={oldest}'"
            )


# the key-value cache


def _cache_field() -> str | None:
    """What the outputs of the installed transformers call the cache; None: neither name that is known here."""
    fields = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    return next((name for name in CACHE_NAMES if name in fields), None)


def _unknown_cache(where: str) -> UpstreamError:
    return UpstreamError(
        f"transformers {installed('transformers')}: {where} knows none of {CACHE_NAMES}, the names of the key-value "
        "cache so far. Add the new one to CACHE_NAMES in bem_peft/upstream.py; see docs/upgrading.md."
    )


def cache_argument(model: nn.Module) -> str:
    """The name under which `model`'s forward takes the key-value cache.

    A forward that names neither but takes anything by name gets what the installed transformers calls it.

    Raises:
        UpstreamError: the forward takes the cache under no known name.
    """
    inner: Any = model
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    taken = inspect.signature(inner.forward).parameters
    for name in CACHE_NAMES:
        if name in taken:
            return name
    usual = _cache_field()
    if usual is not None and any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return usual
    raise _unknown_cache(f"the forward of {type(inner).__name__}")


def cache_of(output: Any) -> Any:
    """The key-value cache in the output of a forward pass; None where it holds none.

    Raises:
        UpstreamError: the class of the output has no field of a known name.
    """
    fields = {field.name for field in dataclasses.fields(output)}
    for name in CACHE_NAMES:
        if name in fields:
            return getattr(output, name)
    raise _unknown_cache(f"the output {type(output).__name__}")


# quantised base layers: peft has backends for them since 0.20


class _Backend:
    """What peft 0.20's backends do for a bitsandbytes layer, less merging, for the versions before."""

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(base_layer).data

    def set_base_weight(self, layer: nn.Module, weight: torch.Tensor) -> None:
        raise TypeError(
            f"merging into a quantised base needs peft >= 0.20, found {installed('peft')}: pip install -U peft"
        )

    def maybe_clone_base_result(self, y: torch.Tensor) -> torch.Tensor:
        return y.clone()


def lora_turns_expert_axes() -> bool:
    """Whether PEFT's LoRA of a parameter (E, out, in) has in_features at A, as a LoRA of a module has."""
    from peft.tuners.lora.layer import ParamWrapper

    return "_did_swap_in_out_features" in ParamWrapper.__init__.__code__.co_names


def quantization_backend(base_layer: nn.Module, model: nn.Module) -> Any:
    """What reads and writes the weight of a quantised `base_layer`; None: it is not quantised."""
    if installed("peft") >= Version("0.20"):
        from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend

        return resolve_quantization_backend(base_layer, **get_quantization_kwargs(model))
    weight = getattr(base_layer, "weight", None)
    is_quantised = type(weight).__name__ in QUANTISED_WEIGHTS or hasattr(base_layer, "W_q")
    return _Backend() if is_quantised or type(weight).__module__.startswith("torchao.") else None


def quantised_weight(base_layer: nn.Module, backend: Any) -> torch.Tensor:
    """The weight of a quantised layer, dequantised by `backend`.

    In its first forward pass in evaluation on a CPU with AVX512-BF16 bitsandbytes lays a 4-bit weight out anew, and
    dequantises that as if it were laid out as before: it is first turned back, as it is whenever the layer is saved.

    Raises:
        ValueError: the installed bitsandbytes does not turn it back.
    """
    if _is_laid_out_anew(base_layer):
        base_layer.state_dict()
    if _is_laid_out_anew(base_layer):
        raise ValueError(
            "the 4-bit weight was laid out anew for the CPU by a forward pass in evaluation, and the installed "
            "bitsandbytes does not turn that back, so that it cannot be read or merged into: pip install -U "
            "bitsandbytes, merge before the first forward pass, or merge into the base loaded without quantisation."
        )
    weight: torch.Tensor = backend.get_base_weight(base_layer)
    return weight


def _is_laid_out_anew(base_layer: nn.Module) -> bool:
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


# saving and loading: peft asks the tuner since 0.21


def mend_saving(is_ours: Callable[[Any], bool], check_keys: Callable[[nn.Module, str, Iterable[str]], None]) -> None:
    """Let peft < 0.21 save and load adapters of ours as 0.21 does; nothing to do from 0.21 on.

    peft < 0.20 writes the tensors of all adapters into each one's file, for every method but LoRA, and no version
    before 0.21 asks the tuner about the keys of a file that it loads.

    Args:
        is_ours: whether a config is one of bem_peft.
        check_keys: raises where the keys of a file (without the adapter's name) are not those of an adapter.
    """
    if installed("peft") >= Version("0.21"):
        return
    from peft import peft_model
    from peft.utils import save_and_load

    save, load = save_and_load.get_peft_model_state_dict, save_and_load.set_peft_model_state_dict

    @functools.wraps(save)
    def get_peft_model_state_dict(
        model: Any, state_dict: dict[str, Any] | None = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        others = [re.escape(name) for name in model.peft_config if name != adapter_name]
        config = model.peft_config[adapter_name]
        if others and is_ours(config):
            foreign = re.compile(rf"\.{config.method}_[^.]*\.({'|'.join(others)})\.")
            whole = model.state_dict() if state_dict is None else state_dict
            state_dict = {key: value for key, value in whole.items() if not foreign.search(key)}
        result: dict[str, Any] = save(model, state_dict, adapter_name, *args, **kwargs)
        return result

    @functools.wraps(load)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: dict[str, Any], adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if is_ours(model.peft_config[adapter_name]):
            check_keys(model, adapter_name, peft_model_state_dict)
        return load(model, peft_model_state_dict, adapter_name, *args, **kwargs)

    for module in (peft, peft.utils, peft_model, save_and_load):
        module.get_peft_model_state_dict = get_peft_model_state_dict
        module.set_peft_model_state_dict = set_peft_model_state_dict


# transformers' own add_adapter and load_adapter


def refused_by_transformers() -> str | None:
    """Why transformers' `add_adapter` and `load_adapter` cannot work with the installed peft; None: they can."""
    from transformers.integrations import peft as integration

    needed = getattr(integration, "MIN_PEFT_VERSION", None)
    if needed is None or installed("peft") >= Version(needed):
        return None
    return (
        f"transformers {installed('transformers')} asks for peft >= {needed} in its own add_adapter and load_adapter, "
        f"whatever the method, and peft {installed('peft')} is installed: call peft.get_peft_model(model, config) or "
        f"peft.PeftModel.from_pretrained(model, folder) instead, install peft >= {needed}, or, where that is not "
        "released yet, an earlier transformers."
    )


def explain_refused_adapters() -> None:
    """Put `refused_by_transformers` in place of transformers' own words, which do not say what to do."""
    if refused_by_transformers() is None:
        return
    from transformers.integrations.peft import PeftAdapterMixin

    for name in ("add_adapter", "load_adapter"):
        original = getattr(PeftAdapterMixin, name)
        if not hasattr(original, "explained_by_bem_peft"):
            setattr(PeftAdapterMixin, name, _explained(original))


def _explained(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        reason = refused_by_transformers()
        if reason is not None:
            raise RefusedByTransformersError(reason)
        return original(*args, **kwargs)

    method.explained_by_bem_peft = True  # type: ignore[attr-defined]
    return method


# everything beside the public API


@dataclass(frozen=True)
class Needed:
    """Something of upstream that bem_peft calls: `module:attribute`, and the arguments that it passes by name."""

    path: str
    arguments: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """What is missing in the installed version; None: nothing."""
        module, _, attribute = self.path.partition(":")
        try:
            found: Any = functools.reduce(getattr, attribute.split("."), __import__(module, fromlist=["_"]))
        except (ImportError, AttributeError) as error:
            return f"{self.path} ({error})"
        if not self.arguments:
            return None
        taken = inspect.signature(found).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            return None
        gone = [name for name in self.arguments if name not in taken]
        return f"{self.path} takes no {', '.join(gone)}" if gone else None


_TUNER = "peft.tuners.tuners_utils:"
NEEDED = (
    Needed(_TUNER + "BaseTuner", ("model", "peft_config", "adapter_name", "low_cpu_mem_usage", "state_dict")),
    Needed(_TUNER + "BaseTuner.inject_adapter", ("model", "adapter_name")),
    Needed(_TUNER + "BaseTuner._check_target_module_exists"),
    Needed(_TUNER + "BaseTuner._check_merge_allowed"),
    Needed(_TUNER + "BaseTuner._prepare_adapter_config", ("peft_config", "model_config")),
    Needed(_TUNER + "BaseTuner._prepare_model", ("peft_config", "model")),
    Needed(_TUNER + "BaseTuner._replace_module", ("parent", "child_name", "new_module", "child")),
    Needed(_TUNER + "BaseTunerLayer._move_adapter_to_device_of_base_layer", ("adapter_name",)),
    Needed(_TUNER + "BaseTunerLayer.set_adapter", ("adapter_names", "inference_mode")),
    Needed(_TUNER + "BaseTunerLayer.get_base_layer"),
    Needed(_TUNER + "_ExcludedModule"),
    Needed(_TUNER + "_maybe_include_all_linear_layers", ("peft_config", "model")),
    Needed(_TUNER + "check_adapters_to_merge", ("module", "adapter_names")),
    Needed("peft.utils.other:AuxiliaryTrainingWrapper"),
    Needed("peft.utils.other:get_pattern_key"),
    Needed("peft.utils.other:transpose"),
    Needed("peft.utils:register_peft_method", ("name", "config_cls", "model_cls")),
    Needed("peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING"),
    Needed("peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING"),
    Needed("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING"),
    Needed("transformers.pytorch_utils:Conv1D"),
    Needed("transformers.trainer:DEFAULT_CALLBACKS"),
    Needed("transformers.trainer_utils:PREFIX_CHECKPOINT_DIR"),
    Needed("transformers.trainer:Trainer.get_optimizer_cls_and_kwargs", ("args", "model")),
    Needed("transformers:TrainingArguments._VALID_DICT_FIELDS"),
    Needed("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS"),
    Needed("transformers:AttentionInterface.register", ("key", "value")),
    Needed("transformers:AttentionMaskInterface.register", ("key", "value")),
    Needed("transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    Needed("transformers.models.auto.modeling_auto:MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    Needed("transformers.models.auto.configuration_auto:CONFIG_MAPPING_NAMES"),
    Needed("transformers.models.llama.modeling_llama:LlamaModel.forward", ("input_ids", "attention_mask", "use_cache")),
    Needed("transformers.models.llama.modeling_llama:eager_attention_forward"),
)


def check_upstream() -> list[str]:
    """What the installed peft, transformers and Python lack of what bem_peft needs; empty: nothing."""
    problems = [problem for needed in NEEDED if (problem := needed.problem()) is not None]
    if not hasattr(enum, "_proto_member"):
        problems.append("enum:_proto_member (Python's), by which a name is added to peft.PeftType")
    if _cache_field() is None:
        problems.append(str(_unknown_cache("CausalLMOutputWithPast")))
    return problems
