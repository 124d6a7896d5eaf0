"""What adapters at fused experts cost: a token's experts alone, counted by a run and found by a search."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralForCausalLM

from bem_peft import KroneckerConfig, count_flops, count_memory, count_parameters, match_budget
from bem_peft.budget.site_cost import ModelCost
from tests.tiny_models import tokens
from tests.tuners.test_experts import CONFIGS, EXPERTS, IMPLEMENTATIONS, dense, small

SHARING = ("shared", "each", "factors")


def with_products(implementation: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = small("mixtral").to(dtype)
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("method", CONFIGS)
def test_the_search_costs_what_a_run_costs(method: str, sharing: str) -> None:
    """Parameters of all experts; FLOPs of the two of four that a token reaches, counted in a real run."""
    config = CONFIGS[method](expert_sharing=sharing)
    base, ids = with_products("eager"), tokens()
    with torch.device("meta"):
        cost = ModelCost(base, config)(config)
    model = get_peft_model(base, config)
    counted = count_flops(model, {"input_ids": ids, "labels": ids})
    assert cost == {"params": count_parameters(model).trainable, "flops": counted.adapter_per_token}
    dense_model = get_peft_model(dense().float(), CONFIGS[method]())
    on_dense = count_flops(dense_model, {"input_ids": ids, "labels": ids})
    assert counted.adapter_forward == 2 * on_dense.adapter_forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIGS["kronecker"](expert_sharing="each"), LoraConfig(target_modules=["o_proj"])])
def test_every_implementation_costs_the_same(config: Any, dtype: torch.dtype) -> None:
    """The loop's products are torch's own, counted by torch; grouped ones are not, in torch 2.13."""
    ids, found = tokens(), []
    for implementation in IMPLEMENTATIONS:
        counted = count_flops(
            get_peft_model(with_products(implementation, dtype), copy.deepcopy(config)),
            {"input_ids": ids, "labels": ids},
        )
        found.append((counted.base_forward, counted.adapter_forward, counted.base_backward, counted.adapter_backward))
    batched, grouped = found[IMPLEMENTATIONS.index("batched_mm")], found[IMPLEMENTATIONS.index("grouped_mm")]
    assert found[0] == batched
    assert grouped[:2] == batched[:2]
    if dtype is torch.bfloat16:  # transformers' own product of float32 has a backward that writes both gradients
        assert grouped == batched


def test_a_model_without_weights_is_counted_and_says_where_it_cannot_be() -> None:
    ids = tokens()
    with torch.device("meta"):
        for dtype in (torch.bfloat16, torch.float32):
            model = get_peft_model(
                MixtralForCausalLM(small("mixtral").config).to(dtype), KroneckerConfig(u_rank=2, v_rank=3)
            )
            model.base_model.model.set_experts_implementation("grouped_mm")
            if dtype is torch.bfloat16:
                assert count_flops(model, {"input_ids": ids.to("meta"), "labels": ids.to("meta")}).base_forward > 0
            else:
                with pytest.raises(ValueError, match=r"another dtype than bfloat16.*'batched_mm'"):
                    count_flops(model, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_is_counted(implementation: str) -> None:
    """Of a step that decides by values as well, on the weights themselves."""
    ids = tokens()
    model = get_peft_model(with_products(implementation), KroneckerConfig(u_rank=2, v_rank=3))
    found = count_memory(model, {"input_ids": ids, "labels": ids})
    by_parameter = LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    other = get_peft_model(with_products(implementation), by_parameter)
    whole = count_memory(other, {"input_ids": ids, "labels": ids})
    size = 2 * EXPERTS * 32 * 48 * 4  # what B A of all experts takes, which PEFT builds and keeps
    assert 0 < found.adapter_bytes < whole.adapter_bytes
    assert whole.adapter_bytes > size / 2


@pytest.mark.parametrize("sharing", SHARING)
def test_a_size_search_meets_a_dense_anchor(sharing: str) -> None:
    config = KroneckerConfig(expert_sharing=sharing, u_rank=2, v_rank=2)
    anchor = LoraConfig(r=16, target_modules=["o_proj"])
    base = with_products("eager")
    found = match_budget(base, config, anchor, match=["params"], tolerance_ratio=0.3)
    model = get_peft_model(base, found.config)
    assert count_parameters(model).trainable == found.measured["params"]
    assert found.is_met, str(found)


def test_pefts_lora_of_all_experts_is_an_anchor_for_parameters() -> None:
    """Its FLOPs are none of a token; as the config that is sized it is refused."""
    anchor = LoraConfig(r=2, target_modules=["o_proj"], target_parameters=["experts.down_proj"])
    trained = count_parameters(get_peft_model(with_products("eager"), copy.deepcopy(anchor))).trainable
    config = KroneckerConfig(expert_sharing="each", u_rank=2, v_rank=2)
    found = match_budget(with_products("eager"), config, anchor, match=["params"])
    assert found.anchor == {"params": trained}
    assert found.is_met, str(found)
    with pytest.raises(ValueError, match=r"`target_parameters`.*however few tokens.*match=\['params'\]"):
        match_budget(with_products("eager"), config, anchor)
    with pytest.raises(ValueError, match="`config` = LoraConfig with `target_parameters`"):
        match_budget(with_products("eager"), anchor, LoraConfig(r=2, target_modules=["o_proj"]), match=["params"])


def test_what_a_search_cannot_know_is_named() -> None:
    unknown = with_products("eager")
    unknown.config.__dict__["num_experts_per_tok"] = None
    with pytest.raises(ValueError, match="does not say how many experts a token reaches"):
        match_budget(unknown, KroneckerConfig(u_rank=2, v_rank=2), LoraConfig(r=2, target_modules=["o_proj"]))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("method", CONFIGS)
def test_active_parameters_are_those_of_the_experts_that_a_token_reaches(method: str, sharing: str) -> None:
    """Two of four; PT2 uses four of its eight ranks as well."""
    model = get_peft_model(with_products("eager"), CONFIGS[method](expert_sharing=sharing))
    expected = 0
    for name, parameter in model.named_parameters():
        if "bem_" not in name:
            continue
        size = parameter.numel()
        if parameter.shape[0] == EXPERTS and sharing != "shared" and parameter.dim() > 1:
            size = size // EXPERTS * 2
        if method == "rank_mask" and name.rpartition(".")[2] in ("A", "B"):
            size //= 2
        expected += size
    assert count_parameters(model).active == expected
