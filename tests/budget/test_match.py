"""The sizes that a match finds, against brute force."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import HiraConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bem_peft import (
    BudgetConstraints,
    BudgetValidator,
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    match_budget,
)
from bem_peft.budget.copies import adapted_copy
from bem_peft.budget.site_cost import TOKENS, ModelCost, _on_fake_tensors, _on_shapes
from tests.tiny_models import build

BOTH = ["o_proj", "down_proj"]


class Stack(nn.Module):
    """Projections of the given (in, out) shapes, without weights."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"site": nn.Linear(i, o, device="meta")}) for i, o in shapes)


def brute_force(model: nn.Module, config: object, anchor: LoraConfig, fields: list[str], limit: int) -> float:
    """The smallest largest deviation over every choice of the fields up to `limit`."""
    import dataclasses

    with torch.device("meta"):
        target = ModelCost(model, anchor)(anchor)
        cost = ModelCost(model, dataclasses.replace(config, **dict.fromkeys(fields, 1)))
        best = float("inf")
        for values in itertools.product(range(1, limit + 1), repeat=len(fields)):
            found = cost.try_sizes(dataclasses.replace(config, **dict(zip(fields, values, strict=True))))
            if found is not None:
                best = min(best, max(abs(found[q] / target[q] - 1) for q in target))
    return best


shapes = st.lists(
    st.tuples(st.sampled_from([12, 16, 24, 36]), st.sampled_from([8, 20, 32])), min_size=1, max_size=2, unique=True
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(shapes=shapes, rank=st.integers(1, 5), method=st.sampled_from(["kronecker", "film", "lora"]))
def test_no_choice_of_sizes_beats_the_match(shapes: list[tuple[int, int]], rank: int, method: str) -> None:
    config = {
        "kronecker": KroneckerConfig(target_modules=["site"], u_rank=1, v_rank=1),
        "film": ResidualFiLMConfig(target_modules=["site"]),
        "lora": LoraConfig(target_modules=["site"], use_dora=True),
    }[method]
    fields = {"kronecker": ["u_rank", "v_rank"], "film": ["gamma_dim", "beta_dim"], "lora": ["r"]}[method]
    limit = 40 if method == "lora" else 7  # a fine step along one size, a coarse one along two
    model, anchor = Stack(shapes), LoraConfig(r=6 * rank if method == "lora" else rank, target_modules=["site"])
    found = match_budget(model, config, anchor, free=fields, limit=limit)
    assert found.worst == pytest.approx(brute_force(model, config, anchor, fields, limit), rel=1e-12)


def test_each_method_matches_lora_on_a_model_and_the_validator_agrees() -> None:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, vocab_size=64
    )
    base = LlamaForCausalLM(config)
    cases = [
        (HeadGroupGatingConfig(), ["o_proj"]),
        (DynamicRankMaskConfig(), BOTH),
        (ResidualFiLMConfig(), BOTH),
        (LoraConfig(target_modules=BOTH, use_rslora=True), BOTH),
    ]
    for candidate, sites in cases:
        anchor = LoraConfig(r=16, target_modules=sites)
        match = match_budget(base, candidate, anchor, tolerance_ratio=0.11)
        assert match.is_met, str(match)
        budget = BudgetConstraints.from_anchor(base, anchor, tolerance_ratio=0.11)
        report = BudgetValidator(budget).validate_all(adapted_copy(base, match.config))
        assert report.is_met, str(report)
        for line in report.lines:
            assert line.deviation_ratio == pytest.approx(match.deviation_ratio[line.quantity], abs=1e-9)


def test_total_rank_takes_its_active_rank_along() -> None:
    anchor = LoraConfig(r=8, target_modules=BOTH)
    match = match_budget(build("llama"), DynamicRankMaskConfig(total_rank=16, active_rank=4), anchor)
    assert (match.config.total_rank, match.config.active_rank) == (8, 2)


def test_pt1_spreads_a_total_rank_over_its_groups() -> None:
    anchor = LoraConfig(r=5, target_modules=["o_proj"])
    match = match_budget(build("llama"), HeadGroupGatingConfig(), anchor, match=["params"])
    even = match_budget(build("llama"), HeadGroupGatingConfig(), anchor, free=["rank_per_group"], match=["params"])
    assert match.worst < even.worst
    model = adapted_copy(build("llama"), match.config)
    adapter = next(m for m in model.modules() if hasattr(m, "ranks"))
    assert sum(adapter.ranks) == match.sizes["total_rank"]
    assert max(adapter.ranks) - min(adapter.ranks) <= 1
    with pytest.raises(ValueError, match="`total_rank` = 3: must be at least 1 for each of the 4 groups"):
        adapted_copy(build("llama"), HeadGroupGatingConfig(total_rank=3))


def test_what_cannot_be_met_is_named() -> None:
    match = match_budget(
        build("llama"), LoKrConfig(target_modules=["down_proj"]), LoraConfig(r=8, target_modules=["down_proj"])
    )
    assert not match.is_met
    assert "meets params and flops: flops already lies above the anchor where params lies below" in str(match)


def test_choices_of_a_field_are_searched() -> None:
    match = match_budget(
        build("llama"),
        KroneckerConfig(),
        LoraConfig(r=2, target_modules=["down_proj"]),
        free={"u_dim": [6, 8, 12], "u_rank": None, "v_rank": None},
    )
    assert match.sizes["u_dim"] in (6, 8, 12)
    narrow = match_budget(
        build("llama"),
        KroneckerConfig(u_dim=8),
        LoraConfig(r=2, target_modules=["down_proj"]),
        free=["u_rank", "v_rank"],
    )
    assert match.worst <= narrow.worst


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"free": ["rank"]}, r"`free` = \['rank'\]: KroneckerConfig has no field"),
        ({"free": []}, r"`free` = \[\]"),
        ({"match": ["memory"]}, r"`match` = \['memory'\]"),
        ({"tolerance_ratio": 0}, "`tolerance_ratio` = 0"),
        ({"tolerance_ratio": "5%"}, "`tolerance_ratio` = '5%'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"free": ["u_rank"], **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        match_budget(build("llama"), KroneckerConfig(), LoraConfig(r=2, target_modules=["down_proj"]), **arguments)


def test_a_composite_is_matched_by_the_sizes_of_its_methods() -> None:
    composite = CompositeConfig([HeadGroupGatingConfig(), KroneckerConfig(u_rank=2, v_rank=2)])
    anchor = LoraConfig(r=4, target_modules=BOTH)
    match = match_budget(build("llama"), composite, anchor, free=["0.total_rank"], match=["params"])
    budget = BudgetConstraints.from_anchor(build("llama"), anchor, quantities=["params"])
    line = BudgetValidator(budget).validate_parameters(adapted_copy(build("llama"), match.config))
    assert line.deviation_ratio == pytest.approx(match.deviation_ratio["params"])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=BOTH, rank_pattern={r"layers\.0\.mlp\.down_proj": 7}),
        DynamicRankMaskConfig(total_rank=8, active_rank=4, rank_pattern={r"layers\.1\..*": 16}, sites=["mlp_down"]),
        KroneckerConfig(u_rank=4, v_rank=3, rank_pattern={r"layers\.0\..*": {"v_rank": 1}}),
        CompositeConfig([HeadGroupGatingConfig(rank_pattern={r"layers\.0\..*": 2}), ResidualFiLMConfig(mode="static")]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_module_with_sizes_of_its_own_costs_what_they_cost(config: LoraConfig) -> None:
    adapted = adapted_copy(build("llama"), config)
    with torch.device("meta"):
        found = ModelCost(build("llama"), config)(config)
    assert found["params"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


ON_SHAPES = {
    "lora": LoraConfig(r=3),
    "dora": LoraConfig(r=3, use_dora=True),
    "lokr": LoKrConfig(r=2),
    "loha": LoHaConfig(r=2),
    "hira": HiraConfig(r=2),
    "oft": OFTConfig(oft_block_size=4),
    "vera": VeraConfig(r=4),
    "head_gating": HeadGroupGatingConfig(num_groups=2, num_heads=4),
    "rank_mask": DynamicRankMaskConfig(total_rank=4, active_rank=2),
    "kronecker": KroneckerConfig(u_rank=2, v_rank=2),
    "film": ResidualFiLMConfig(gamma_dim=2, beta_dim=3),
}


@pytest.mark.parametrize("method", ON_SHAPES)
def test_a_site_counts_the_same_on_shapes_and_on_fake_tensors(method: str) -> None:
    config = copy.deepcopy(ON_SHAPES[method])
    config.target_modules = {"site"}
    with torch.device("meta"):
        model = get_peft_model(Stack([(16, 32)]), config)
    (layer,) = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    layer.eval()  # in training LoKr and LoHa draw whether the site is adapted at all
    found = _on_shapes(layer, 16)
    assert found == _on_fake_tensors(layer, 16) > 0


def test_what_reads_values_is_counted_on_fake_tensors() -> None:
    """LoKr in training draws whether the site is adapted at all: counted as in evaluation."""
    config = LoKrConfig(r=2, target_modules=["site"], module_dropout=0.5)
    with torch.device("meta"):
        model = Stack([(16, 32)])
        layer = get_peft_model(copy.deepcopy(model), config).train().base_model.model.layers[0]["site"]
        with pytest.raises(RuntimeError):
            _on_shapes(layer, 16)
        of_adapter = ModelCost(model, config)(config)["flops"]
        in_evaluation = _on_fake_tensors(layer.eval(), 16) / TOKENS
    assert 0 < of_adapter < in_evaluation  # with the base's products


def test_an_anchor_in_one_line_stands_at_the_sites_of_the_config() -> None:
    model = build("llama")
    config = ResidualFiLMConfig(gamma_dim=1, beta_dim=1)
    written = match_budget(model, config, "lora:r=8")
    whole = match_budget(model, config, LoraConfig(r=8, target_modules=BOTH))
    assert written.sizes == whole.sizes
    assert written.anchor == whole.anchor
    named = match_budget(model, config, "lora:r=8,target_modules=[o_proj]")
    assert named.anchor["params"] < written.anchor["params"]
    with pytest.raises(ValueError, match=r"lorra.*did you mean 'lora'"):
        match_budget(model, config, "lorra:r=8")
