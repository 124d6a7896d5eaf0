"""Spectral governance against numpy's full SVD of the composed update."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from bem_peft import DynamicRankMaskConfig, HeadGroupGatingConfig, KroneckerConfig, SpectralGovernance
from bem_peft.tuners.governance import LowRankAdapter, low_rank_adapters
from tests.contract.invariants import loss_of
from tests.contract.methods import adapter_parameters, randomize
from tests.tiny_models import build, tokens

CONFIGS = {
    "head_gating": lambda **k: HeadGroupGatingConfig(rank_per_group=[1, 2, 3, 2], **k),
    "rank_mask": lambda **k: DynamicRankMaskConfig(total_rank=8, active_rank=4, **k),
    "rank_mask_task": lambda **k: DynamicRankMaskConfig(mask_scope="task", value_gate=False, **k),
    "kronecker": lambda **k: KroneckerConfig(u_rank=3, v_rank=2, **k),
}
cases = pytest.mark.parametrize("method", CONFIGS)


def governed(method: str, **caps: Any) -> nn.Module:
    model = get_peft_model(build("llama"), CONFIGS[method](task_type="CAUSAL_LM", **caps))
    randomize(model)
    return model.train()


def composed(adapter: LowRankAdapter, method: str) -> np.ndarray:
    """The update (out, in) with every gate at its largest, multiplied out."""
    if method == "rank_mask":  # all ranks kept, every gate 2
        return adapter.scaling * 2 * adapter.B.detach().double().numpy() @ adapter.A.detach().double().numpy()
    a, b = (part.double().numpy() for part in adapter.lora_factors())  # type: ignore[operator]
    if method == "head_gating":
        a = a * 2
    return adapter.scaling * b @ a


@cases
def test_measured_norms_equal_the_full_svd(method: str) -> None:
    model = governed(method)
    norms = SpectralGovernance.measure(model)
    for (site, _, adapter), found in zip(low_rank_adapters(model), norms, strict=True):
        sigma = np.linalg.svd(composed(adapter, method), compute_uv=False)
        assert found.site == site
        np.testing.assert_allclose(found.max_singular_value, sigma[0], rtol=1e-6)
        np.testing.assert_allclose(found.frobenius, np.sqrt((sigma**2).sum()), rtol=1e-6)


@cases
def test_projection_clips_the_singular_values(method: str) -> None:
    model = governed(method)
    adapter = low_rank_adapters(model)[0][2]
    left, sigma, right = np.linalg.svd(composed(adapter, method), full_matrices=False)
    cap = float(sigma[1] + sigma[2]) / 2
    adapter.project(cap, None)
    nearest = left @ np.diag(np.minimum(sigma, cap)) @ right
    np.testing.assert_allclose(composed(adapter, method), nearest, atol=2e-5 * sigma[0])


@cases
@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW])
def test_caps_hold_after_every_step(method: str, optimizer_cls: Any) -> None:
    model = governed(method, max_singular_value=0.5, fro_budget=0.6)
    optimizer = optimizer_cls(adapter_parameters(model).values(), lr=0.3)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(model, "llama", tokens(seed=seed)).backward()
        optimizer.step()
        for _, _, adapter in low_rank_adapters(model):
            sigma = np.linalg.svd(composed(adapter, method), compute_uv=False)
            assert sigma[0] <= 0.5
            assert np.sqrt((sigma**2).sum()) <= 0.6


def test_below_the_caps_nothing_changes() -> None:
    model = governed("kronecker")
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    SpectralGovernance(max_singular_value=1e6, fro_budget=1e6).project(model)
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


def test_attached_governance_survives_a_deep_copy() -> None:
    model = governed("kronecker")
    SpectralGovernance(max_singular_value=0.2).attach(model)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(adapter_parameters(twin).values(), lr=0.1)
    loss_of(twin, "llama", tokens()).backward()
    optimizer.step()
    assert all(norms.max_singular_value <= 0.2 for norms in SpectralGovernance.measure(twin))
    assert any(norms.max_singular_value > 0.2 for norms in SpectralGovernance.measure(model)), "the twin's alone"
