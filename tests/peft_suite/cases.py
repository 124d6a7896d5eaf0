"""The configs of bem_peft that take the place of PEFT's own in its test suite."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
)

SUITE = "peft_suite_tests"  # name of the package that run.py makes of PEFT's tests
CLASSES = (CompositeConfig, DynamicRankMaskConfig, HeadGroupGatingConfig, KroneckerConfig, ResidualFiLMConfig)

# The suite's MLP: lin0 10 -> 20, lin1 20 -> 2, both with a bias, then a log-softmax; its inputs are 0 to 89 and it is
# trained by SGD at a rate of 0.5. The suite gives methods that diverge there a lower rate; ours get a lower scaling.
KRONECKER_MLP = {"u_rank": 2, "v_rank": 2, "scaling": 0.25}
RANK_MASK_MLP = {"total_rank": 8, "active_rank": 4, "scaling": 0.25}
TASK_MASK = {"mask_scope": "task", "value_gate": False}
STATIC = {"mode": "static", "max_beta": 0.0}
STATIC_BETA = {"mode": "static", "beta_unit": "absolute"}

# name -> (config class, fields); for the suite's MLP
VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "head_gating": (HeadGroupGatingConfig, {"num_groups": 2}),
    "head_gating_heads": (HeadGroupGatingConfig, {"num_heads": 5, "num_groups": 5, "rank_per_group": [1, 2, 1, 2, 1]}),
    "head_gating_dropout": (HeadGroupGatingConfig, {"num_groups": 2, "dropout": 0.1}),
    "rank_mask": (DynamicRankMaskConfig, RANK_MASK_MLP),
    "rank_mask_plain": (
        DynamicRankMaskConfig,
        {"total_rank": 6, "active_rank": 3, "use_hadamard_path": False, "value_gate": False, "dropout": 0.1},
    ),
    "rank_mask_task": (DynamicRankMaskConfig, {**RANK_MASK_MLP, **TASK_MASK}),
    "kronecker": (KroneckerConfig, KRONECKER_MLP),
    "kronecker_orthogonal": (KroneckerConfig, {**KRONECKER_MLP, "init_method": "orthogonal", "u_dim": 5}),
    "kronecker_random": (KroneckerConfig, {**KRONECKER_MLP, "init_method": "random", "dropout": 0.1}),
    # sizes at which no log-probability is so near 0 that allclose() sees float32's last bit of a logit
    "film": (ResidualFiLMConfig, {"gamma_dim": 4, "beta_dim": 3}),
    "film_spatial": (ResidualFiLMConfig, {"gamma_dim": 4, "beta_dim": 4, "mode": "spatial"}),
    "film_unguarded": (ResidualFiLMConfig, {"emergency_stabilization": False, "beta_unit": "absolute"}),
    "film_static": (ResidualFiLMConfig, STATIC_BETA),
    "composite": (
        CompositeConfig,
        {"methods": [HeadGroupGatingConfig(num_groups=2), KroneckerConfig(**KRONECKER_MLP)]},
    ),
    "composite_all": (
        CompositeConfig,
        {
            "methods": [
                HeadGroupGatingConfig(num_groups=2, scaling=0.05),
                DynamicRankMaskConfig(**{**RANK_MASK_MLP, "scaling": 0.05}),
                KroneckerConfig(**{**KRONECKER_MLP, "scaling": 0.05}),
                ResidualFiLMConfig(explosion_threshold=1e30),  # the others explode, which it would rightly undo
            ]
        },
    ),
    "composite_static": (
        CompositeConfig,
        {
            "methods": [
                DynamicRankMaskConfig(**RANK_MASK_MLP, **TASK_MASK),
                KroneckerConfig(**KRONECKER_MLP),
                ResidualFiLMConfig(**STATIC_BETA),
            ]
        },
    ),
}
MAIN = ("head_gating", "rank_mask", "kronecker", "film", "composite")
# both rows that the suite has for every method: same and different layers
ACTIVE_TOGETHER = (*MAIN, "rank_mask_task", "film_static", "composite_static")

# name -> (config class, fields); for models of transformers, whose sites are found. The updates that merge have rank 4,
# what the suite grants a conversion to LoRA; FiLM has a wide range, so that it changes what a tiny model generates.
KRONECKER_TINY = {"u_rank": 2, "v_rank": 2}
TASK_MASK_TINY = {"total_rank": 8, "active_rank": 4, **TASK_MASK}
STATIC_TINY = {**STATIC, "clamp_range": 0.9}
TRANSFORMER_VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "head_gating": (HeadGroupGatingConfig, {"num_groups": 2}),
    "rank_mask": (DynamicRankMaskConfig, {}),
    "rank_mask_task": (DynamicRankMaskConfig, TASK_MASK_TINY),
    "kronecker": (KroneckerConfig, KRONECKER_TINY),
    "film": (ResidualFiLMConfig, {}),
    "film_static": (ResidualFiLMConfig, STATIC_TINY),
    "composite": (CompositeConfig, {"methods": [HeadGroupGatingConfig(), KroneckerConfig(**KRONECKER_TINY)]}),
    "composite_static": (
        CompositeConfig,
        {
            "methods": [
                DynamicRankMaskConfig(**TASK_MASK_TINY),
                KroneckerConfig(**KRONECKER_TINY),
                ResidualFiLMConfig(**STATIC),
            ]
        },
    ),
}
TASK_TYPES = {
    "TestTokenClassificationModels": "TOKEN_CLS",
    "TestQuestionAnsweringModels": "QUESTION_ANS",
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}


def is_mergeable(config_class: type, fields: dict[str, Any]) -> bool:
    """Whether such an adapter is documented to merge into a layer with a bias."""
    if config_class is CompositeConfig:
        return all(
            is_mergeable(type(part), {f.name: getattr(part, f.name) for f in dataclasses.fields(part)})
            for part in CompositeConfig(**fields).methods
        )
    config = config_class(**fields)
    if config_class is DynamicRankMaskConfig:
        return config.mask_scope == "task" and not config.value_gate
    if config_class is ResidualFiLMConfig:
        return config.mode == "static" and (config.beta_unit == "absolute" or config.max_beta == 0.0)
    return config_class is KroneckerConfig


def _custom_cases() -> list[ParameterSet]:
    """(test_name, model_id, config_cls, config_kwargs): every variant on one layer, the main ones on more."""
    cases = []
    for name, (config_class, fields) in VARIANTS.items():
        targets: list[tuple[str, dict[str, Any]]] = [("lin0", {"target_modules": ["lin0"]})]
        if name in MAIN:
            targets += [
                ("lin1", {"target_modules": ["lin1"]}),
                ("regex", {"target_modules": "lin0"}),
                ("lin0-modules_to_save", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            ]
        if name in MAIN and name != "film":  # lin0, trained in full, grows until the controller's tanh is flat
            targets.append(("lin1-modules_to_save", {"target_modules": ["lin1"], "modules_to_save": ["lin0"]}))
        if name != "film_spatial":  # at lin1 its beta shifts both logits alike, which the log-softmax takes away
            targets.append(("both", {"target_modules": ["lin0", "lin1"]}))
        for label, where in targets:
            test_name = f"{name}-{label}"
            cases.append(pytest.param(test_name, "MLP", config_class, {**fields, **where}, id=test_name))
    apart = [  # one layer merges and the next does not
        KroneckerConfig(**KRONECKER_MLP, target_modules=["lin0"]),
        HeadGroupGatingConfig(num_groups=2, target_modules=["lin1"]),
    ]
    cases.append(pytest.param("composite_apart", "MLP", CompositeConfig, {"methods": apart}, id="composite_apart"))
    for name in MAIN:  # a rank of its own at one of two layers
        config_class, fields = VARIANTS[name]
        if config_class is CompositeConfig:
            continue
        pattern = {config_class.rank_fields[0]: 1 if name != "rank_mask" else 16}
        where = {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": pattern}}
        if name == "head_gating":
            where["rank_pattern"] = {"lin1": 3}
        cases.append(pytest.param(name, "MLP", config_class, {**fields, **where}, id=f"{name}-rank_pattern"))
    return cases


def _together_cases() -> list[ParameterSet]:
    """(test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2)."""
    cases = []
    for name in ACTIVE_TOGETHER:
        config_class, fields = VARIANTS[name]
        for label, second in (("same", "lin0"), ("different", "lin1")):
            first_fields = {**fields, "target_modules": ["lin0"], "init_weights": False}
            second_fields = {**fields, "target_modules": [second], "init_weights": False}
            cases.append(
                pytest.param(f"{name} {label}", name, config_class, first_fields, second_fields, id=f"{name}-{label}")
            )
    return cases


def _mixed_cases(first: dict[str, Any], second: dict[str, Any], names: tuple[str, ...] = MAIN) -> list[ParameterSet]:
    """(test_name, config0, config1): two adapters of one method whose rows are mixed in a batch."""
    cases = []
    for name in names:
        config_class, fields = VARIANTS[name]
        configs = [config_class(**fields, **where, init_weights=False) for where in (first, second)]
        cases.append(pytest.param(name, *configs, id=name))
    return cases


def _single_cases(with_name: bool) -> list[ParameterSet]:
    """(test_name, config) or (config0,): one adapter that changes the output."""
    cases = []
    for name in MAIN:
        config_class, fields = VARIANTS[name]
        config = config_class(**fields, target_modules=["lin0"], init_weights=False)
        cases.append(pytest.param(*((name, config) if with_name else (config,)), id=name))
    return cases


def _transformer_cases(task_type: str) -> list[ParameterSet]:
    """(config_cls, config_kwargs)."""
    return [
        pytest.param(config_class, {**fields, "task_type": task_type, "target_modules": None}, id=name)
        for name, (config_class, fields) in TRANSFORMER_VARIANTS.items()
    ]


def _stand_ins(fields_of: dict[type, dict[str, Any]]) -> list[ParameterSet]:
    """One class each, with the fields that a test does not give."""
    return [pytest.param(partial(cls, **fields_of.get(cls, {})), id=cls.__name__) for cls in CLASSES]


RANK_ONE = {"u_rank": 1, "v_rank": 1}
ON_CUSTOM = _stand_ins({KroneckerConfig: RANK_ONE, CompositeConfig: {"methods": [KroneckerConfig(**RANK_ONE)]}})
ON_TRANSFORMERS = _stand_ins(
    {KroneckerConfig: KRONECKER_TINY, CompositeConfig: {"methods": [KroneckerConfig(**KRONECKER_TINY)]}}
)
# Tests of every method's duties, written with `LoraConfig` and nothing of LoRA's: `file::test` -> what takes its
# place. In those of requires_grad, the parameters of our adapter take the place of `lora_A` and `lora_B`.
STAND_INS: dict[str, list[ParameterSet]] = {
    **{
        f"test_custom_models::{test}": ON_CUSTOM
        for test in (
            "test_delete_adapter_with_multiple_adapters_works",
            "test_delete_adapter_multiple_adapters_with_modules_to_save",
            "test_weight_bias_attributes",
            "test_existing_model_card",
            "test_save_embedding_layers_excludes_similarly_named_sibling",
            "test_load_does_not_overwrite_similarly_named_sibling",
            "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
            "test_requires_grad_modules_to_save_default",
            "test_requires_grad_modules_to_save_disabling",
            "test_requires_grad_modules_to_save_multiple_adapters",
            "test_requires_grad_follows_inference_mode_modules_to_save",
            "test_requires_grad_lora_different_targets",
            "test_requires_grad_lora_same_targets",
        )
    },
    "test_custom_models::test_multiple_adapters_automatic_modules_to_save": ON_TRANSFORMERS,
    "test_custom_models::test_multiple_adapters_no_needless_copy_modules_to_save": ON_TRANSFORMERS,
    "test_config::test_from_peft_type": ON_CUSTOM,  # goes through PeftType, of which only ours is left
    "test_encoder_decoder_models::test_load_model_low_cpu_mem_usage": ON_TRANSFORMERS,
    "test_feature_extraction_models::test_load_model_low_cpu_mem_usage": ON_TRANSFORMERS,
}
LIN0, LIN1 = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
LIN0_SAVED = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
LIN0_GRU = {"target_modules": ["lin0"], "modules_to_save": ["gru"]}
# tests that share their argument names with others but need cases of their own
BY_TEST: dict[str, list[ParameterSet]] = {
    "test_mixed_adapter_batches_different_target_layers": _mixed_cases(LIN0, LIN1),
    "test_mixed_adapter_batches_multiple_modules_to_save": _mixed_cases(LIN0_SAVED, LIN0_SAVED),
    "test_mixed_adapter_batches_unsupported_layer_raises": _mixed_cases(LIN0_GRU, LIN0_GRU),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": _mixed_cases(
        LIN0, {"target_modules": ["lin0", "lin1"]}
    ),
    "test_mixed_adapter_batches_merged_raises": _mixed_cases(
        LIN0, LIN0, ("rank_mask_task", "kronecker", "film_static", "composite_static")
    ),
    **{
        test: [pytest.param(partial(VARIANTS[name][0], **VARIANTS[name][1]), id=name) for name in MAIN]
        for test in (
            "test_multiple_adapters_mixed_modules_to_save",
            "test_multiple_adapters_mixed_modules_to_save_order_switched",
        )
    },
}
BY_ARGUMENTS: dict[tuple[str, ...], list[ParameterSet]] = {
    ("config_class", "mandatory_kwargs"): [
        *(pytest.param(config_class, {}, id=config_class.__name__) for config_class in CLASSES),
        pytest.param(CompositeConfig, VARIANTS["composite_all"][1], id="composite_all"),
    ],
    ("config_class",): [pytest.param(config_class, id=config_class.__name__) for config_class in CLASSES],
    ("test_name", "model_id", "config_cls", "config_kwargs"): _custom_cases(),
    ("config_cls",): [pytest.param(config_class, id=config_class.__name__) for config_class in CLASSES],
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): _together_cases(),
    ("test_name", "config0", "config1"): _mixed_cases(LIN0, LIN0),
    ("test_name", "config"): _single_cases(with_name=True),
    ("config0",): _single_cases(with_name=False),
}


def cases_for(module: str, owner: str, test: str, arguments: tuple[str, ...]) -> list[ParameterSet] | None:
    """The cases for one `parametrize` of a test of the class `owner`; None: it does not choose a method."""
    if arguments == ("config_cls", "config_kwargs"):
        return _transformer_cases(TASK_TYPES.get(owner) or TASK_TYPES[module])
    if arguments not in BY_ARGUMENTS:
        return None
    return BY_TEST.get(test, BY_ARGUMENTS[arguments])
