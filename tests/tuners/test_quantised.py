"""A 4-bit base (bitsandbytes, on the CPU): called, never read; counted as what it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bem_peft import count_parameters
from bem_peft.budget.check import adapted_copy
from tests.contract.methods import CONFIGS, METHODS, randomize

IN, OUT = 64, 32


class Quantised(nn.Module):
    """One projection in NF4."""

    is_loaded_in_4bit = True

    def __init__(self) -> None:
        super().__init__()
        import bitsandbytes

        torch.manual_seed(0)
        self.site = bitsandbytes.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        self.site.load_state_dict({"weight": torch.randn(OUT, IN)})
        self.site.to("cpu")
        self.site(torch.zeros(1, IN))  # the first call may lay the weight out anew

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own on a machine without a GPU
@pytest.mark.parametrize("method", [m for m in METHODS if m != "composite"])
def test_a_four_bit_base_is_adapted_and_trained_and_counted(method: str) -> None:
    base = Quantised()
    x = torch.randn(5, IN)
    expected = base(x)
    model = adapted_copy(base, CONFIGS[method](target_modules=["site"]))
    assert torch.equal(model(x), expected)
    count = count_parameters(model)
    assert count.base == IN * OUT  # not the packed half
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = model.base_model.model.site.base_layer.weight.detach().clone()
    randomize(model)
    model.train()
    model(x).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)
    assert torch.equal(model.base_model.model.site.base_layer.weight, packed)
