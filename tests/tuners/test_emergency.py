"""PT4's emergency stabilisation: NaN and infinity in training, and the run goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from bem_peft import ResidualFiLMConfig, emergency_stabilize
from bem_peft.tuners.pt4_film import ResidualFiLMAdapter
from tests.contract.methods import adapted, adapter_parameters, randomize
from tests.tiny_models import build, tokens


def film() -> nn.Module:
    return adapted("film", "llama").train()


def adapters(model: nn.Module) -> list[ResidualFiLMAdapter]:
    return [module for module in model.modules() if isinstance(module, ResidualFiLMAdapter)]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, spoil: Callable[[], None] | None = None
) -> float:
    optimizer.zero_grad()
    ids = tokens(seed=seed)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if spoil is not None:
        spoil()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("weight", float("nan")),
        ("weight", float("inf")),
        ("gradient", float("nan")),
        ("gradient", float("-inf")),
        ("output", float("nan")),
        ("output", float("inf")),
        ("output", 1e20),
    ],
)
def test_run_goes_on_from_the_last_good_values(where: str, value: float, caplog: pytest.LogCaptureFixture) -> None:
    """The last good values are those before the last step that was taken: their own outputs were sound."""
    model = film()
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    step(model, optimizer, 0)
    good = state(model)
    step(model, optimizer, 1)
    target, spoil, handle = adapters(model)[1], None, None
    if where == "weight":
        with torch.no_grad():
            target.gamma[0, 0] = value
    elif where == "gradient":
        spoil = lambda: target.gamma.grad.fill_(value)  # noqa: E731
    else:
        layer = next(m for m in model.modules() if hasattr(m, "bem_film_adapter"))
        handle = layer.base_layer.register_forward_hook(lambda m, a, out: out * value)
    with caplog.at_level(logging.WARNING, logger="bem_peft"):
        step(model, optimizer, 5, spoil)
    if handle is not None:
        handle.remove()
    assert len(caplog.records) == 1, "reported once"
    assert "emergency stabilisation" in caplog.text
    reverted = [adapter for adapter in adapters(model) if adapter.emergency_count == 1]
    assert reverted
    if where != "output":
        assert target in reverted
    now = state(model)
    for name in now:
        if model.get_submodule(name.rpartition(".")[0]) in reverted:
            assert torch.equal(now[name], good[name]), f"{name} is not the last good value"
        assert torch.isfinite(now[name]).all()
    for moments in optimizer.state.values():
        assert torch.isfinite(moments["exp_avg"]).all()
        assert torch.isfinite(moments["exp_avg_sq"]).all()
    for seed in range(6, 9):
        assert math.isfinite(step(model, optimizer, seed))
    assert sum(emergency_stabilize(model).values()) == len(reverted), "no further event"


@pytest.mark.parametrize("value", [3e38, -1e20])
def test_a_large_finite_gradient_is_no_emergency(value: float) -> None:
    """Its square overflows, itself it does not."""
    model = film()
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=1e-38)
    step(model, optimizer, 0, lambda: adapters(model)[1].gamma.grad.fill_(value))  # type: ignore[union-attr]
    assert sum(emergency_stabilize(model).values()) == 0


def test_healthy_run_is_the_same_with_and_without_the_brake() -> None:
    runs = []
    for is_guarded in (True, False):
        model = adapted_film(is_guarded)
        optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
        for seed in range(3):
            step(model, optimizer, seed)
        runs.append(state(model))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name])


def adapted_film(is_guarded: bool) -> nn.Module:
    config = ResidualFiLMConfig(gamma_dim=3, beta_dim=2, emergency_stabilization=is_guarded, task_type="CAUSAL_LM")
    model = get_peft_model(build("llama"), config).train()
    randomize(model)
    return model


def test_trainer_goes_on_after_a_bad_batch(tmp_path: object, caplog: pytest.LogCaptureFixture) -> None:
    model = film()
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=12)]
    calls = {"n": 0}

    def spoil(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        calls["n"] += 1
        return out * float("nan") if calls["n"] == 2 else out

    handle = model.get_base_model().model.embed_tokens.register_forward_hook(spoil)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with caplog.at_level(logging.WARNING, logger="bem_peft"):
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    handle.remove()
    assert "emergency stabilisation" in caplog.text
    assert all(torch.isfinite(p).all() for p in adapter_parameters(model).values())
    assert all(count == 1 for count in emergency_stabilize(model).values())
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens()).logits).all()
