"""Models on the meta device, from a model type or from the config of a folder or hub id: structure without weights."""

from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# Fields without which the default config of a type does not build (only building needs them, never the finder).
_INDEXER: dict[str, object] = {
    "indexer_budget": 2048, "indexer_compress_ratio": 4, "indexer_n_heads": 8, "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
REQUIRED_FIELDS: dict[str, dict[str, object]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
}
_AUTO_CLASSES = (
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModel,
)
_BUILD_ERRORS = (
    AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip


class ModelBuildError(ValueError):
    """A model type or path that gives no model; names the cause."""


def language_model_types() -> list[str]:
    """The model types of the causal and seq2seq language models of the installed transformers."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted({*causal, *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES})


def build_meta(model_type_or_path: str) -> nn.Module:
    """Builds a model on the meta device: no weights are read and no memory is used.

    Args:
        model_type_or_path: a model type of transformers (default config, with REQUIRED_FIELDS), a folder with a
            config.json, or a hub id. A folder or hub id gives the class its config names, else the first of seq2seq
            LM, causal LM, image-text LM, base model.

    Raises:
        ModelBuildError: unknown type, no such folder or hub id, or the config does not build.
    """
    is_type = model_type_or_path in CONFIG_MAPPING_NAMES and not Path(model_type_or_path, "config.json").is_file()
    try:
        if is_type:
            config = AutoConfig.for_model(model_type_or_path, **REQUIRED_FIELDS.get(model_type_or_path, {}))
        else:
            config = AutoConfig.from_pretrained(model_type_or_path)
        with torch.device("meta"):
            return _build(config)
    except _BUILD_ERRORS as error:
        what = "its default config" if is_type else "no model type, folder or reachable hub id, or its config"
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelBuildError(f"{model_type_or_path!r} cannot be built ({what}): {cause}") from error


def _build(config: PretrainedConfig) -> nn.Module:
    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)
        if model_class is not None:
            return model_class(config)
    for auto_class in _AUTO_CLASSES:
        if type(config) in auto_class._model_mapping:
            return auto_class.from_config(config)
    raise ValueError(f"no auto class of transformers takes {type(config).__name__}")
