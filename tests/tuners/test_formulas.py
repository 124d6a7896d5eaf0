"""Each method's formula, written out in numpy and float64 from the SPEC, against the adapter in the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag, hadamard
from torch import nn

from bem_peft import DynamicRankMaskConfig, HeadGroupGatingConfig, KroneckerConfig, ResidualFiLMConfig
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.head_groups import resolve_groups
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskAdapter
from bem_peft.tuners.pt3_kronecker import KroneckerAdapter, factor_pairs, higher_order_svd, resolve_dims
from bem_peft.tuners.pt4_film import ResidualFiLMAdapter

IN, OUT, TOKENS = 24, 10, 17


def make(cls: type[Adapter], config: Any, **site: Any) -> Any:
    shape = SiteShape("site", IN, OUT, **site)
    adapter = cls(config, shape, CallState())
    adapter.reset_parameters(True, shape)
    adapter = adapter.double().eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return adapter


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, TOKENS, IN, dtype=torch.float64), torch.randn(1, TOKENS, OUT, dtype=torch.float64)


def numbers(adapter: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in adapter.named_parameters()}


def check(adapter: Adapter, x: torch.Tensor, y: torch.Tensor, expected: np.ndarray) -> None:
    with torch.no_grad():
        found = adapter(x, y)[0].numpy()
    # gates and logits are float32 by contract
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("ranks", "groups"), [(3, 2), ([1, 3, 2], 3), (2, 6)])
def test_head_group_gating_formula(ranks: Any, groups: int) -> None:
    config = HeadGroupGatingConfig(num_groups=groups, rank_per_group=ranks, gate_temperature=1.5, scaling=1.3)
    adapter, (x, y) = make(HeadGroupGatingAdapter, config, num_heads=6), data()
    p, width = numbers(adapter), IN // groups
    sizes = ranks if isinstance(ranks, list) else [ranks] * groups
    expected = y[0].numpy().copy()
    for t, token in enumerate(x[0].numpy()):
        heads = token.reshape(6, -1)
        square = (heads**2).sum(1)
        features = np.concatenate((np.log(square / square.sum()), heads.sum(1) ** 2 / square))
        gate = 2 / (1 + np.exp(-(p["gate_weight"] @ features + p["gate_bias"]) / 1.5))
        start = 0
        for g, rank in enumerate(sizes):
            a, b = p["A"][start : start + rank], p["B"][:, start : start + rank]
            expected[t] += 1.3 * gate[g] * b @ a @ token[g * width : (g + 1) * width]
            start += rank
    check(adapter, x, y, expected)


def test_gates_are_one_at_the_start() -> None:
    adapter = HeadGroupGatingAdapter(HeadGroupGatingConfig(), SiteShape("s", IN, OUT, num_heads=4), CallState())
    adapter.reset_parameters(True, SiteShape("s", IN, OUT))
    gates = adapter.gates(adapter.statistics(torch.randn(5, IN)))
    assert torch.equal(gates, torch.ones(5, 4))


@pytest.mark.parametrize(("heads", "wanted", "found"), [(9, 4, 3), (12, 4, 4), (15, 4, 3), (10, 4, 5), (7, 4, 1)])
def test_groups_are_the_nearest_divisor(heads: int, wanted: int, found: int) -> None:
    assert resolve_groups(heads, wanted, False, "site") == found


@pytest.mark.parametrize(("blocks", "is_mirrored"), [(1, False), (1, True), (4, False), (8, False)])  # as on a GPU
@pytest.mark.parametrize("value_gate", [False, True])
@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("scope", ["token", "task"])
def test_rank_mask_formula(
    value_gate: bool, use_hadamard: bool, scope: str, blocks: int, is_mirrored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored = lambda self, a: is_mirrored and not torch.is_grad_enabled()  # noqa: E731
    monkeypatch.setattr(DynamicRankMaskAdapter, "is_mirrored", mirrored)
    config = DynamicRankMaskConfig(
        total_rank=8,
        active_rank=3,
        value_gate=value_gate,
        use_hadamard_path=use_hadamard,
        mask_scope=scope,
        num_blocks=blocks,
        scaling=0.9,
    )
    adapter, (x, y) = make(DynamicRankMaskAdapter, config), data()
    p = numbers(adapter)
    h = hadamard(8) / np.sqrt(8) if use_hadamard else np.eye(8)
    a = block_diag(*np.split(p["A"], blocks))
    assert a.shape == (8, IN)
    expected = y[0].numpy().copy()
    for t, token in enumerate(x[0].numpy()):
        z = h @ (a @ token)
        unit = z / np.sqrt((z**2).mean())
        logits = p["mask_weight"] if scope == "task" else p["mask_weight"] @ unit
        mask = np.zeros(8)
        mask[np.argsort(-logits, kind="stable")[:3]] = 1
        gate = 1 + np.tanh(p["C"] @ unit) if value_gate else 1.0
        expected[t] += 0.9 * p["B"] @ (h @ (mask * gate * z))
    check(adapter, x, y, expected)
    x_scaled, _ = x * 37.0, None
    assert torch.equal(adapter.gate_values(x[0]) > 0, adapter.gate_values(x_scaled[0]) > 0)
    assert (adapter.gate_values(x[0]) != 0).sum(1).eq(3).all()


def test_kronecker_formula_and_merge() -> None:
    adapter, (x, y) = make(KroneckerAdapter, KroneckerConfig(u_rank=3, v_rank=2, u_dim=4, v_dim=6, scaling=1.7)), data()
    p = numbers(adapter)
    delta = 1.7 * p["B"] @ np.kron(p["U"], p["V"])
    check(adapter, x, y, y[0].numpy() + x[0].numpy() @ delta.T)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    merged, bias = adapter.merge_into(weight, None)
    assert bias is None
    np.testing.assert_allclose(merged.numpy(), weight.numpy() + delta, atol=1e-12)
    a, b = adapter.lora_factors()
    np.testing.assert_allclose((b @ a).numpy() * 1.7, delta, atol=1e-12)


def test_default_factorisation_is_the_most_balanced() -> None:
    for width in (1, 7, 48, 1536, 11008):
        u, v = resolve_dims(width, None, None, "site")
        assert u * v == width
        assert all(abs(u - v) <= abs(a - b) for a, b in factor_pairs(width))
    with pytest.raises(ValueError, match=r"u_dim.*= 5.*8x6, 12x4"):
        resolve_dims(48, 5, 7, "site")


def test_higher_order_svd_spans_the_leading_singular_vectors_of_the_unfoldings() -> None:
    weight = torch.randn(9, 4 * 6)
    u, v = higher_order_svd(weight, torch.Size((2, 4)), torch.Size((3, 6)))
    cube = weight.double().numpy().reshape(9, 4, 6)
    for rows, axis in ((u.numpy(), 1), (v.numpy(), 2)):
        left = np.linalg.svd(np.moveaxis(cube, axis, 0).reshape(cube.shape[axis], -1))[0][:, : len(rows)]
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-6)
        np.testing.assert_allclose(np.linalg.svd(rows @ left)[1], 1.0, atol=1e-5)  # the same subspace
    again = higher_order_svd(weight, torch.Size((2, 4)), torch.Size((3, 6)))
    assert torch.equal(u, again[0])
    assert torch.equal(v, again[1])


@pytest.mark.parametrize("controller_unit", ["rms", "absolute"])
@pytest.mark.parametrize("unit", ["rms", "absolute"])
@pytest.mark.parametrize("mode", ["channel", "spatial", "static"])
def test_film_formula(mode: str, unit: str, controller_unit: str) -> None:
    sizes = {} if mode == "static" else {"gamma_dim": 3, "beta_dim": 2, "controller_unit": controller_unit}
    config = ResidualFiLMConfig(mode=mode, beta_unit=unit, max_beta=0.8, scaling=1.1, inference_mode=True, **sizes)
    adapter, (x, y) = make(ResidualFiLMAdapter, config), data()  # a file's, whose scaling is its own
    p = numbers(adapter)

    def bounded(w: np.ndarray, bound: float) -> np.ndarray:
        return bound * 1.1 * w / (1 + 1.1 * np.abs(w).sum(1, keepdims=True))

    expected = np.empty((TOKENS, OUT))
    for t, (token, out) in enumerate(zip(x[0].numpy(), y[0].numpy(), strict=True)):
        root = np.sqrt((out**2).mean())
        read = token / root if controller_unit == "rms" else token
        c = np.ones(3) if mode == "static" else np.tanh(p["controller_weight"] @ read + p["controller_bias"])
        gamma = bounded(p["gamma"], 0.1) @ c[: p["gamma"].shape[1]]
        beta = bounded(p["beta"], 0.8) @ c[: p["beta"].shape[1]]
        rho = root if unit == "rms" else 1.0
        expected[t] = out * (1 + gamma) + beta * rho
    check(adapter, x, y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("weight", [1.0, 1e4, 1e30])
def test_film_keeps_its_bounds_for_extreme_weights_and_inputs(weight: float, size: float, dtype: torch.dtype) -> None:
    config = ResidualFiLMConfig(gamma_dim=5, beta_dim=5)
    adapter = ResidualFiLMAdapter(config, SiteShape("s", IN, OUT), CallState())
    adapter.reset_parameters(True, SiteShape("s", IN, OUT))
    adapter.eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * weight)
        x = torch.randn(64, IN).mul(size).to(dtype)
        adapter.controller_weight.clamp_(-1e4, 1e4)
        adapter.controller_bias.clamp_(-1e4, 1e4)
        y = torch.randn(64, OUT).mul(min(size, 1e3)).to(dtype)
        gamma, beta = adapter.modulation(x, y)
        assert torch.isfinite(gamma).all()
        assert float(gamma.double().abs().max()) <= 0.1
        assert float(beta.double().abs().max()) <= 1.0
        change = (adapter(x, y).double() - y.double()).abs()
        rms = y.double().square().mean(1, keepdim=True).sqrt()
        rounding = 4 * torch.finfo(dtype).eps * (y.double().abs() + rms)
        assert (change <= 0.1 * y.double().abs() + 1.0 * rms + rounding).all()


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_finite_differences(training: bool) -> None:
    for cls, config, heads in (
        (KroneckerAdapter, KroneckerConfig(u_rank=2, v_rank=2), None),
        (ResidualFiLMAdapter, ResidualFiLMConfig(gamma_dim=2, beta_dim=2, emergency_stabilization=False), None),
    ):
        adapter = make(cls, config, num_heads=heads).train(training)
        parameters = list(adapter.parameters())
        x, y = data()

        def run(*values: torch.Tensor, adapter: Any = adapter, x: Any = x, y: Any = y) -> torch.Tensor:
            names = [name for name, _ in adapter.named_parameters()]
            return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x, y))

        if cls is ResidualFiLMAdapter:  # its bounds are computed in float32
            outputs = run(*parameters)
            gradients = torch.autograd.grad(outputs.square().mean(), parameters)
            assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)
        else:
            assert torch.autograd.gradcheck(run, parameters)
