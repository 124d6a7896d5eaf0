"""Copies, pickles, replicas and deletions: a copy is whole and its own, and what is deleted is gone."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing, nn
from torch.optim.swa_utils import AveragedModel

from bem_peft import SpectralGovernance, penalty_values, use_kernels
from bem_peft.tuners.base.layer import AdapterLinear
from bem_peft.tuners.calls.attention_stats import EXACT_PREFIX
from bem_peft.tuners.calls.call_state import CallState, find_call_state
from bem_peft.tuners.calls.penalty_call import PenaltyCall
from tests.contract.invariants import logits
from tests.contract.methods import EVERY, adapted, adapter_parameters, randomize
from tests.tiny_models import tokens

# with a penalty where the method has one
KINDS: dict[str, dict[str, Any]] = {
    "head_gating": {"decorrelation_strength": 0.5},
    "head_gating_exact": {"gate_entropy_strength": 0.5},
    "rank_mask": {"balance_strength": 0.5},
    "kronecker": {"orthogonality_strength": 0.5, "diversity_strength": 0.5},
    "film": {},
    "composite": {},
}
kinds = pytest.mark.parametrize("kind", list(KINDS))
IDS = tokens()
quiet = pytest.mark.filterwarnings("ignore:`use_cache=True` is incompatible:UserWarning")


def made(kind: str) -> Any:
    return adapted(kind, "llama", **KINDS[kind]).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n.rpartition("base_model.")[2]: p.grad.clone() for n, p in adapter_parameters(model).items()}


def stepped(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


def pickled(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


@kinds
@pytest.mark.parametrize("moment", ["fresh", "after a forward", "after a backward"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("how", [copy.deepcopy, averaged, pickled], ids=lambda how: how.__name__)
@quiet
def test_a_copy_is_whole_and_its_own(how: Any, checkpointing: str, moment: str, kind: str) -> None:
    model = made(kind)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        if how is pickled:  # transformers' own hook, a local function, cannot be
            model.base_model.model.disable_input_require_grads()
            model.base_model.model.model.embed_tokens.weight.requires_grad_(True)
    out = None if moment == "fresh" else model(input_ids=IDS, labels=IDS)
    if moment == "after a backward":
        assert out is not None
        out.loss.backward()
    twin = how(model)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert not shared
    expected = gradients(model)
    penalties = penalty_values(model)
    assert (kind in ("film", "composite")) or penalties
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert penalty_values(model) == {}, "the copy's penalties are its own"
    before = logits(model.eval(), input_ids=IDS)
    stepped(twin.train())
    assert torch.equal(logits(model, input_ids=IDS), before)
    assert not torch.equal(logits(twin.eval(), input_ids=IDS), before)
    mine, other = find_call_state(model), find_call_state(twin)
    assert mine is not other
    assert {type(m.call) for m in twin.modules() if isinstance(m, AdapterLinear)} == {CallState}
    assert all(m.call is other for m in twin.modules() if isinstance(m, AdapterLinear))
    model.train()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@kinds
def test_a_copy_is_unloaded_alone(kind: str) -> None:
    model = made(kind).eval()
    before = logits(model, input_ids=IDS)
    twin = copy.deepcopy(model)
    twin.unload()
    assert torch.equal(logits(model, input_ids=IDS), before)
    if kind == "head_gating_exact":
        assert model.config._attn_implementation.startswith(EXACT_PREFIX)
        assert not twin.config._attn_implementation.startswith(EXACT_PREFIX)
    assert len(find_call_state(model).handles) == 2
    other = made(kind).eval()
    copy.deepcopy(other)
    other.unload()


def test_a_copy_reads_its_own_calls() -> None:
    model = adapted("head_gating", "llama", retrieval="quality")
    twin = copy.deepcopy(model)
    low, high = torch.zeros(2), torch.ones(2)
    with torch.no_grad():
        for module in twin.modules():
            if hasattr(module, "retrieval_weight"):
                module.retrieval_weight.zero_()
    given = [logits(twin, input_ids=IDS, retrieval_quality=quality) for quality in (low, high)]
    assert torch.equal(*given)
    given = [logits(model, input_ids=IDS, retrieval_quality=quality) for quality in (low, high)]
    assert not torch.equal(*given)


READER = """
import pickle, sys, torch
if {imported}:
    import bem_peft
torch.set_num_threads(1)
ids = torch.tensor({ids})
for kind in {kinds}:
    for how in {hows}:
        with open(kind + "." + how, "rb") as stream:
            model = torch.load(stream, weights_only=False) if how == "torch.save" else pickle.load(stream)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, torch.load(kind + ".expected")), (kind, how)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.eval().unload()(input_ids=ids)
        print(kind, how)
"""


# who has not imported bem_peft does so by the first pickle that is read: one of each way, in a process of its own
@pytest.mark.parametrize(
    ("imported", "names", "hows"),
    [
        (True, list(KINDS), ["torch.save", "pickle"]),
        (False, ["composite"], ["torch.save"]),
        (False, ["film"], ["pickle"]),
    ],
    ids=["imported", "not imported, torch.save", "not imported, pickle"],
)
def test_pickled_models_work_in_another_process(
    imported: bool, names: list[str], hows: list[str], tmp_path: Path
) -> None:
    for kind in names:
        model = made(kind).eval()
        torch.save(logits(model, input_ids=IDS), tmp_path / f"{kind}.expected")
        torch.save(model, tmp_path / f"{kind}.torch.save")
        (tmp_path / f"{kind}.pickle").write_bytes(pickle.dumps(model))
    code = READER.format(imported=imported, ids=IDS.tolist(), kinds=names, hows=hows)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{kind} {how}" for kind in names for how in hows], done.stderr


# replicas and processes


def replicas(model: nn.Module, number: int) -> list[nn.Module]:
    """What torch.nn.parallel.replicate makes of `model` on as many devices, on the CPU."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    made = []
    for _ in range(number):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, copies, strict=True):
            for name, child in module._modules.items():
                setattr(replica, name, None if child is None else copies[index[child]])
            for name, parameter in module._parameters.items():
                setattr(replica, name, None if parameter is None else parameter * 1.0)
            for name, buffer in module._buffers.items():
                setattr(replica, name, buffer)
        made.append(copies[0])
    return made


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("kind", ["head_gating", "rank_mask", "kronecker", "film", "composite"])
def test_replicas_compute_and_differentiate_as_the_model(kind: str, kernels: str) -> None:
    model: Any = adapted(kind, "llama")
    model.base_model.model.set_attn_implementation("eager")  # which can be differentiated twice
    use_kernels(kernels)
    try:
        expected = logits(model, input_ids=IDS)
        for replica in replicas(model, 2):
            assert torch.equal(logits(replica, input_ids=IDS), expected)
        gradient = gradients(model.train())
        model.zero_grad()
        replica = replicas(model, 1)[0]
        replica(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in adapter_parameters(model).items():
            torch.testing.assert_close(parameter.grad, gradient[name.rpartition("base_model.")[2]])
        wanted = [p for p in model.parameters() if p.requires_grad]
        second = []
        for one in (model, replicas(model, 1)[0]):
            loss = one(input_ids=IDS, labels=IDS).loss
            first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
            total = sum(g.square().sum() for g in first if g is not None)
            second.append(torch.autograd.grad(total, wanted, allow_unused=True))
        for mine, other in zip(*second, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-6)
    finally:
        use_kernels("torch")


def test_replicas_in_threads_read_their_own_calls() -> None:
    model = adapted("head_gating", "llama", retrieval="quality")
    qualities = [torch.full((2,), value) for value in (0.0, 0.3, 1.0)]
    expected = [logits(model, input_ids=IDS, retrieval_quality=quality) for quality in qualities]
    copies, found = replicas(model, 3), [torch.empty(0)] * 3

    def run(i: int) -> None:
        for _ in range(10):
            found[i] = logits(copies[i], input_ids=IDS, retrieval_quality=qualities[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def answer(rank: int, model: Any, results: Any) -> None:
    torch.set_num_threads(1)
    stepped(model.train())
    results.put((rank, [p.grad is None for p in model.parameters() if p.requires_grad][:1]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_model_in_shared_memory_trains_in_other_processes(method: str) -> None:
    model = adapted("composite", "llama")
    before = logits(model, input_ids=IDS)
    model.share_memory()
    assert torch.equal(logits(model, input_ids=IDS), before)
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    process = context.Process(target=answer, args=(0, model, results))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert results.get()[0] == 0
    after = logits(model.eval(), input_ids=IDS)
    assert not torch.equal(after, before), "the other process has written into the shared parameters"
    assert torch.equal(after, logits(copy.deepcopy(model), input_ids=IDS))


# what is deleted is gone


def used(kind: str, checkpointing: bool) -> Any:
    """A model with two adapters that have trained, generated, and been saved from."""
    model = made(kind)
    model.add_adapter("second", EVERY[kind](task_type="CAUSAL_LM", **KINDS[kind]))
    randomize(model, seed=5)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name in ("second", "default"):
        model.set_adapter(name)
        stepped(model)
    model.eval()
    model.generate(input_ids=IDS, max_new_tokens=2)
    return model


def watched_parameters(model: nn.Module, name: str) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(p) for key, p in adapter_parameters(model).items() if f".{name}." in key]


def alive(references: list[Any]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("checkpointing", [False, True])
@kinds
@quiet
def test_deleted_parameters_are_freed(kind: str, checkpointing: bool, kernels: str) -> None:
    use_kernels(kernels)
    try:
        model = used(kind, checkpointing)
        first, second = watched_parameters(model, "default"), watched_parameters(model, "second")
        assert alive(first) == len(first) > 0
        model.set_adapter("second")
        model.delete_adapter("default")
        assert alive(first) == 0
        assert alive(second) == len(second)
        stepped(model.train())
        model.set_adapter("second")
        base = model.eval().unload()
        del model
        assert alive(second) == 0
        base(input_ids=IDS)
    finally:
        use_kernels("torch")


@pytest.mark.parametrize("kind", ["kronecker", "rank_mask_task", "film_static"])
@quiet
def test_merging_and_unloading_leaves_nothing(kind: str) -> None:
    penalty = KINDS.get(kind, {})
    model: Any = adapted(kind, "llama", **penalty).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind != "film_static":
        SpectralGovernance(max_singular_value=1.0).attach(model)
    stepped(model)
    references = watched_parameters(model, "default")
    state = weakref.ref(find_call_state(model))
    merged = model.eval().merge_and_unload()
    del model
    assert alive(references) == 0
    assert alive([state]) == 0
    assert not merged._forward_hooks
    assert not merged._forward_pre_hooks
    merged.train()(input_ids=IDS, labels=IDS).loss.backward()


def test_a_deleted_adapter_asks_nothing_of_a_call_any_more() -> None:
    model: Any = adapted("head_gating", "llama", retrieval="quality", decorrelation_strength=0.1)
    model.add_adapter("second", EVERY["head_gating"](task_type="CAUSAL_LM"))
    state = find_call_state(model)
    assert state.is_penalised
    assert state.retrieval == {"quality"}
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not state.is_penalised
    assert state.retrieval == set()
    with pytest.raises(ValueError, match="no adapter reads it"):
        model(input_ids=IDS, retrieval_quality=torch.ones(2))


def test_the_attention_is_its_own_again_without_exact_rows() -> None:
    model: Any = adapted("head_gating_exact", "llama")
    model.add_adapter("second", EVERY["head_gating"](task_type="CAUSAL_LM"))
    model.set_adapter("second")
    assert model.config._attn_implementation.startswith(EXACT_PREFIX)
    model.delete_adapter("default")
    assert not model.config._attn_implementation.startswith(EXACT_PREFIX)


@pytest.mark.parametrize("strength", [{"orthogonality_strength": 0.1}, {"diversity_strength": 0.1}])
def test_steps_with_a_penalty_leave_nothing(strength: dict[str, float]) -> None:
    """A penalty of parameters counts once a call; what remembers that must not hold the call's graph."""
    model = adapted("kronecker", "llama", **strength).train()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
    gc.collect()
    assert not any(type(found) is PenaltyCall for found in gc.get_objects())


def test_an_emergency_of_a_copy_is_its_own() -> None:
    model = adapted("film", "llama").train()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(adapter_parameters(twin).values())).fill_(float("nan"))
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    stepped(twin)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, before[name])
