"""Random models of two blocks: one of each kind that the contract names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.jamba import modeling_jamba

VOCABULARY = 64


def llama(**changes: Any) -> nn.Module:
    """Llama with grouped queries: 4 heads, 2 key-value heads."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def llama_mqa() -> nn.Module:
    """One key-value head for all queries."""
    return llama(num_key_value_heads=1)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def bart() -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    )


def qwen2_moe() -> nn.Module:
    """Fused routed experts, and a shared expert whose down projection is a module."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def jamba() -> nn.Module:
    """A hybrid: a state-space block and an attention block, dense MLPs."""
    return JambaForCausalLM(
        JambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=8,
            expert_layer_offset=7,
            num_experts=1,
            num_experts_per_tok=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_mqa": llama_mqa,
    "gpt2": gpt2,
    "t5": t5,
    "bart": bart,
    "qwen2_moe": qwen2_moe,
    "jamba": jamba,
}
SEQ2SEQ = ("t5", "bart")


def build(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The same weights for the same seed; in evaluation mode."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*mamba.*")
        model = ARCHITECTURES[architecture]()
    with torch.no_grad():  # the default initialisation is so small that rounding would hide an effect
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name:
                parameter.normal_(std=0.15 if "emb" not in name and "wte" not in name and "shared" not in name else 1.0)
    return model.to(dtype).eval()


def first_cache(model: Any, batch: int) -> Any:
    """The cache that a model wants at its first step; None: it makes its own, as all do since transformers 5."""
    hybrid = getattr(modeling_jamba, "HybridMambaAttentionDynamicCache", None)
    if model.config.model_type != "jamba" or hybrid is None:
        return None
    return hybrid(model.config, batch, dtype=model.dtype, device=model.device)


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def call(architecture: str, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments of one forward pass over `ids`; for seq2seq both halves read them."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if mask is not None:
        inputs["attention_mask"] = mask
    if architecture in SEQ2SEQ:
        inputs["decoder_input_ids"] = ids
    return inputs
