"""Spectral governance against numpy's full SVD of the composed update."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from bem_peft import DynamicRankMaskConfig, HeadGroupGatingConfig, KroneckerConfig, SpectralGovernance
from bem_peft.tuners.base.low_rank import LowRankAdapter
from bem_peft.tuners.governance import low_rank_adapters
from tests.contract.invariants import loss_of
from tests.contract.methods import adapter_parameters, randomize
from tests.tiny_models import build, tokens
from tests.training.equalities import collate, rows

CONFIGS = {
    "head_gating": lambda **k: HeadGroupGatingConfig(rank_per_group=[1, 2, 3, 2], **k),
    "rank_mask": lambda **k: DynamicRankMaskConfig(total_rank=8, active_rank=4, **k),
    "rank_mask_task": lambda **k: DynamicRankMaskConfig(mask_scope="task", value_gate=False, **k),
    "kronecker": lambda **k: KroneckerConfig(u_rank=3, v_rank=2, **k),
    "rank_mask_plain": lambda **k: DynamicRankMaskConfig(
        total_rank=8, active_rank=3, value_gate=False, use_hadamard_path=False, **k
    ),
    "rank_mask_blocks": lambda **k: DynamicRankMaskConfig(total_rank=8, active_rank=4, num_blocks=4, **k),
    "rank_mask_task_gated": lambda **k: DynamicRankMaskConfig(total_rank=8, active_rank=4, mask_scope="task", **k),
    "rank_mask_all_kept": lambda **k: DynamicRankMaskConfig(total_rank=8, active_rank=8, **k),
}
MASKED = ("rank_mask", "rank_mask_plain", "rank_mask_blocks", "rank_mask_task_gated", "rank_mask_all_kept")
cases = pytest.mark.parametrize("method", CONFIGS)


def governed(method: str, **caps: Any) -> nn.Module:
    model = get_peft_model(build("llama"), CONFIGS[method](task_type="CAUSAL_LM", **caps))
    randomize(model)
    return model.train()


def masked_factors(adapter: Any) -> tuple[np.ndarray, np.ndarray]:
    """s B (out, R) and A (R, in) in the basis of the masks, by scipy's Hadamard matrix."""
    a, b = adapter.A.detach().double().numpy(), adapter.scaling * adapter.B.detach().double().numpy()
    a = scipy.linalg.block_diag(*np.split(a, adapter.num_blocks))
    if adapter.hadamard:
        h = scipy.linalg.hadamard(len(a)) / np.sqrt(len(a))
        a, b = h @ a, b @ h
    return a, b


def over_masks(adapter: Any) -> tuple[float, float]:
    """The largest sigma_1 and Frobenius norm over all masks, with each gate at 0 or 2: the norms are convex."""
    a, b = masked_factors(adapter)
    ranks = range(len(a))
    if adapter.is_task_mask:
        ranks = np.argsort(-adapter.mask_weight.detach().numpy(), kind="stable")[: adapter.active_rank]
    largest = 2.0 if adapter.has_value_gate else 1.0
    sizes = range(1, adapter.active_rank + 1) if adapter.has_value_gate else [adapter.active_rank]
    chosen = [list(c) for size in sizes for c in itertools.combinations(ranks, size)]
    updates = [largest * b[:, c] @ a[c] for c in chosen]
    return max(np.linalg.norm(u, 2) for u in updates), max(np.linalg.norm(u) for u in updates)


def norms_of(adapter: Any, method: str) -> tuple[float, float]:
    if method in MASKED:
        return over_masks(adapter)
    sigma = np.linalg.svd(composed(adapter, method), compute_uv=False)
    return float(sigma[0]), float(np.sqrt((sigma**2).sum()))


def composed(adapter: LowRankAdapter, method: str) -> np.ndarray:
    """The update (out, in) with every gate at its largest, multiplied out."""
    a, b = (part.double().numpy() for part in adapter.lora_factors())  # type: ignore[operator]
    if method == "head_gating":
        a = a * 2
    return adapter.scaling * b @ a


@cases
def test_measured_norms_equal_the_full_svd(method: str) -> None:
    model = governed(method)
    norms = SpectralGovernance.measure(model)
    for (site, _, adapter), found in zip(low_rank_adapters(model), norms, strict=True):
        sigma, norm = norms_of(adapter, method)
        assert found.site == site
        assert not found.is_bound
        np.testing.assert_allclose(found.max_singular_value, sigma, rtol=1e-6)
        np.testing.assert_allclose(found.frobenius, norm, rtol=1e-6)
        np.testing.assert_allclose(adapter.norms()[0], sigma, rtol=1e-6)


@pytest.mark.parametrize("method", [name for name in CONFIGS if name not in MASKED])
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
            sigma, norm = norms_of(adapter, method)
            assert 0.01 < sigma <= 0.5
            assert norm <= 0.6


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


# -- masks


def lone(method: str, width: int = 48, out: int = 32, **fields: Any) -> tuple[nn.Module, Any]:
    """One projection with an adapter away from its start."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj = nn.Linear(width, out, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o_proj(x)

    config = {"rank_mask": DynamicRankMaskConfig, "kronecker": KroneckerConfig, "head_gating": HeadGroupGatingConfig}
    model = get_peft_model(Net(), config[method](target_modules=["o_proj"], init_weights=False, **fields))
    return model, low_rank_adapters(model)[0][2]


def test_a_mask_cannot_undo_what_cancels() -> None:
    """Two ranks whose updates cancel: together 0, each alone thousands."""
    model, adapter = lone(
        "rank_mask", total_rank=2, active_rank=1, value_gate=False, use_hadamard_path=False, max_singular_value=1.0
    )
    with torch.no_grad():
        adapter.A.fill_(1.0)
        adapter.B.copy_(torch.tensor([[100.0, -100.0]]).expand(32, 2))
    assert np.linalg.norm(adapter.B.detach().numpy() @ adapter.A.detach().numpy()) == 0.0
    assert over_masks(adapter)[0] > 1000.0
    adapter.project(1.0, None)
    assert 0.9 < over_masks(adapter)[0] <= 1.0
    x = torch.randn(16, 48)
    with torch.no_grad():
        moved = (model.eval()(x) - model.base_model.model.o_proj.base_layer(x)).norm(dim=1) / x.norm(dim=1)
    assert float(moved.max()) <= 1.0


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("rank", "active"), [(16, 4), (16, 8), (16, 16), (64, 16), (8, 1)])
def test_every_token_stays_below_the_cap(rank: int, active: int, gate: bool) -> None:
    """Trained hard against the cap; then numpy's SVD of the update that each of 256 tokens meets."""
    model, adapter = lone("rank_mask", total_rank=rank, active_rank=active, value_gate=gate, max_singular_value=1.0)
    x, wanted = torch.randn(256, 48) @ torch.diag(torch.linspace(3.0, 0.01, 48)), torch.randn(32, 48)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (model.train()(x) - x @ wanted.t()).square().mean().backward()
        optimizer.step()
    a, b = masked_factors(adapter)
    found = [np.linalg.norm(b * f @ a, 2) for f in adapter.gate_values(x).double().numpy()]
    assert max(found) <= 1.0
    assert max(found) > 0.3, "the cap is not what holds the update"


@pytest.mark.parametrize("kind", ["random", "parallel", "cancelling", "one large", "a dead rank"])
def test_the_bound_is_above_every_mask_and_not_far(kind: str) -> None:
    """Against all masks of 8 ranks; and against ten times the true norm."""
    for seed in range(5):
        torch.manual_seed(seed)
        _, adapter = lone("rank_mask", total_rank=8, active_rank=3, use_hadamard_path=kind == "random")
        with torch.no_grad():
            if kind == "parallel":
                adapter.A[1:] = adapter.A[:1] * torch.rand(7, 1)
                adapter.B[:, 1:] = adapter.B[:, :1] * torch.rand(1, 7)
            elif kind == "cancelling":
                adapter.A[1::2], adapter.B[:, 1::2] = adapter.A[::2], -adapter.B[:, ::2]
            elif kind == "one large":
                adapter.B[:, 2] *= 1e4
            elif kind == "a dead rank":
                adapter.A[3], adapter.B[:, 5] = 0.0, 0.0
        sigma, norm = (float(bound) for bound in adapter.update().bounds(adapter.B.detach().double()))
        true_sigma, true_norm = over_masks(adapter)
        assert true_sigma <= sigma * (1 + 1e-9)
        assert true_norm <= norm * (1 + 1e-9)
        assert sigma <= 10.0 * true_sigma
        assert norm <= 10.0 * true_norm
        for cap in (true_sigma * 3, true_sigma / 3):
            before = adapter.B.detach().clone()
            adapter.project(cap, None)
            assert over_masks(adapter)[0] <= cap
            moved = adapter.B.detach().clone()
            adapter.project(cap, None)
            assert torch.equal(adapter.B, moved), "a second projection moves nothing"
            if sigma <= cap:
                assert torch.equal(moved, before)


@pytest.mark.parametrize(("width", "out"), [(6, 32), (48, 5), (6, 5)])
@pytest.mark.parametrize("method", ["rank_mask", "rank_mask, one mask", "kronecker", "head_gating"])
def test_caps_hold_where_the_rank_exceeds_the_site(method: str, width: int, out: int) -> None:
    sizes: dict[str, Any] = {
        "rank_mask": {"total_rank": 8, "active_rank": 3},
        "rank_mask, one mask": {"total_rank": 8, "active_rank": 7, "mask_scope": "task", "value_gate": False},
        "kronecker": {"u_rank": 2, "v_rank": 3, "u_dim": 2},
        "head_gating": {"num_groups": 2, "rank_per_group": 5},
    }[method]
    _, adapter = lone(method.partition(",")[0], width, out, **sizes)
    adapter.project(0.1, 0.12)
    sigma, norm = norms_of(adapter, method)
    assert 0.04 < sigma <= 0.1
    assert norm <= 0.12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(("scope", "gate"), [("task", False), ("token", True)])
def test_caps_hold_in_the_dtype_that_is_stored(scope: str, gate: bool, condition: float, dtype: torch.dtype) -> None:
    """Rows of A that are equal but for 1 / condition, columns of B that cancel: rounding B alone exceeds the cap."""
    for seed in range(4):
        torch.manual_seed(seed)
        model, adapter = lone(
            "rank_mask", total_rank=8, active_rank=8 if scope == "task" else 3, mask_scope=scope, value_gate=gate,
            use_hadamard_path=False,
        )  # fmt: skip
        model.to(dtype)
        with torch.no_grad():
            rows = torch.randn(8, 48)
            rows[1:] = rows[:1] + rows[1:] / condition
            adapter.A.copy_(rows)
            adapter.B.normal_().mul_(min(condition, 1e3))
        adapter.project(1.0, 2.0)
        a, b = masked_factors(adapter)
        sigma, norm = (np.linalg.norm(b @ a, 2), np.linalg.norm(b @ a)) if scope == "task" else over_masks(adapter)
        assert sigma <= 1.0
        assert norm <= 2.0


@pytest.mark.parametrize("method", ["rank_mask", "kronecker", "head_gating"])
def test_an_update_that_is_not_finite_is_named(method: str) -> None:
    sizes = {"u_rank": 3, "v_rank": 2} if method == "kronecker" else {}
    _, adapter = lone(method, max_singular_value=1.0, **sizes)
    with torch.no_grad():
        adapter.B[0, 0] = float("nan")
    before = adapter.B.detach().clone()
    with pytest.raises(FloatingPointError, match=r"`B` at o_proj is not finite.*max_singular_value.*learning rate"):
        adapter.project(1.0, None)
    assert torch.equal(adapter.B.detach().isnan(), before.isnan())


# -- whoever writes the weights, and whenever an adapter comes


def test_an_adapter_that_comes_later_is_capped_as_well() -> None:
    model = governed("kronecker")
    SpectralGovernance(max_singular_value=0.05).attach(model)
    model.add_adapter("second", CONFIGS["kronecker"](task_type="CAUSAL_LM"))
    model.set_adapter("second")
    optimizer = torch.optim.SGD([p for n, p in adapter_parameters(model).items() if "second" in n], lr=10.0)
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(model, "llama", tokens(seed=seed)).backward()
        optimizer.step()
    found = [n.max_singular_value for n in SpectralGovernance.measure(model) if n.adapter == "second"]
    assert all(0.04 < sigma <= 0.05 for sigma in found)


def test_a_model_that_the_trainer_makes_anew_is_capped(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return get_peft_model(build("llama"), CONFIGS["kronecker"](task_type="CAUSAL_LM"))

    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=1.0, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model_init=make, args=arguments, train_dataset=rows(), data_collator=collate)
    SpectralGovernance(max_singular_value=0.05).attach(trainer.model)
    trainer.train()
    found = [n.max_singular_value for n in SpectralGovernance.measure(trainer.model)]
    assert all(0.04 < sigma <= 0.05 for sigma in found)


def trained_to_the_cap() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = get_peft_model(build("llama"), CONFIGS["kronecker"](task_type="CAUSAL_LM", max_singular_value=0.05)).train()
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=10.0)
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(model, "llama", tokens(seed=seed)).backward()
        optimizer.step()
    return model, optimizer


def exceed(model: nn.Module) -> None:
    """As the `eval()` of a schedule-free optimizer: other weights stand in the parameters."""
    for name, parameter in adapter_parameters(model).items():
        if name.endswith(".B"):
            parameter.data = parameter.data * 40.0


@pytest.mark.parametrize("order", ["weights first", "mode first"])
def test_averaged_weights_above_the_cap_are_told_where_they_are_used(order: str, tmp_path: Path) -> None:
    model, _ = trained_to_the_cap()
    model.eval()(input_ids=tokens())  # capped weights say nothing
    model.save_pretrained(tmp_path)
    model.train()
    for act in (exceed, nn.Module.eval) if order == "weights first" else (nn.Module.eval, exceed):
        act(model)
    with pytest.warns(UserWarning, match=r"`max_singular_value` = 0.05 does not hold at .*used now reach") as told:
        model(input_ids=tokens())
    assert len(told) == 1, "once, not once a site"
    with pytest.warns(UserWarning, match=r"does not hold at .*saved now reach"):
        model.save_pretrained(tmp_path)
    SpectralGovernance(max_singular_value=0.05).project(model)
    model(input_ids=tokens())
    model.save_pretrained(tmp_path)


def test_an_average_of_models_above_the_cap_is_told() -> None:
    model, _ = trained_to_the_cap()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for name, parameter in adapter_parameters(average.module).items():
            if name.endswith(".U"):
                parameter.mul_(30.0)
    with pytest.warns(UserWarning, match="does not hold"):
        average.eval()(input_ids=tokens())


@pytest.mark.parametrize("write", [lambda p, m: p.copy_(m), lambda p, m: p.data.copy_(m)])
def test_an_optimizer_that_holds_copies_is_told(write: Callable[[Any, Any], Any]) -> None:
    model = get_peft_model(build("llama"), CONFIGS["kronecker"](task_type="CAUSAL_LM", max_singular_value=0.05)).train()
    held = list(adapter_parameters(model).values())
    masters = [p.detach().clone().requires_grad_() for p in held]
    optimizer = torch.optim.SGD(masters, lr=10.0)
    with pytest.warns(UserWarning, match=r"does not hold at .*trained now reach.*copies of its own"):  # noqa: PT031
        for seed in range(60):
            loss_of(model, "llama", tokens(seed=seed)).backward()
            for master, parameter in zip(masters, held, strict=True):
                master.grad, parameter.grad = parameter.grad.clone(), None
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, held, strict=True):
                    write(parameter, master)
