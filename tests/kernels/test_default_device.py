"""A default device that is not the model's, as a size search and users of `torch.device(...)` set, changes nothing."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from bem_peft import match_budget, use_kernels
from bem_peft.budget.site_cost import ModelCost
from tests.contract.methods import CONFIGS, METHODS, adapted
from tests.kernels.test_cpp_operators import pytestmark, torch_form_after
from tests.tiny_models import build, tokens

__all__ = ["pytestmark", "torch_form_after"]


@pytest.mark.parametrize("method", METHODS)
def test_a_size_search_counts_the_same_with_the_cpp_forms(method: str) -> None:
    """The search runs under the meta device; it once took PT4's update for less than nothing."""
    base, config = build("llama"), CONFIGS[method]()
    found = {}
    for form in ("torch", "cpp"):
        use_kernels(form)
        with torch.device("meta"):
            ModelCost(base, LoraConfig(target_modules=["o_proj"]))(LoraConfig(target_modules=["o_proj"]))
            found[form] = ModelCost(base, config)(config)
        found[f"{form} matched"] = match_budget(base, config, LoraConfig(r=4, target_modules=["o_proj", "down_proj"]))
    assert found["cpp"]["params"] == found["torch"]["params"]
    assert found["cpp"] == found["torch"], "the formula's FLOPs, though PT3's operator projects x once more"
    assert str(found["cpp matched"]) == str(found["torch matched"])


@pytest.mark.parametrize("form", ["torch", "cpp"])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_under_another_default_device(method: str, form: str) -> None:
    """Meta stands for a GPU: a tensor that forgets its device ends there, with an error or a wrong gradient."""
    use_kernels(form)
    gradients = []
    for device in ("cpu", "meta"):
        model = adapted(method, "llama")
        model.train()
        batch = tokens()
        torch.manual_seed(0)
        with torch.device(device):
            model(input_ids=batch, labels=batch).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
