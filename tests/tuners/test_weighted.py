"""Weighted sums of adapters: exact where the maths allows it, one error where it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
)
from bem_peft.tuners.base.layer import AdapterLayer
from tests.contract.methods import randomize
from tests.tiny_models import build, tokens

WEIGHTS = {"law": 0.7, "art": -1.3}
TASK = {"mask_scope": "task", "value_gate": False}
# the configs of law and art: of other sizes, scales and sites
PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "kronecker": lambda: (
        KroneckerConfig(u_rank=3, v_rank=2, rank_pattern={"layers.0.mlp.down_proj": {"u_rank": 1}}),
        KroneckerConfig(u_rank=2, v_rank=1, scaling=0.5),
    ),
    "kronecker, more rows than the width": lambda: (
        KroneckerConfig(u_rank=6, v_rank=5),
        KroneckerConfig(u_rank=7, v_rank=3, layers_to_transform=[1]),
    ),
    "rank_mask": lambda: (
        DynamicRankMaskConfig(total_rank=8, active_rank=3, **TASK),
        DynamicRankMaskConfig(
            total_rank=6, active_rank=2, use_hadamard_path=False, scaling=1.0, sites=["mlp_down"], **TASK
        ),
    ),
    "rank_mask, k = R": lambda: (
        DynamicRankMaskConfig(total_rank=4, active_rank=4, value_gate=False),
        DynamicRankMaskConfig(total_rank=8, active_rank=5, num_blocks=4, **TASK),
    ),
    "film": lambda: (
        ResidualFiLMConfig(mode="static"),
        ResidualFiLMConfig(mode="static", clamp_range=0.3, max_beta=0.0, layers_to_transform=[0]),
    ),
    "film absolute": lambda: (
        ResidualFiLMConfig(mode="static", beta_unit="absolute"),
        ResidualFiLMConfig(mode="static", beta_unit="absolute", clamp_range=0.0, max_beta=2.0),
    ),
    "composite": lambda: (
        CompositeConfig(
            [DynamicRankMaskConfig(total_rank=4, active_rank=2, **TASK), KroneckerConfig(u_rank=2, v_rank=2)]
        ),
        CompositeConfig(
            [
                KroneckerConfig(u_rank=3, v_rank=1),
                ResidualFiLMConfig(mode="static", max_beta=0.0, sites=["attention_output"], layers_to_transform=[0]),
            ],
            exclude_modules=["o_proj"],
        ),
    ),
}


def two(pair: tuple[Any, Any], architecture: str = "llama") -> Any:
    model = get_peft_model(build(architecture, torch.float64), pair[0], adapter_name="law")
    model.add_adapter("art", pair[1])
    randomize(model)
    return model.eval()


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


@torch.no_grad()
def update(layer: Any, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = y
    for adapter in layer.adapters_named(name):
        out = adapter(x, out)
    return out - y


@pytest.mark.parametrize("pair", [name for name in PAIRS if name != "composite"])
def test_a_weighted_adapter_is_the_weighted_sum_at_every_site(pair: str, tmp_path: Path) -> None:
    model = two(PAIRS[pair]())
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    seen = 0
    for layer in layers(model).values():
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        y = torch.randn(5, layer.out_features, dtype=torch.float64)
        expected = sum(weight * update(layer, name, x, y) for name, weight in WEIGHTS.items())
        torch.testing.assert_close(update(layer, "sum", x, y), expected, rtol=1e-6, atol=1e-6)
        seen += float(expected.abs().max()) > 0.01
    assert seen == len(layers(model))
    assert model.active_adapter == "law"
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    model.set_adapter("sum")
    expected = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(build("llama", torch.float64), tmp_path / "sum", autocast_adapter_dtype=False)
    assert torch.equal(again.eval()(input_ids=tokens()).logits, expected)


def test_the_sum_of_linear_adapters_is_the_sum_of_their_weights() -> None:
    model = two(PAIRS["kronecker"]())
    model.add_weighted_adapter(["law", "art"], [0.7, -1.3], "sum")
    model.set_adapter("sum")
    found = model(input_ids=tokens()).logits
    for name, layer in layers(model).items():
        whole = {own: layer.get_delta_weight(own).numpy() for own in ("law", "art")}
        for own, delta in whole.items():
            adapter = next(layer.adapters_named(own))
            u, v, b = (p.detach().numpy() for p in (adapter.U, adapter.V, adapter.B))
            np.testing.assert_allclose(delta, adapter.scaling * b @ np.kron(u, v), atol=1e-12, err_msg=name)
        layer.get_base_layer().weight.data += torch.from_numpy(0.7 * whole["law"] - 1.3 * whole["art"])
    with model.disable_adapter():
        torch.testing.assert_close(found, model(input_ids=tokens()).logits)


def test_a_composite_whose_methods_are_on_sites_of_their_own() -> None:
    first, _ = PAIRS["composite"]()
    second = CompositeConfig([KroneckerConfig(u_rank=3, v_rank=1)])
    model = two((first, second))
    model.add_weighted_adapter(["law", "art"], [0.5, 2.0], "sum")
    for layer in layers(model).values():
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        y = torch.randn(5, layer.out_features, dtype=torch.float64)
        expected = 0.5 * update(layer, "law", x, y) + 2.0 * update(layer, "art", x, y)
        torch.testing.assert_close(update(layer, "sum", x, y), expected)


REFUSED: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "gates": (lambda: (HeadGroupGatingConfig(), HeadGroupGatingConfig()), r"depends on the token.*export_lora"),
    "masks": (lambda: (DynamicRankMaskConfig(), DynamicRankMaskConfig()), r"depends on the token.*export_lora"),
    "film": (lambda: (ResidualFiLMConfig(), ResidualFiLMConfig()), r"depends on the token"),
    "folds": (
        lambda: (KroneckerConfig(u_rank=2, v_rank=2), KroneckerConfig(u_rank=2, v_rank=2, u_dim=4)),
        r"folds its input.*u_dim",
    ),
    "units": (
        lambda: (ResidualFiLMConfig(mode="static"), ResidualFiLMConfig(mode="static", beta_unit="absolute")),
        r"beta_unit",
    ),
    "bound": (lambda: (ResidualFiLMConfig(mode="static", clamp_range=0.9),) * 2, r"clamp_range"),
    "both at one site": (
        lambda: (
            CompositeConfig([KroneckerConfig(u_rank=2, v_rank=2), ResidualFiLMConfig(mode="static")]),
            CompositeConfig([KroneckerConfig(u_rank=2, v_rank=2)]),
        ),
        r"multiplies what another method adds",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_sum_is_refused_in_one_error(case: str) -> None:
    pair, match = REFUSED[case]
    model = two(pair())
    before = model(input_ids=tokens()).logits
    with pytest.raises(ValueError, match=match) as caught:
        model.add_weighted_adapter(["law", "art"], [1.0, 1.0], "sum")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert set(model.peft_config) == {"law", "art"}
    assert torch.equal(model(input_ids=tokens()).logits, before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"adapters": ["law", "c"]}, r"`adapters` = \['law', 'c'\]"),
        ({"adapters": ["law", "law"]}, "different names"),
        ({"weights": [1.0]}, "one finite number for each"),
        ({"weights": [1.0, float("nan")]}, "one finite number for each"),
        ({"adapter_name": "art"}, "there is one"),
        ({"combination_type": "svd"}, r"export_lora.*PEFT's `add_weighted_adapter`"),
        ({"combination_type": "cat", "density": 0.2}, "not 'density'"),
        ({"adapter_name": "half"}, "torch's modules have a method of that name"),
        ({"adapter_name": "B"}, "a parameter or a module of the model is called so"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(changes: dict[str, Any], match: str) -> None:
    model = two(PAIRS["kronecker"]())
    given = {"adapters": ["law", "art"], "weights": [1.0, 1.0], "adapter_name": "sum", **changes}
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(**given)
    assert set(model.peft_config) == {"law", "art"}


def test_modules_that_are_saved_whole_are_not_added_up() -> None:
    model = two((KroneckerConfig(u_rank=2, v_rank=2, modules_to_save=["lm_head"]), KroneckerConfig(u_rank=2, v_rank=2)))
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["law", "art"], [1.0, 1.0], "sum")


def test_an_adapter_of_another_size_of_its_own() -> None:
    """What PEFT's `rescale_adapter_scale`, which knows LoRA alone and says so, is for."""
    model = two(PAIRS["kronecker"]())
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 0.5),
    ):
        pass
    model.add_weighted_adapter(["law"], [0.5], "lesser")
    layer = next(iter(layers(model).values()))
    torch.testing.assert_close(layer.get_delta_weight("lesser"), 0.5 * layer.get_delta_weight("law"))
