"""What of PEFT's test files is not run, and why.

A test that chooses no method by a parameter, and is not named here, ends the run with an error: it came with a new
version of PEFT and has to be judged.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from cases import STAND_INS

OTHER_METHOD = "written for other methods: it names their config classes or parameters and takes no config of ours"
PROMPT = "prompt learning: virtual tokens, no adapted layers"
TOKENS = "trainable tokens: the embedding adapter of PEFT, which no config of ours has"
WEIGHTED = "add_weighted_adapter is a method of LoRA's and IA3's own model classes"
LORA_LAYER = "LoRA's layers (convolution, embedding, multi-head attention), variants or dispatch"
HUB = "loads the config of a LoRA from the hub, which every config class reads: network, and no field of ours"
LORA_TABLE = "fills LoRA's and DeLoRA's own table of target modules; ours finds the sites from the structure"
LORA_FIELDS = "of PEFT's wrapper around every method, but written with fields or parameters that only LoRA has"
CARD = "wants a card of more than 1,000 characters, the length of the blank template, which ours leaves out"

# pattern of "file::test" -> reason; what cases.py runs with a stand-in is not left out
LEFT_OUT: dict[str, str] = {
    # test_custom_models
    "test_custom_models::test_trainable_tokens_*": TOKENS,
    "test_custom_models::*trainable_token_indices*": TOKENS,
    "test_custom_models::test_set_requires_grad_trainable_tokens": TOKENS,
    "test_custom_models::test_loading_model_with_trainble_tokens_*": TOKENS,
    "test_custom_models::test_requires_grad_*": OTHER_METHOD,
    "test_custom_models::test_ia3_*": OTHER_METHOD,
    "test_custom_models::test_glora_*": OTHER_METHOD,
    "test_custom_models::test_gralora_*": OTHER_METHOD,
    "test_custom_models::test_monteclora_*": OTHER_METHOD,
    "test_custom_models::test_pvera_*": OTHER_METHOD,
    "test_custom_models::test_default_target_modules_osf": OTHER_METHOD,
    "test_custom_models::test_add_weighted_adapter_*": WEIGHTED,
    "test_custom_models::test_non_existing_model_card": CARD,
    "test_custom_models::test_lora_*": LORA_LAYER,
    "test_custom_models::test_merge_with_lora_bias_*": LORA_LAYER,
    "test_custom_models::*dora*": LORA_LAYER,
    "test_custom_models::test_unload_adapter_multihead_attention": LORA_LAYER,
    "test_custom_models::test_mha_gradients_set_correctly": LORA_LAYER,
    "test_custom_models::test_multirank*": LORA_LAYER,
    "test_custom_models::test_repr_lora_*": LORA_LAYER,
    "test_custom_models::test_mixed_adapter_batches_lora_conv*": LORA_LAYER,
    "test_custom_models::test_mixed_adapter_batches_mha_raises": LORA_LAYER,
    "test_custom_models::test_mixed_adapter_batches_lora_opt_timing": LORA_LAYER,
    "test_custom_models::test_custom_lora_layer_*": LORA_LAYER,
    "test_custom_models::test_override_lora_linear": LORA_LAYER,
    "test_custom_models::test_training_works": LORA_LAYER,
    "test_custom_models::test_saving_and_loading": LORA_LAYER,
    "test_custom_models::test_target_layer_without_in_features_out_features": LORA_LAYER,
    "test_custom_models::test_load_resized_embedding_ignore_mismatched_sizes": LORA_LAYER,
    "test_custom_models::test_save_pretrained_targeting_lora_to_embedding_layer*": LORA_LAYER,
    "test_custom_models::test_default_target_modules_list_of_str": LORA_TABLE,
    "test_custom_models::test_default_target_modules_str": LORA_TABLE,
    "test_custom_models::test_add_adapter_rejects_duplicate_name_without_mutation": LORA_FIELDS,
    "test_custom_models::test_multiple_adapters_mixed_modules_to_save_merging_adapters": WEIGHTED,
    "test_custom_models::test_multiple_adapters_same_modules_to_save_merging_adapters_raises": WEIGHTED,
    "test_custom_models::test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters": WEIGHTED,
    "test_custom_models::test_loading_adapter_preserves_custom_requires_grad": LORA_FIELDS,
    # test_config
    "test_config::test_from_pretrained": HUB,
    "test_config::test_from_pretrained_cache_dir*": HUB,
    "test_config::test_save_pretrained_with_runtime_config": HUB,
    "test_config::test_ia3_*": OTHER_METHOD,
    "test_config::test_adalora_*": OTHER_METHOD,
    "test_config::test_lora_*": LORA_FIELDS,
    "test_config::test_regex_with_layer_indexing_lora": LORA_FIELDS,
    "test_config::test_nested_config_*": LORA_FIELDS,
    # the others
    "*::test_prompt_*": PROMPT,
    "*::test_prefix_tuning_*": PROMPT,
    "*::test_training_prompt_learning_tasks": PROMPT,
    "*::test_active_adapters_prompt_learning": PROMPT,
    "*::test_set_requires_grad_prompt_learning_raises": PROMPT,
    "test_feature_extraction_models::test_passing_input_embeds_works": PROMPT,
    "*::test_weighted_combination_of_adapters": WEIGHTED,
    "test_decoder_models::test_generate_adalora_no_dropout": OTHER_METHOD,
    "test_decoder_models::test_lora_layer_replication": LORA_LAYER,
    "test_decoder_models::test_lora_embed_scale_*": LORA_LAYER,
    "test_decoder_models::test_save_pretrained_targeting_lora_to_embedding_layer": LORA_LAYER,
    "test_decoder_models::test_merge_and_unload_fixes_tie_word_embeddings_config": LORA_FIELDS,
    "test_encoder_decoder_models::test_save_shared_tensors": LORA_FIELDS,
}

# skips inside tests that run; the reason is the suite's own text (a part of it)
EXPECTED_SKIPS: dict[str, str] = {
    "refuses to merge": "a method whose update depends on the token; that it refuses, and changes nothing, is checked",
    "does not support the 'bias' argument": "the configs have no `bias` field",
    "bias warnings only": "the configs have no `bias` field",
    "support training the bias directly": "the configs have no `bias` field",
    "Multiple active adapters with modules_to_save": "PEFT allows one adapter at a time in modules_to_save",
    "does not apply to": PROMPT,
}


def reason_left_out(module: str, test: str) -> str | None:
    """Why `test` of the file `module` is not run; None: it is."""
    name = f"{module}::{test}"
    if name in STAND_INS:
        return None
    return next((reason for pattern, reason in LEFT_OUT.items() if fnmatchcase(name, pattern)), None)


def expected_skip(text: str) -> str | None:
    """Why the suite may skip with this text; None: it may not."""
    return next((reason for part, reason in EXPECTED_SKIPS.items() if part in text), None)
