"""The C++ operators that train, against the formulas differentiated by autograd in float64, and the torch forms."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from bem_peft import (
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    penalty_values,
    use_kernels,
)
from bem_peft.kept import kept_weights
from bem_peft.kernels import cpp, cpp_operators
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskAdapter
from bem_peft.tuners.pt3_kronecker import KroneckerAdapter
from bem_peft.tuners.pt4_film import ResidualFiLMAdapter
from tests.contract.methods import randomize
from tests.kernels.test_cpp_operators import CASES, formula, guarded, made, pytestmark, torch_form_after
from tests.tiny_models import build

__all__ = ["pytestmark", "torch_form_after"]

METHODS = {
    "PT1": HeadGroupGatingConfig(num_groups=2, rank_per_group=3),
    "PT2": DynamicRankMaskConfig(total_rank=8, active_rank=3),
    "PT3": KroneckerConfig(u_rank=3, v_rank=5),
    "PT4": ResidualFiLMConfig(gamma_dim=3, beta_dim=5),
}


def in_float64(adapter: Adapter, dtype: torch.dtype) -> tuple[Adapter, tuple[torch.Tensor, ...]]:
    """The adapter with float64 parameters, and what its formula reads, rounded to `dtype` where the method rounds."""
    wide: Any = copy.deepcopy(adapter).double()
    s = wide.scaling

    def rounded(weight: torch.Tensor) -> torch.Tensor:  # its gradient is that of the weight
        return weight + (weight.detach().to(dtype).double() - weight.detach())

    if isinstance(adapter, HeadGroupGatingAdapter):
        rank, blocks = max(wide.ranks), wide.A.split(wide.ranks)
        grouped = torch.stack([torch.nn.functional.pad(block, (0, 0, 0, rank - len(block))) for block in blocks])
        weights = [rounded(grouped).transpose(1, 2), rounded(wide.B).t(), wide.gate_weight.t(), wide.gate_bias]
    elif isinstance(adapter, DynamicRankMaskAdapter):
        size, a, b = len(wide.A), wide.A, wide.B.t()
        if wide.hadamard:
            h = torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5
            a, b = h @ a if wide.num_blocks == 1 else a, h @ b
        control = [wide.C.t()] if wide.has_value_gate else []
        control += [] if wide.is_task_mask else [wide.mask_weight.t()]
        a_t = rounded(a).t() if wide.num_blocks == 1 else rounded(a).view(wide.num_blocks, -1, a.shape[1]).mT
        weights = [a_t, rounded(b), torch.cat(control, dim=1) * size**0.5]
    elif isinstance(adapter, KroneckerAdapter):
        weights = [rounded(wide.U), rounded(wide.V), rounded(wide.B).t()]
    else:
        weights = [rounded(wide.controller_weight).t(), rounded(wide.controller_bias)]
        slack = 1.0 - 2.0 * torch.finfo(dtype).eps
        for name, bound in (("gamma", wide.clamp_range), ("beta", wide.max_beta)):
            if bound > 0:
                scaled = getattr(wide, name) * s
                weights.append(rounded(scaled / (1 + scaled.abs().sum(1, keepdim=True)) * (bound * slack)).t())
    return wide, tuple(weights)


def differentiated(adapter: Adapter, out: torch.Tensor, inputs: list[torch.Tensor], gradient: torch.Tensor) -> Any:
    """name -> gradient."""
    names = ["x", "y", *(name for name, _ in adapter.named_parameters())]
    found = torch.autograd.grad(out, [*inputs, *adapter.parameters()], gradient.to(out.dtype))
    return {"output": out.detach(), **dict(zip(names, found, strict=True))}


def deviations(
    name: str, width: int, rows: int, out: int, dtype: torch.dtype
) -> Iterator[tuple[str, float, float, float]]:
    """(tensor, the torch form's largest error against float64, the operator's, what that may be): output, gradients."""
    adapter = made(name, width, out).train()
    x, y = guarded(rows, width, dtype), guarded(rows, out, dtype, 3.0)
    gradient = guarded(rows, out, dtype)
    results = []
    for is_operator in (True, False):
        ins = [x.detach().requires_grad_(), y.detach().requires_grad_()]
        form = adapter.training_operator(*ins) if is_operator else adapter.transform(*ins, *adapter.derive(dtype))
        assert form.dtype is dtype
        results.append(differentiated(adapter, form, ins, gradient))
    found, plain = results
    wide, weights = in_float64(adapter, dtype)
    ins = [x.double().requires_grad_(), y.double().requires_grad_()]
    for key, reference in differentiated(wide, formula(wide, *ins, weights), ins, gradient.double()).items():
        assert found[key].dtype is plain[key].dtype
        assert found[key].shape == reference.shape
        error, own = (float((part[key].double() - reference).abs().max()) for part in (found, plain))
        is_float32 = found[key].dtype is torch.float32
        # in bfloat16 half a unit in the last place of what is rounded
        least = float(reference.abs().max()) * torch.finfo(found[key].dtype).eps * (16.0 if is_float32 else 0.51)
        yield key, own, error, 2.0 * own + least + 1e-6


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 33, 130])
@pytest.mark.parametrize(("name", "width"), [(name, width) for name, case in CASES.items() for width in case[2]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_output_and_gradients_are_at_most_twice_as_far_from_the_formula_as_torchs(
    name: str, width: int, rows: int, dtype: torch.dtype
) -> None:
    for out in (5, 65, 200):
        for key, own, error, allowed in deviations(name, width, rows, out, dtype):
            assert error <= allowed, (key, out, error, own)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_products_are_counted_and_a_gradient_that_nobody_wants_is_not_made(name: str) -> None:
    cpp.build()  # a counter knows the formulas that were registered before it began
    adapter = made(name, CASES[name][2][0], 40).train()
    for needs_x in (False, True):
        counts = []
        for form in ("torch", "cpp"):
            x = torch.randn(6, adapter.in_features, requires_grad=needs_x)
            y = torch.randn(6, 40, requires_grad=True)
            weights = adapter.derive(torch.float32)
            with FlopCounterMode(display=False) as counted:
                out = adapter.training_operator(x, y) if form == "cpp" else adapter.transform(x, y, *weights)
                out.sum().backward()
            assert (x.grad is not None) == needs_x
            counts.append(counted.get_total_flops())
        again = 0
        if isinstance(adapter, KroneckerAdapter):  # U X is computed once more in the backward
            again = 2 * 6 * adapter.U.shape[0] * adapter.in_features
        assert counts[1] == counts[0] + again > 0


def test_a_budget_counts_what_the_operators_keep() -> None:
    """On fake tensors as on real ones, and in a fresh process as in one that has built."""
    counted = """
import sys, torch
from peft import get_peft_model
from bem_peft import ResidualFiLMConfig, count_flops, count_memory, use_kernels
from tests.tiny_models import build
ids = torch.arange(3, 43).view(4, 10)
for kernels in ("torch", "cpp"):
    if kernels == "cpp":
        use_kernels("cpp")
    model = get_peft_model(build("llama"), ResidualFiLMConfig(gamma_dim=3, beta_dim=5)).train()
    inputs = {"input_ids": ids, "labels": ids}
    flops = count_flops(model, inputs)
    memory = count_memory(model, inputs)
    print(flops.adapter_forward, flops.adapter_backward, memory.adapter_bytes)
"""
    done = subprocess.run([sys.executable, "-c", counted], capture_output=True, text=True, check=True)
    plain, mine = ([int(value) for value in line.split()] for line in done.stdout.splitlines())
    assert mine[:2] == plain[:2]
    assert 0 < mine[2] < plain[2]


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize(("name", "width"), [(name, width) for name, case in CASES.items() for width in case[2]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_has_the_bits_of_inference(
    name: str, width: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads packed weights, and what reads the masters: a token has one mask in training, scoring and decoding."""
    use_kernels("cpp")
    adapter = made(name, width, 67)
    x, y = guarded(rows, width, dtype), guarded(rows, 67, dtype)
    asked: list[str] = []
    call = cpp_operators.call
    monkeypatch.setattr(cpp_operators, "call", lambda name, *given: (asked.append(name), call(name, *given))[1])
    with torch.no_grad():
        found = adapter(x, y)
        assert asked[-1] == adapter.kernel
        with kept_weights(adapter):
            assert torch.equal(adapter(x, y), found)
            assert torch.equal(adapter(x, y), found)
        into = y.clone()
        assert adapter(x, into, may_overwrite=True) is into
        assert torch.equal(into, found)
    assert torch.equal(adapter(x, y).detach(), found)
    assert asked[-1] == f"{adapter.kernel}_train"


def test_torchs_own_checks() -> None:
    operators = cpp.build()
    x, y = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    calls: dict[str, tuple[Any, ...]] = {
        "kronecker_train": (x, y, torch.randn(2, 3), torch.randn(1, 2), torch.randn(4, 2), 1.0),
        "film_train": (
            x, y, torch.randn(2, 6), torch.randn(2), torch.randn(4, 2), torch.randn(4, 1), 1.0, 0.5, 0.5, True, True,
            torch.tensor(False), 1e-6,
        ),
        "rank_mask_train": (
            x, y, torch.randn(2, 6), torch.randn(4, 2), None, torch.randn(2, 2), 1, False, True, 1.0, 1.0,
        ),
        "rank_mask_pack": (x, torch.randn(2, 6), torch.randn(4, 2), None, torch.randn(2, 2), 1, False, True),
        "film_pack": (x, torch.randn(2, 6), torch.randn(2), None, torch.randn(4, 1), 1.0, 0.5, 0.5),
        "head_gating_train": (
            x, y, torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 4), torch.randn(2), 2, [1, 1], 1.0, 1.0,
        ),
    }  # fmt: skip
    backward: dict[str, Any] = {}

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        only_counts = True  # or the backward takes the torch form

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name.endswith("_backward"):
                backward[func] = args
            return func(*args, **(kwargs or {}))

    for name, args in calls.items():
        operator = getattr(operators, name).default
        torch.library.opcheck(operator, args, test_utils=("test_schema",))
        with torch.inference_mode():  # without autograd, whose form keeps the coefficients to itself
            torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        if name.endswith("_pack"):
            continue
        trained = [arg.requires_grad_() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args]
        with Spy():
            operator(*trained)[0].sum().backward()
    assert len(backward) == 4
    for operator, args in backward.items():
        with torch.no_grad():
            torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match=r"B must be float32 with 4 x 2 numbers, is float64"):
        operators.kronecker_train(*calls["kronecker_train"][:4], torch.randn(4, 2).double(), 1.0)
    with pytest.raises(RuntimeError, match="must have the same rows and one dtype"):
        operators.kronecker_train(x.double(), *calls["kronecker_train"][1:])


def test_a_second_derivative_of_an_operator_without_an_adapter_is_refused() -> None:
    x, y, u = torch.randn(6, 12, requires_grad=True), torch.randn(6, 8), torch.randn(2, 3)
    out = cpp.build().kronecker_train(x, y, u, torch.randn(2, 4), torch.randn(8, 4), 1.0)[0]
    with pytest.raises(RuntimeError, match=r"has no second derivative.*BEM_PEFT_KERNELS=torch"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    for name in ("PT1", "PT2", "PT3", "PT4"):
        adapter = made(name, CASES[name][2][0], 40).train()
        x, y = torch.randn(6, adapter.in_features, requires_grad=True), torch.randn(6, 40)
        use_kernels("cpp")
        out = adapter.eval()(x, y)
        del adapter
        gc.collect()
        with pytest.raises(RuntimeError, match="as long as the model is alive"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


def test_film_of_rows_that_are_zero_or_nearly() -> None:
    """Their RMS is taken as the smallest, which has no slope; nothing is infinite."""
    adapter = ResidualFiLMAdapter(ResidualFiLMConfig(gamma_dim=2, beta_dim=3), SiteShape("s", 6, 17), CallState())
    adapter.reset_parameters(False, SiteShape("s", 6, 17))
    y = torch.randn(3, 17) * torch.tensor([[0.0], [1e-8], [1.0]])
    x = torch.randn(3, 6) * torch.tensor([[1e-6], [1e-6], [1.0]])
    found = []
    for kernels, dtype in (("cpp", torch.float32), ("torch", torch.float64)):
        use_kernels(kernels)
        own = copy.deepcopy(adapter).to(dtype).train()
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, y)]
        out = own(*inputs)
        out.backward(torch.linspace(-1.0, 1.0, 51, dtype=dtype).view(3, 17))
        found.append([out.detach(), *(t.grad for t in (*inputs, *own.parameters()))])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)
    assert not found[0][0][0].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9, -1e9])
def test_film_sees_an_explosion_in_any_number(value: float) -> None:
    config = ResidualFiLMConfig(gamma_dim=3, beta_dim=5, explosion_threshold=1e6)
    for rows, out, at in ((1, 3, (0, 2)), (9, 33, (8, 32)), (9, 33, (3, 5))):
        adapter = ResidualFiLMAdapter(config, SiteShape("s", 6, out), CallState())
        adapter.reset_parameters(True, SiteShape("s", 6, out))
        adapter.train()
        use_kernels("cpp")
        y = torch.randn(rows, out)
        adapter(torch.randn(rows, 6), y).sum().backward()
        assert not adapter.is_unstable
        y[at] = value
        unused = adapter(torch.randn(rows, 6), y)
        assert not adapter.is_unstable, "an output without a gradient is no part of a step"
        unused.sum().backward()
        assert adapter.is_unstable


def trained(model: Any, kernels: str, steps: int, calls: list[str], **context: Any) -> tuple[list[float], Any]:
    """Losses of a few steps and the adapter's parameters after them."""
    use_kernels(kernels)
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, Adapter):
            original = module.training_operator
            module.training_operator = lambda *a, _f=original: (calls.append("operator"), _f(*a))[1]  # type: ignore[method-assign]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    ids, losses = torch.arange(3, 43).view(4, 10), []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=context.get("autocast", False)):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize("method", list(METHODS))
def test_a_pass_without_gradients_is_the_one_that_a_checkpoint_recomputes(method: str, dtype: torch.dtype) -> None:
    """A reentrant checkpoint's first pass: in bfloat16 another form of PT2 gives some tokens another mask."""
    cpp.build()
    model = get_peft_model(build("llama", dtype), METHODS[method])
    randomize(model)
    adapters = [module for module in model.train().modules() if isinstance(module, Adapter)]
    use_kernels("cpp")
    for adapter in adapters:
        x, y = (torch.randn(40, size).to(dtype) for size in (adapter.in_features, adapter.out_features))
        expected = adapter(x, y)
        with torch.no_grad():
            assert torch.equal(adapter(x, y), expected)
    assert adapters


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast", "checkpointing"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.filterwarnings("ignore:`use_cache=True` is incompatible:UserWarning")
def test_a_model_trains_as_with_the_torch_forms(method: str, kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama").to(torch.bfloat16 if kind == "bfloat16" else torch.float32), METHODS[method])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    if kind == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    calls: list[str] = []
    expected, weights = trained(model, "torch", 3, calls, autocast=kind == "autocast")
    assert not calls
    found, mine = trained(model, "cpp", 3, calls, autocast=kind == "autocast")
    assert calls
    is_exact = kind in ("float32", "checkpointing")
    assert found == pytest.approx(expected, rel=1e-5 if is_exact else 2e-2)
    for name, weight in weights.items():
        if is_exact:  # AdamW's first steps are of the sign of the gradient: 3 steps of 1e-3 at most
            torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=2e-4, msg=name)
        assert not torch.equal(mine[name], dict(model.named_parameters())[name])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`use_cache=True` is incompatible:UserWarning")
def test_penalties_of_parameters_are_carried_beside_the_operator(checkpointing: bool) -> None:
    """Each counts once a call, and reaches the gradient as with the torch form."""
    config = KroneckerConfig(u_rank=3, v_rank=5, orthogonality_strength=0.5, diversity_strength=0.25)
    gradients, losses, values, calls = [], [], [], []
    for kernels, is_penalised in (("torch", True), ("cpp", True), ("cpp", False)):
        use_kernels(kernels)
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), config if is_penalised else METHODS["PT3"]).train()
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn_like(parameter) * 0.3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, Adapter):
                run = module.training_operator
                module.training_operator = lambda *a, _f=run: (calls.append(kernels), _f(*a))[1]  # type: ignore[method-assign]  # noqa: B023
        ids = torch.arange(3, 43).view(4, 10)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        values.append(penalty_values(model))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert set(calls) == {"cpp"}
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[0]["penalty/total"] > 0.01
    assert max(float((gradients[1][n] - g).abs().max()) for n, g in gradients[2].items()) > 0.01, "it is felt"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_what_the_operators_do_not_know_takes_the_torch_form() -> None:
    site, call = SiteShape("s", 36, 8, 4), CallState()
    y = torch.zeros(1, 8)
    for config in METHODS.values():
        cls = {cfg: c for c, cfg, _ in CASES.values() for cfg in (type(cfg),)}[type(config)]
        adapter: Adapter = cls(config, site, call)
        assert adapter.fits_training(y)
        assert not adapter.fits_training(y.half())
        assert not adapter.fits_training(y.to("meta"))
        with torch.no_grad():
            assert adapter.fits_training(y), "as a checkpoint's second pass"
            assert not adapter.eval().fits_training(y)
        adapter.train()
        assert not copy.deepcopy(adapter).bfloat16().fits_training(y)
        inside: list[bool] = []
        torch.func.vmap(lambda row, a=adapter, seen=inside: (seen.append(a.is_plain_call(y, y)), row)[1])(y)
        assert inside == [False]
    for config in (
        HeadGroupGatingConfig(dropout=0.1),
        HeadGroupGatingConfig(gate_dropout=0.1),
        HeadGroupGatingConfig(decorrelation_strength=0.1),
    ):
        assert not HeadGroupGatingAdapter(config, site, call).fits_training(y)
    assert not DynamicRankMaskAdapter(DynamicRankMaskConfig(balance_strength=0.1), site, call).fits_training(y)
    assert KroneckerAdapter(KroneckerConfig(u_rank=2, v_rank=2, dropout=0.1), site, call).fits_training(y)


@pytest.mark.parametrize("name", ["PT1", "PT2", "PT2 a task", "PT3", "PT4"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_in_evaluation_are_those_of_the_torch_form(name: str) -> None:
    """The mask of PT2 is a constant there."""
    adapter, found = made(name, CASES[name][2][0], 40), []
    x, y = torch.randn(6, adapter.in_features), torch.randn(6, 40)
    for kernels in ("torch", "cpp"):
        use_kernels(kernels)
        ins = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        out = adapter(*ins)
        wanted = [*ins, *adapter.parameters()]
        gradients = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
        found.append([out, *(torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True))])
    for plain, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("call", ["train", "decode"])
def test_an_adapter_that_came_by_pickle_finds_the_operators(call: str, tmp_path: Path) -> None:
    """As in a process that was spawned: no adapter was made in it."""
    (tmp_path / "adapter").write_bytes(pickle.dumps(made("PT3", 30, 40)))
    code = (
        "import pickle, sys, torch; from bem_peft import kept_weights; from bem_peft.kernels import cpp\n"
        "adapter = pickle.load(open(sys.argv[1], 'rb')); x, y = torch.randn(6, 30), torch.randn(6, 40)\n"
        "if sys.argv[2] == 'train':\n    adapter.train()(x, y).sum().backward()\n"
        "else:\n    with torch.no_grad(), kept_weights(adapter):\n        adapter(x, y), adapter(x, y)\n"
        "print(cpp.loaded() is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "adapter"), call], capture_output=True, text=True,
        env={**os.environ, "BEM_PEFT_KERNELS": "cpp"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize("name", ["PT1", "PT2", "PT2 a task", "PT3", "PT4"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_rows_at_all(name: str) -> None:
    """An expert that no token was routed to."""
    use_kernels("cpp")
    adapter = made(name, CASES[name][2][0], 40).train()
    x, y = torch.zeros(0, adapter.in_features, requires_grad=True), torch.zeros(0, 40, requires_grad=True)
    out = adapter(x, y)
    assert out.shape == (0, 40)
    out.sum().backward()
    for parameter in adapter.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))  # type: ignore[arg-type]
    with torch.no_grad():
        assert adapter.eval()(x, y).shape == (0, 40)


def test_dropout_reaches_the_operator() -> None:
    adapter = KroneckerAdapter(KroneckerConfig(u_rank=2, v_rank=2, dropout=0.5), SiteShape("s", 12, 8), CallState())
    adapter.reset_parameters(False, SiteShape("s", 12, 8))
    x, y = torch.randn(5, 12), torch.randn(5, 8)
    results = []
    for kernels in ("torch", "cpp"):
        use_kernels(kernels)
        torch.manual_seed(3)
        results.append(adapter(x, y))
    torch.testing.assert_close(*results)
