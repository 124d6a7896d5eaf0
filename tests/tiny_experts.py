"""Random models of two blocks with fused experts: one of each family that the contract names, and others."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

EXPERTS = 4
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "deepseek_v3", "jamba", "nemotron_h")
OF_THEIR_OWN = (
    "llama4_text",
    "longcat_flash",
    "jetmoe",
)  # products of their own, whatever `experts_implementation` says


def spread(model: nn.Module) -> nn.Module:
    """Weights so large that rounding does not hide an effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or "bias" in name:
                parameter.normal_(std=0.15 if "emb" not in name else 1.0)
    return model


def small(kind: str, **changes: Any) -> nn.Module:
    """A random model of two blocks of the family."""
    sizes = {**SIZES, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "pad_token_id": 0, "head_dim": 8}
    names = {
        "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
        "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        "gpt_oss": ("GptOss", {"num_local_experts": EXPERTS, "layer_types": ["full_attention"] * 2}),
        "granitemoe": ("GraniteMoe", {"num_local_experts": EXPERTS}),
        "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
        "llama4_text": ("Llama4", {"num_local_experts": EXPERTS, "intermediate_size_mlp": 48, "use_qk_norm": False}),
        "jamba": (
            "Jamba",
            {
                "num_experts": EXPERTS, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2,
                "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2,
            },
        ),
        "nemotron_h": (
            "NemotronH",
            {
                "n_routed_experts": EXPERTS, "layers_block_type": ["moe", "attention", "moe", "mamba"],
                "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1,
                "moe_shared_expert_intermediate_size": 24, "moe_latent_size": None,
            },
        ),
        "jetmoe": ("JetMoe", {"num_local_experts": EXPERTS, "kv_channels": 8, "intermediate_size": 24}),
        "longcat_flash": (
            "LongcatFlash",
            {
                "n_routed_experts": EXPERTS, "zero_expert_num": 2, "num_layers": 2, "num_hidden_layers": 4,
                "expert_ffn_hidden_size": 24,
                "ffn_hidden_size": 48, "moe_topk": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4,
            },
        ),
        "deepseek_v3": (
            "DeepseekV3",
            {
                "n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
                "q_lora_rank": 8,
                "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
                "num_key_value_heads": 4,
            },
        ),
    }  # fmt: skip
    family, own = names[kind]
    torch.manual_seed(0)  # also of what `spread` leaves as it is
    text = "Text" if kind.endswith("_text") else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**sizes, **own, **changes})
    model = spread(getattr(transformers, f"{family}ForCausalLM")(config)).eval()
    model.set_experts_implementation("eager")
    return model
