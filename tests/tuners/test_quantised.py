"""A 4-bit base (bitsandbytes, on the CPU): called; read only to merge; counted as what it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from bem_peft import KroneckerConfig, count_parameters
from bem_peft.budget.copies import adapted_copy
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


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as bitsandbytes rounds it."""
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4"))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def laid_out_anew(model: Any) -> bool:
    """Call the model in evaluation, as on a CPU with AVX512-BF16; whether its weight is then laid out anew."""
    base = model.base_model.model.site.base_layer
    if not hasattr(base, "support_avx512bf16_for_cpu"):
        pytest.skip("a bitsandbytes that lays nothing out anew")
    base.support_avx512bf16_for_cpu = True
    model.eval()(torch.randn(5, IN))
    return bool(base.weight.quant_state.packing_format_for_cpu)


@pytest.mark.filterwarnings("ignore")
def test_merging_after_a_forward_that_lays_the_weight_out_anew() -> None:
    torch.manual_seed(1)
    model: Any = get_peft_model(Quantised(), KroneckerConfig(target_modules=["site"], init_method="random"))
    randomize(model)
    site = model.base_model.model.site
    merged = site.base_weight() + site.get_delta_weight("default")
    assert laid_out_anew(model)
    model.merge_adapter()
    assert distance(site.base_weight(), four_bits(merged)) < 0.05  # a few values fall to the next step
    assert laid_out_anew(model)
    model.unmerge_adapter()
    plain = four_bits(four_bits(merged) - site.get_delta_weight("default"))
    assert distance(site.base_weight(), plain) < 0.05


@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_not_turned_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = get_peft_model(Quantised(), KroneckerConfig(target_modules=["site"], init_method="random"))
    randomize(model)
    base = model.base_model.model.site.base_layer
    assert laid_out_anew(model)
    packed = base.weight.detach().clone()
    monkeypatch.setattr(type(base), "_save_to_state_dict", lambda *_: None)
    with pytest.raises(ValueError, match=r"does not turn that back.*merge before the first forward pass"):
        model.merge_adapter()
    assert torch.equal(base.weight, packed)
