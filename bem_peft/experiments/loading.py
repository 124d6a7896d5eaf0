"""The base model of an experiment and its tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bem_peft.experiments.sections import ModelSection


def load_tokenizer(section: ModelSection) -> tuple[PreTrainedTokenizerBase, bool]:
    """(tokenizer, whether the model is an encoder-decoder), without the model's weights."""
    tokenizer = AutoTokenizer.from_pretrained(section.path, revision=section.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.from_pretrained(section.path, revision=section.revision)
    return tokenizer, bool(config.is_encoder_decoder)


def load_model(section: ModelSection) -> PreTrainedModel:
    """The model, causal or encoder-decoder as its config says."""
    config = AutoConfig.from_pretrained(section.path, revision=section.revision)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options: dict[str, Any] = {"revision": section.revision}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    return auto.from_pretrained(section.path, dtype=dtype, **options)
