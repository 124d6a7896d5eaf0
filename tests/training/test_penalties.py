"""Penalties: their values against plain references, and their gradients against the loss written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import Trainer, TrainingArguments

from bem_peft import DynamicRankMaskConfig, HeadGroupGatingConfig, penalty_values, set_loss_scale
from bem_peft.tuners.calls.loop import micro_batches
from bem_peft.tuners.calls.penalty import decorrelation, diversity, gate_entropy, mask_balance, orthogonality
from bem_peft.tuners.calls.penalty_call import LoopScale, sequences_of
from tests.contract.methods import adapter_parameters
from tests.tiny_models import build, tokens
from tests.training.equalities import (
    CASES,
    collate,
    deviation,
    gradients_of,
    hf_trainer,
    penalised,
    reset_accelerate,
    rows,
)

TOLERANCE = 1e-5  # of each parameter's largest gradient: the order of float32 sums


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Any:
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
@pytest.mark.parametrize("name", CASES)
def test_layers_carry_what_the_loss_written_out_has(name: str) -> None:
    found, expected = CASES[name]()
    assert deviation(found, expected) < TOLERANCE


def test_the_penalties_are_not_nothing() -> None:
    """What the cases above compare is not two gradients without penalties."""
    with_penalties = hf_trainer(False)
    from bem_peft.tuners.base.adapter import Adapter

    original = Adapter.penalise
    Adapter.penalise = lambda self, y, *args, **kwargs: y  # type: ignore[method-assign]
    try:
        without = hf_trainer(False)
    finally:
        Adapter.penalise = original  # type: ignore[method-assign]
    for part in ("gate_weight", "mask_weight", "kronecker.default.U", "kronecker.default.V"):
        names = [name for name in without if part in name]
        assert names
        for name in names:
            assert float((with_penalties[name] - without[name]).abs().max()) > 1e-3 * float(without[name].abs().max())


def batch_of(lengths: list[int], width: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (B, width, columns) with noise at the padding, and the mask (B, width)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(lengths), width, columns, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return values, mask


def test_decorrelation_is_the_mean_squared_correlation_of_each_sequence() -> None:
    values, mask = batch_of([7, 4, 9], 9, 3)
    sequences = sequences_of(mask.shape, mask.device, mask, None, None)
    found = decorrelation(values.flatten(0, 1), sequences)
    expected = []
    for row, real in zip(values.numpy(), mask.numpy(), strict=True):
        matrix = np.corrcoef(row[real == 1].T)
        expected.append((matrix**2).sum() - 3)
    assert float(found) == pytest.approx(np.mean(expected) / 6, rel=1e-6)


def test_gate_entropy_is_scipys() -> None:
    values, mask = batch_of([5, 2], 6, 2)
    sequences = sequences_of(mask.shape, mask.device, mask, None, None)
    expected = [
        np.mean([scipy.stats.entropy([p, 1 - p]) for p in row[real == 1].ravel()])
        for row, real in zip(values.numpy(), mask.numpy(), strict=True)
    ]
    logits = torch.logit(values).flatten(0, 1)
    assert float(gate_entropy(logits, sequences)) == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gate_entropy_and_its_gradient_are_right_for_saturated_gates(dtype: torch.dtype) -> None:
    """H = log(1 + e^-a) + a / (1 + e^a) with a = |z|, and dH/dz = -z e^-a / (1 + e^-a)^2, by numpy in float64."""
    sizes = np.array([0.0, 1e-6, 0.5, 3.0, 16.0, 17.5, 20.0, 50.0, 110.0, 800.0, 1e30, np.inf])
    for z in np.concatenate((sizes, -sizes)):
        logits = torch.tensor([[z]], dtype=dtype, requires_grad=True)
        one = sequences_of(torch.Size((1, 1)), logits.device, None, None, None)
        value = gate_entropy(logits, one)
        value.backward()
        a = min(abs(z), 700.0)
        assert float(value.detach()) == pytest.approx(np.log1p(np.exp(-a)) + a / (1 + np.exp(a)), rel=1e-5, abs=1e-40)
        slope = -np.clip(z, -700, 700) * np.exp(-a) / (1 + np.exp(-a)) ** 2
        assert logits.grad is not None
        assert float(logits.grad) == pytest.approx(slope, rel=1e-5, abs=torch.finfo(dtype).eps if a < 1.0 else 1e-40)


def test_a_saturated_gate_trains_on() -> None:
    for strength in (0.5, -0.5):
        for bias in (17.5, 110.0, -50.0, -110.0):
            model = penalised_gates(strength, bias)
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            for name, parameter in adapter_parameters(model).items():
                assert torch.isfinite(parameter.grad).all(), (strength, bias, name)


def penalised_gates(strength: float, bias: float) -> Any:
    from peft import get_peft_model

    config = HeadGroupGatingConfig(gate_entropy_strength=strength, decorrelation_strength=1.0, task_type="CAUSAL_LM")
    model = get_peft_model(build("llama"), config).train()
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(
                torch.full_like(parameter, bias) if "gate_bias" in name else torch.randn_like(parameter) * 0.1
            )
    return model


def test_mask_balance_is_the_deviation_of_the_mean_use() -> None:
    values, mask = batch_of([5, 3], 5, 4)
    sequences = sequences_of(mask.shape, mask.device, mask, None, None)
    expected = [
        ((row[real == 1].mean(0) - 0.5) ** 2).mean() for row, real in zip(values.numpy(), mask.numpy(), strict=True)
    ]
    assert float(mask_balance(values.flatten(0, 1), 2, sequences)) == pytest.approx(np.mean(expected), rel=1e-9)


def test_factor_penalties_vanish_where_rows_are_orthonormal() -> None:
    rows_, _ = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))
    assert float(orthogonality(rows_.t())) < 1e-20
    assert float(diversity(5.0 * rows_.t())) < 1e-20
    assert float(diversity(torch.ones(3, 4))) == pytest.approx(1.0)
    factor = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert float(orthogonality(factor)) == pytest.approx((0 + 1 + 1 + 1) / 4)
    assert float(diversity(factor)) == pytest.approx(0.5)


@pytest.mark.parametrize("penalty", [decorrelation, gate_entropy])
def test_padding_and_packing_change_nothing(penalty: Any) -> None:
    values, mask = batch_of([7, 4, 9], 9, 3)
    padded = penalty(values.flatten(0, 1), sequences_of(mask.shape, mask.device, mask, None, None))
    wide = torch.cat((torch.rand(3, 5, 3, dtype=torch.float64), values), dim=1)
    left = torch.cat((torch.zeros(3, 5, dtype=torch.long), mask), dim=1)
    left_padded = penalty(wide.flatten(0, 1), sequences_of(left.shape, left.device, left, None, None))
    packed = values.flatten(0, 1)[mask.flatten() == 1]
    positions = torch.cat([torch.arange(n) for n in (7, 4, 9)]).unsqueeze(0)
    without_gaps = penalty(packed, sequences_of(positions.shape, positions.device, None, positions, None))
    assert float(left_padded) == pytest.approx(float(padded), rel=1e-9)
    assert float(without_gaps) == pytest.approx(float(padded), rel=1e-9)


def test_packed_batch_has_the_gradients_of_the_padded_one() -> None:
    """Through the model: sequences one after the other with their position ids, or one a row with padding."""
    data = rows(4)
    for row in data:
        row["labels"] = row["input_ids"].clone()
        row["labels"][0] = -100
    model = penalised()
    total = sum(int((row["labels"][1:] != -100).sum()) for row in data)
    model(**collate(data), num_items_in_batch=total).loss.backward()
    padded = gradients_of(model)
    model.zero_grad()
    packed = {name: torch.cat([row[name] for row in data]).unsqueeze(0) for name in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(len(row["input_ids"])) for row in data]).unsqueeze(0)
    model(**packed, num_items_in_batch=total, use_cache=False).loss.backward()
    assert deviation(gradients_of(model), padded) < 1e-4


def test_evaluation_and_the_reported_loss_are_untouched() -> None:
    inputs = collate(rows(4))
    model = penalised()
    with torch.no_grad():
        base = model.eval()(**inputs).loss
    assert torch.equal(model.train()(**inputs).loss.detach(), base)


@pytest.mark.parametrize("other", ["discarded", "held", "seven held", "used by itself", "of a copy"])
def test_other_calls_take_no_share(other: str) -> None:
    """A training-mode call carries its own penalty, whatever else was called and is still alive."""

    def call(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=inputs["input_ids"]).logits.logsumexp(-1).mean()
        return loss

    inputs, found, held = collate(rows(4)), [], []
    for disturbs in (False, True):
        model = penalised()
        if disturbs and other == "discarded":
            call(model)
        elif disturbs and other in ("held", "seven held"):
            held += [call(model) for _ in range(1 if other == "held" else 7)]
        elif disturbs and other == "used by itself":
            first = call(model)
            second = call(model)
            first.backward()
            model.zero_grad()
            second.backward()
            found.append(gradients_of(model))
            continue
        elif disturbs:
            held.append(call(copy.deepcopy(model)))
        call(model).backward()
        found.append(gradients_of(model))
    assert deviation(found[1], found[0]) == 0.0


def test_values_are_logged_by_the_trainer_and_read_in_a_bare_loop(tmp_path: Any) -> None:
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = Trainer(
        model=penalised(), args=arguments, train_dataset=rows(), eval_dataset=rows(4), data_collator=collate
    )
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    names = {"decorrelation", "gate_entropy", "balance", "orthogonality", "diversity", "total"}
    assert len(logged) == 2
    for log in logged:
        assert {name for name in log if name.startswith("penalty/")} == {f"penalty/{name}" for name in names}
        assert 0.0 < log["penalty/gate_entropy"] < math.log(2.0)
    assert not any("penalty" in name for log in trainer.state.log_history if "loss" not in log for name in log)
    model = penalised()
    model(**collate(rows(4))).loss.backward()
    values = penalty_values(model)
    adapters = [m for m in model.modules() if type(m).__name__ == "KroneckerAdapter"]
    expected = np.mean([float((orthogonality(a.U) + orthogonality(a.V)).detach()) for a in adapters])
    assert values["penalty/orthogonality"] == pytest.approx(expected, rel=1e-5)
    assert penalty_values(model) == {}


def test_decorrelation_anneals_with_optimizer_steps_and_resumes(tmp_path: Any) -> None:
    from peft import PeftModel, get_peft_model

    config = HeadGroupGatingConfig(decorrelation_strength=4.0, decorrelation_anneal_steps=4, task_type="CAUSAL_LM")
    model = get_peft_model(build("llama"), config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    adapter = next(m for m in model.modules() if type(m).__name__ == "HeadGroupGatingAdapter")
    shares = []
    for _ in range(6):
        shares.append(float(adapter.annealing()))
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert shares == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    adapter = next(m for m in loaded.modules() if type(m).__name__ == "HeadGroupGatingAdapter")
    assert int(adapter.steps_taken) == 6


def test_last_step_of_an_epoch_has_fewer_micro_batches() -> None:
    assert [micro_batches(4, step, range(10)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [micro_batches(4, step, range(8)) for step in range(4)] == [4, 4, 4, 4]
    assert micro_batches(4, 0, iter(range(3))) == 4  # unknown length


def test_float16_loss_of_ones_own_is_refused_without_its_scale() -> None:
    model = penalised()
    inputs = collate(rows(4))
    with torch.autocast("cpu", torch.float16):
        logits = model(input_ids=inputs["input_ids"]).logits
    with pytest.raises(RuntimeError, match="set_loss_scale"):
        logits.float().mean().backward()


def test_what_cannot_be_told_is_refused() -> None:
    model = penalised()
    with pytest.raises(RuntimeError, match=r"attention_mask.*not of shape"):
        model(input_ids=tokens(), attention_mask=torch.ones(2, 1, 9, 9), labels=tokens())
    backbone = model.get_base_model().model
    with pytest.raises(RuntimeError, match="call did not go through the model"):
        backbone(input_ids=tokens())
    with pytest.raises(ValueError, match="accumulation_steps"):
        set_loss_scale(model, accumulation_steps=0)
    with pytest.raises(ValueError, match="no bem_peft adapter"):
        set_loss_scale(build("llama"))
    with pytest.raises(ValueError, match="decorrelation_anneal_steps"):
        HeadGroupGatingConfig(decorrelation_anneal_steps=5)
    assert LoopScale(lambda: 4).factor(False) == 0.25


def test_a_task_mask_has_no_balance_but_in_old_files() -> None:
    from peft import get_peft_model

    with pytest.raises(ValueError, match=r"`balance_strength` = 2.0: one mask for all tokens"):
        DynamicRankMaskConfig(mask_scope="task", balance_strength=2.0)
    config = DynamicRankMaskConfig(mask_scope="task", balance_strength=2.0, task_type="CAUSAL_LM", inference_mode=True)
    config.inference_mode = False  # as PeftModel.from_pretrained(..., is_trainable=True) does
    model = get_peft_model(build("llama"), config).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    masks = {n: p for n, p in adapter_parameters(model).items() if "mask_weight" in n}
    assert all(float(p.grad.abs().max()) > 0 for p in masks.values())


class Twice(torch.nn.Module):
    """One projection that runs twice a call, as in a model whose blocks share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(torch.tanh(self.project(x)))


def test_a_layer_that_runs_twice_carries_the_penalty_of_its_parameters_once() -> None:
    from peft import get_peft_model

    from bem_peft import KroneckerConfig

    gradients = []
    for strength in (0.0, 2.0):
        torch.manual_seed(0)
        config = KroneckerConfig(u_rank=2, v_rank=2, target_modules=["project"], orthogonality_strength=strength)
        model = get_peft_model(Twice(), config).train()
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter.add_(0.3)
        model(torch.ones(2, 12)).sum().backward()
        gradients.append({name.rpartition(".")[2]: p.grad for name, p in adapter_parameters(model).items()})
    u = next(p for name, p in adapter_parameters(model).items() if name.endswith(".U")).detach().requires_grad_()
    (2.0 * orthogonality(u)).backward()
    torch.testing.assert_close(gradients[1]["U"] - gradients[0]["U"], u.grad, rtol=1e-4, atol=1e-5)


def test_a_budget_counts_and_matches_an_adapter_with_penalties() -> None:
    """Penalties are training's own: they cost nothing in a budget, and counting leaves nothing in their log."""
    from peft import LoraConfig

    from bem_peft import KroneckerConfig, count_flops, match_budget
    from bem_peft.budget.check import example_inputs
    from bem_peft.budget.copies import adapted_copy

    anchor = LoraConfig(r=2, target_modules=["down_proj"])
    configs = [
        (KroneckerConfig(u_rank=2, v_rank=2), {"orthogonality_strength": 1.0, "diversity_strength": 1.0}),
        (DynamicRankMaskConfig(sites=["mlp_down"], use_hadamard_path=False), {"balance_strength": 1.0}),
        (HeadGroupGatingConfig(), {"decorrelation_strength": 1.0, "gate_entropy_strength": 1.0}),
    ]
    for plain, strengths in configs:
        with_penalties = type(plain)(**{**plain.to_dict(), **strengths})
        found = [match_budget(build("llama"), config, anchor).sizes for config in (plain, with_penalties)]
        assert found[0] == found[1]
        models = [adapted_copy(build("llama"), config) for config in (plain, with_penalties)]
        flops = [count_flops(model, example_inputs(model)).adapter_per_token for model in models]
        assert flops[0] == flops[1]
        assert penalty_values(models[1]) == {}
