"""Work around optimizer steps happens once a training step, whatever optimizers take it; nothing of it is a file's."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from bem_peft import HeadGroupGatingConfig, ResidualFiLMConfig
from bem_peft.tuners.base.adapter import Adapter
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter
from bem_peft.tuners.steps.brake import Braked, emergency_count
from tests.contract.methods import METHODS, adapted, adapter_parameters, randomize
from tests.tiny_models import build, tokens

Optimizer = torch.optim.Optimizer


def film(**fields: Any) -> nn.Module:
    model = get_peft_model(build("llama"), ResidualFiLMConfig(task_type="CAUSAL_LM", **fields)).train()
    randomize(model)
    return model


def annealed() -> nn.Module:
    config = HeadGroupGatingConfig(decorrelation_strength=0.1, decorrelation_anneal_steps=100, task_type="CAUSAL_LM")
    return get_peft_model(build("llama"), config).train()


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(adapter_parameters(model).values())


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters(model)]


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def steps_taken(model: nn.Module) -> set[int]:
    return {int(m.steps_taken) for m in model.modules() if isinstance(m, HeadGroupGatingAdapter)}


def backward(model: nn.Module, factor: float = 1.0, seed: int = 1) -> torch.Tensor:
    ids = tokens(seed=seed)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss * factor
    loss.backward()
    return loss


def braked(model: nn.Module) -> list[Braked]:
    return [m for m in model.modules() if isinstance(m, Braked)]


# -- closures

CLOSED: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-1),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, lr=1e-1, max_iter=3),
}


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", CLOSED)
def test_a_closure_is_judged_after_it_has_run(name: str, keyword: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One bad batch is one emergency, and the run goes on; a healthy run equals that of the usual loop."""
    model = film()
    optimizer, losses = CLOSED[name](parameters(model)), []
    with caplog.at_level(logging.WARNING, logger="bem_peft"):
        for index in range(10):

            def closure(index: int = index) -> torch.Tensor:
                optimizer.zero_grad()
                return backward(model, math.nan if index == 4 else 1.0)

            loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)  # type: ignore[arg-type]
            losses.append(float(loss.detach()))
    assert len(caplog.records) == 1
    assert emergency_count(model) == len(braked(model))
    assert all(torch.isfinite(value).all() for value in values(model))
    assert losses[9] < losses[5] < losses[0]


def test_a_closure_and_the_usual_loop_train_alike() -> None:
    ends = []
    for is_closed in (False, True):
        model = film()
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
        for seed in range(4):

            def closure(model: nn.Module = model, optimizer: Any = optimizer, seed: int = seed) -> torch.Tensor:
                optimizer.zero_grad()
                return backward(model, seed=seed)

            if is_closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        ends.append(values(model))
    assert are_equal(*ends)


# -- several optimizers


class Outer(Optimizer):
    """As Lookahead and SAM: an optimizer that steps another one."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(self.param_groups, lr=1e-2)

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimizer_inside_another_counts_once(tmp_path: Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.optim import ZeroRedundancyOptimizer

    init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for make in (Outer, lambda ps: ZeroRedundancyOptimizer(ps, torch.optim.AdamW, lr=1e-3)):
            model = annealed()
            optimizer = make(parameters(model))
            for _ in range(5):
                backward(model)
                optimizer.step()
            assert steps_taken(model) == {5}
    finally:
        destroy_process_group()


@pytest.mark.parametrize(("every", "expected"), [((1, 1), 6), ((1, 2), 6), ((2, 1), 6), ((3, 3), 2)])
def test_two_optimizers_of_one_adapter_take_a_step_together(every: tuple[int, int], expected: int) -> None:
    model = annealed()
    named = adapter_parameters(model)
    gates = torch.optim.SGD([p for n, p in named.items() if "gate" in n], lr=1e-2)
    rest = torch.optim.AdamW([p for n, p in named.items() if "gate" not in n], lr=1e-2)
    for index in range(6):
        backward(model)
        for optimizer, period in zip((gates, rest), every, strict=True):
            if index % period == 0:
                optimizer.step()
    assert steps_taken(model) == {expected}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_exploded_step_is_taken_by_none_of_two_optimizers(order: tuple[int, int]) -> None:
    model = film()
    named = adapter_parameters(model)
    pair = [
        torch.optim.AdamW([p for n, p in named.items() if ("controller" in n) is part], lr=1e-2)
        for part in (True, False)
    ]
    seen = []
    for index in range(4):
        handles = []
        if index == 2:
            layers = [m for m in model.modules() if hasattr(m, "bem_film_adapter")]
            handles = [m.base_layer.register_forward_hook(lambda m, a, out: out * 1e9) for m in layers]
        seen.append(values(model))
        backward(model)
        for handle in handles:
            handle.remove()
        for which in order:
            pair[which].step()
            pair[which].zero_grad()
    assert emergency_count(model) == len(braked(model))
    # back to what it was before the step before, whose outputs were sound; then one step more
    assert not are_equal(seen[1], seen[2])
    assert are_equal(seen[3], seen[1])
    assert all(torch.isfinite(value).all() for value in values(model))


# -- steps that are not taken


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("make", [film, annealed])
def test_a_step_that_a_scaler_skips_is_none(make: Callable[[], nn.Module], is_fused: bool) -> None:
    model = make()
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2, fused=is_fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for index in range(3):
        ids = tokens()
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        before = values(model)
        if index == 1:
            parameters(model)[-1].grad[0] = math.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert are_equal(values(model), before) == (index == 1)
    assert emergency_count(model) == 0
    assert steps_taken(model) <= {2}


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("how", ["forward alone", "gradients thrown away"])
def test_a_batch_that_the_loop_drops_is_no_emergency(how: str, to_none: bool) -> None:
    model = film()
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    layer = next(m for m in model.modules() if hasattr(m, "bem_film_adapter"))
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    handle = layer.base_layer.register_forward_hook(lambda m, a, out: out * 1e9)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    handle.remove()
    if how != "forward alone":
        loss.backward()
    optimizer.zero_grad(set_to_none=to_none)
    before = values(model)
    backward(model)
    optimizer.step()
    assert emergency_count(model) == 0
    assert not any(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
def test_every_batch_of_an_accumulated_step_counts(bad: int, together: bool) -> None:
    """Two forward passes of one step, with one backward pass each, or one for both."""
    model = film()
    optimizer = torch.optim.SGD(parameters(model), lr=1e-3)
    layer = next(m for m in model.modules() if hasattr(m, "bem_film_adapter"))
    losses = []
    for index in range(2):
        handle = layer.base_layer.register_forward_hook(lambda m, a, out: out * 1e9) if index == bad else None
        losses.append(model(input_ids=tokens(seed=index), labels=tokens(seed=index)).loss)
        if handle is not None:
            handle.remove()
        if not together:
            losses[-1].backward()
    if together:
        (losses[0] + losses[1]).backward()
    optimizer.step()
    assert emergency_count(model) >= 1


def test_an_optimizer_that_raises_leaves_the_next_step_whole() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("no step")

    model = annealed()
    failing, sound = (kind(parameters(model), lr=1e-2) for kind in (Failing, torch.optim.SGD))
    backward(model)
    with pytest.raises(RuntimeError, match="no step"):
        failing.step()
    for _ in range(3):
        backward(model)
        sound.step()
    assert steps_taken(model) == {3}


# -- what is remembered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_parameters_alone(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """So a file that somebody makes of `named_parameters()` loads, as one made under ZeRO-3 is."""
    model = adapted(method, "llama", dtype)
    assert {n for n in model.state_dict() if "bem_" in n} == {n for n, _ in model.named_parameters() if "bem_" in n}
    model.save_pretrained(tmp_path / "own")
    made = {n.replace(".default.", "."): p.detach().clone() for n, p in adapter_parameters(model).items()}
    held = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert {n: tuple(t.shape) for n, t in made.items()} == {n: tuple(t.shape) for n, t in held.items()}
    save_file(made, tmp_path / "own" / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(build("llama", dtype), tmp_path / "own").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_files_from_before_still_load(tmp_path: Path) -> None:
    """The brake's memory stood in them."""
    model = film().eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    old = {f"last_good_{name}": torch.ones_like(p) for name, p in braked(model)[0].named_parameters()}
    old["emergency_count"] = torch.tensor(3)
    save_file(held | {f"{n.rpartition('.')[0]}.{key}": value.clone() for n in held for key, value in old.items()}, path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    for adapter in braked(loaded):
        assert torch.equal(adapter.last_good["gamma"], adapter.gamma)


def test_a_file_without_the_count_of_steps_loads(tmp_path: Path) -> None:
    model = annealed()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "steps_taken" not in n}, path)
    with pytest.warns(UserWarning, match="missing adapter keys.*steps_taken"):
        loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert steps_taken(loaded) == {0}


@pytest.mark.parametrize("autocast", [True, False])
def test_going_back_is_exact_in_the_parameters_own_dtype(autocast: bool) -> None:
    config = ResidualFiLMConfig(task_type="CAUSAL_LM")
    model = get_peft_model(build("llama", torch.bfloat16), config, autocast_adapter_dtype=autocast).train()
    randomize(model)
    model.to("cpu")
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    backward(model)
    good = values(model)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, math.nan)
    optimizer.step()
    assert are_equal(values(model), good)
    assert parameters(model)[0].dtype is (torch.float32 if autocast else torch.bfloat16)


@pytest.mark.parametrize("then", ["save", "evaluate", "copy"])
def test_an_update_that_overflows_on_the_last_step_reaches_nobody(then: str, tmp_path: Path) -> None:
    model = film()
    optimizer = torch.optim.SGD(parameters(model), lr=1e-3)
    for _ in range(2):
        backward(model)
        good = values(model)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1e38
    backward(model, 1e6)
    good = values(model)
    optimizer.step()
    assert not all(torch.isfinite(value).all() for value in values(model)), "nothing has overflowed"
    if then == "save":
        model.save_pretrained(tmp_path)
        assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    elif then == "evaluate":
        model.eval()
        with torch.no_grad():
            assert torch.isfinite(model(input_ids=tokens()).logits).all()
    else:
        assert all(torch.isfinite(t).all() for t in copy.deepcopy(model).state_dict().values() if t.is_floating_point())
    for adapter in braked(model):
        for parameter in adapter.parameters():
            assert torch.isfinite(parameter).all() or then == "copy"
    if then != "copy":
        broken = [a for a in braked(model) if a.emergency_count]
        assert broken
        kept = dict(zip(adapter_parameters(model), good, strict=True))
        for name, adapter in model.named_modules():
            if adapter in broken:
                for short, parameter in adapter.named_parameters():
                    assert torch.equal(parameter, kept[f"{name}.{short}"])


RESUMED: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-1),
    "SGD, momentum": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_back_to_what_the_other_would(name: str, tmp_path: Path) -> None:
    """Two steps, a checkpoint, then a bad batch and two steps: with the process that was, and with a new one."""

    def go_on(model: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
        for seed, factor in ((5, math.nan), (6, 1.0), (7, 1.0)):
            optimizer.zero_grad()
            backward(model, factor, seed)
            optimizer.step()
        return values(model)

    model = film()
    optimizer = RESUMED[name](parameters(model))
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed=seed)
        optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert not any(str(key).startswith("bem_peft") for state in optimizer.state.values() for key in state)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).train()
    resumed = RESUMED[name](parameters(loaded))
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    expected = go_on(model, optimizer)
    assert are_equal(go_on(loaded, resumed), expected)
    assert emergency_count(loaded) == emergency_count(model) == len(braked(model))
    assert not any(str(key).startswith("bem_peft") for state in resumed.state.values() for key in state)


def test_adapters_that_nothing_is_done_for_are_not_looked_at() -> None:
    model = adapted("kronecker", "llama").train()
    assert not any(adapter.is_watched for adapter in model.modules() if isinstance(adapter, Adapter))
    optimizer = torch.optim.SGD(parameters(model), lr=1e-2)
    backward(model)
    optimizer.step()
    assert not optimizer._optimizer_state_dict_post_hooks
