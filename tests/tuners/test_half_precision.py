"""Numbers that float16 can hold are right in float16, however large what is summed on the way to them is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bem_peft import DynamicRankMaskConfig, HeadGroupGatingConfig, KroneckerConfig, ResidualFiLMConfig
from bem_peft.kernels.film import token_rms
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.calls.attention_stats import attention_rows, head_output_statistics
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.calls.penalty import diversity, orthogonality
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskAdapter
from bem_peft.tuners.pt3_kronecker import KroneckerAdapter
from bem_peft.tuners.pt4_film import ResidualFiLMAdapter

HALF = [torch.float16, torch.bfloat16]
HEADS, WIDTH, OUT = 4, 256, 4096


def massive(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens with a few channels near float16's largest number, as large models have them."""
    values = torch.randn(rows, width) * 30.0
    values[:, ::67] = 6e4 * torch.sign(torch.randn(rows, len(range(0, width, 67))))
    return values.to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("width", "value"), [(4096, 1100.0), (16384, 520.0), (64, 6e4), (7, 1e-7)])
def test_the_rms_of_a_token(width: int, value: float, dtype: torch.dtype) -> None:
    for y in (torch.full((1, width), value).to(dtype), massive(3, width, dtype)):
        y = y.requires_grad_()
        rms = token_rms(y)
        rms.sum().backward()
        wide = y.detach().double().numpy()
        expected = np.sqrt((wide**2).mean(1, keepdims=True))
        assert rms.dtype is dtype
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(rms.detach().double().numpy(), expected, rtol=eps, atol=1e-7)
        if value > 1e-3:
            assert y.grad is not None
            np.testing.assert_allclose(y.grad.double().numpy(), wide / width / expected, rtol=2 * eps, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("value", [600.0, 6000.0, 6e4, None])
def test_head_statistics_and_their_gradient(value: float | None, dtype: torch.dtype) -> None:
    """Sums and norms of a head are beyond float16: 600 x 128 = 76800."""
    x = massive(5, HEADS * 128, dtype) if value is None else torch.full((1, HEADS * 128), value).to(dtype)
    exact, x = x.double().requires_grad_(), x.requires_grad_()
    weight = torch.randn(2 * HEADS)
    found, expected = head_output_statistics(x, HEADS), head_output_statistics(exact, HEADS)
    heads = exact.detach().numpy().reshape(len(exact), HEADS, -1)
    square = (heads**2).sum(2)
    energy, evenness = np.log(square / square.sum(1, keepdims=True)), heads.sum(2) ** 2 / square
    np.testing.assert_allclose(found.detach().numpy(), np.concatenate((energy, evenness), 1), rtol=1e-5, atol=1e-5)
    (found @ weight).sum().backward()
    (expected @ weight).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert torch.isfinite(x.grad).all()
    if value is None:  # else it is 0 but for rounding
        atol = 0.01 * float(exact.grad.abs().max())
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0.01, atol=atol)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_exact_attention_statistics_of_large_scores(dtype: torch.dtype) -> None:
    query, key = (torch.randn(1, 2, 6, 32).mul(60.0).to(dtype) for _ in range(2))  # products to 1e5, norms to 3e5
    found = attention_rows(query, key, None, 1e-3, True)
    scores = (query.double() @ key.double().transpose(2, 3) * 1e-3).masked_fill(
        ~torch.ones(6, 6).tril().bool(), -np.inf
    )
    p = scores.softmax(-1).numpy()
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    np.testing.assert_allclose(found.entropy.numpy(), entropy.transpose(0, 2, 1), atol=1e-4)
    assert torch.isfinite(found.features()).all()


CONFIGS: dict[str, tuple[Any, Any]] = {
    "PT1": (HeadGroupGatingAdapter, HeadGroupGatingConfig(num_heads=HEADS)),
    "PT2": (DynamicRankMaskAdapter, DynamicRankMaskConfig()),
    "PT3": (KroneckerAdapter, KroneckerConfig(u_rank=4, v_rank=3, init_method="orthogonal")),
    "PT4": (ResidualFiLMAdapter, ResidualFiLMConfig()),
    "PT4 spatial": (ResidualFiLMAdapter, ResidualFiLMConfig(mode="spatial")),
    "PT4 static": (ResidualFiLMAdapter, ResidualFiLMConfig(mode="static")),
}


def made(name: str) -> Adapter:
    cls, config = CONFIGS[name]
    site = SiteShape("s", WIDTH, OUT, HEADS)
    adapter: Adapter = cls(config, site, CallState())
    adapter.reset_parameters(False, site)
    with torch.no_grad():
        for parameter_name, parameter in adapter.named_parameters():
            if parameter_name == "B":
                parameter.mul_(1e-2)
            if parameter_name == "A":
                parameter.mul_(3.0)  # z is beyond float16, B z is not
    return adapter


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_prefill_decoding_and_float64_agree_on_massive_activations(name: str, training: bool) -> None:
    adapter = made(name).train(training)
    x, y = massive(16, WIDTH, torch.float16), (torch.randn(16, OUT) * 1100.0).half()
    with torch.enable_grad() if training else torch.no_grad():
        many = adapter(x, y).detach()
    with torch.no_grad():
        few = torch.cat([adapter.eval()(x[i : i + 1], y[i : i + 1]) for i in range(16)])
        control = 2 if name == "PT1" else 9  # what reads the statistics stays float32
        weights = tuple(w.double() if i < control else w for i, w in enumerate(adapter.derive(torch.float16)))
        exact = adapter.transform(x.double(), y.double(), *weights)
    assert float(exact.abs().max()) < 65504.0
    step = float(exact.abs().max()) * torch.finfo(torch.float16).eps
    torch.testing.assert_close(many.double(), exact, rtol=2e-3, atol=step)
    torch.testing.assert_close(few.double(), exact, rtol=2e-3, atol=step)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf"), 5e4, 0.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["PT4", "PT4 spatial", "PT4 static"])
def test_the_brake_sees_what_is_not_finite_in_half_precision(name: str, dtype: torch.dtype, value: float) -> None:
    """The threshold, 1e6, is itself infinite in float16."""
    adapter: Any = made(name).train()
    x, y = torch.randn(3, WIDTH).to(dtype), torch.randn(3, OUT).to(dtype)
    y[1, 5] = value
    adapter(x, y).float().sum().backward()
    assert bool(adapter.is_unstable) == (not np.isfinite(value))


def test_the_brake_sees_a_number_that_float16_does_not_hold() -> None:
    adapter: Any = made("PT4").train()
    with torch.no_grad():
        adapter.gamma.fill_(1e3)
        adapter.controller_bias.fill_(10.0)
    out = adapter(torch.zeros(1, WIDTH).half(), torch.full((1, OUT), 65000.0).half())
    assert torch.isinf(out).any()
    out.float().sum().backward()
    assert bool(adapter.is_unstable)


def test_penalties_of_half_precision_factors_are_float32s() -> None:
    factor = torch.full((3, 4096), 30.0, dtype=torch.float16)  # |row|^2 is beyond float16
    assert float(orthogonality(factor)) == pytest.approx((6 * 3686400.0**2 + 3 * 3686399.0**2) / 9, rel=1e-5)
    assert float(diversity(factor)) == pytest.approx(1.0, rel=1e-5)
