"""Tiny random checkpoints in folders that are called as the hub ids of PEFT's test suite.

The suite runs with the parent folder as its working directory, so `from_pretrained("owner/name")` finds a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
BART = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
OPT = {
    **TOKENS,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 3,
}

# hub id -> (model class, config class, fields of the config)
MODELS: dict[str, tuple[str, str, dict[str, object]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**LLAMA, "head_dim": 8, "sliding_window": 16},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        BERT,
    ),
    "bert-base-uncased": ("BertForSequenceClassification", "BertConfig", BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**LLAMA, "num_labels": 1},
    ),
}

# ids that only left out tests name (see left_out.py)
NOT_BUILT = {
    "peft-internal-testing/opt-125m": "LoRA: DoRA key remapping, timing, dynamic dispatch",
    "peft-internal-testing/tiny-random-gemma4-E2B": "prefix tuning",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "prefix tuning",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "prompt learning",
    "hf-internal-testing/tiny-random-gpt2": "prompt learning",
    "gpt2": "DoRA",
}


def checkpoint_key() -> str:
    """Changes with this file and with transformers, so that an old checkpoint is not taken for a new one."""
    return hashlib.sha256(Path(__file__).read_bytes() + transformers.__version__.encode()).hexdigest()[:12]


def build_checkpoints(folder: Path) -> None:
    """Write what is not there yet.

    Matrices have a standard deviation of 0.1, and the seed is one at which two random adapters generate different
    texts: both are what the suite's own sanity checks ask for.
    """
    for model_id, (class_name, config_name, fields) in MODELS.items():
        if (folder / model_id / "config.json").is_file():
            continue
        config_class: Callable[..., PreTrainedConfig] = getattr(transformers, config_name)
        torch.manual_seed(2)
        model: PreTrainedModel = getattr(transformers, class_name)(config_class(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder / model_id)
