"""The C++ operators against the methods' own torch forms in float64, at odd sizes, in both dtypes."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
    use_kernels,
)
from bem_peft.kept import kept_weights
from bem_peft.kernels import cpp
from bem_peft.tuners.base.adapter import Adapter, SiteShape
from bem_peft.tuners.base.forms import MANY, PACKED
from bem_peft.tuners.base.layer import AdapterLinear
from bem_peft.tuners.calls.call_state import CallState
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskAdapter
from bem_peft.tuners.pt3_kronecker import KroneckerAdapter
from bem_peft.tuners.pt4_film import ResidualFiLMAdapter
from tests.tiny_models import build

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")

# name -> (class, config, input widths that fit)
CASES: dict[str, tuple[type[Adapter], Any, tuple[int, ...]]] = {
    "PT1": (HeadGroupGatingAdapter, HeadGroupGatingConfig(num_groups=3, rank_per_group=4, num_heads=3), (9, 57, 576)),
    "PT1 uneven, warm": (
        HeadGroupGatingAdapter,
        HeadGroupGatingConfig(num_groups=2, rank_per_group=[1, 18], num_heads=18, gate_temperature=0.5),
        (18, 306),
    ),
    "PT2": (DynamicRankMaskAdapter, DynamicRankMaskConfig(total_rank=8, active_rank=3), (5, 65, 1536)),
    "PT2 odd, no gate": (
        DynamicRankMaskAdapter,
        DynamicRankMaskConfig(total_rank=19, active_rank=18, value_gate=False, use_hadamard_path=False),
        (33,),
    ),
    "PT2 one rank": (
        DynamicRankMaskAdapter, DynamicRankMaskConfig(total_rank=1, active_rank=1, use_hadamard_path=False), (7,),
    ),
    "PT2 a task": (
        DynamicRankMaskAdapter, DynamicRankMaskConfig(total_rank=8, active_rank=5, mask_scope="task"), (65,),
    ),
    "PT2 blocks": (
        DynamicRankMaskAdapter, DynamicRankMaskConfig(total_rank=8, active_rank=3, num_blocks=4), (12, 68, 576),
    ),
    "PT2 blocks, odd, a task": (
        DynamicRankMaskAdapter,
        DynamicRankMaskConfig(
            total_rank=21, active_rank=18, num_blocks=3, use_hadamard_path=False, mask_scope="task"
        ),
        (51,),
    ),
    "PT3": (KroneckerAdapter, KroneckerConfig(u_rank=5, v_rank=3, init_method="random"), (30, 221, 1536)),
    "PT3 wide": (KroneckerAdapter, KroneckerConfig(u_rank=9, v_rank=17, u_dim=9, v_dim=17), (153,)),
    "PT3 one": (KroneckerAdapter, KroneckerConfig(u_rank=1, v_rank=1, init_method="random"), (6,)),
    "PT4": (ResidualFiLMAdapter, ResidualFiLMConfig(gamma_dim=3, beta_dim=17), (5, 65, 1536)),
    "PT4 beta": (ResidualFiLMAdapter, ResidualFiLMConfig(clamp_range=0.0, beta_unit="absolute"), (33,)),
    "PT4 gamma": (ResidualFiLMAdapter, ResidualFiLMConfig(max_beta=0.0), (33,)),
    "PT4 absolute": (ResidualFiLMAdapter, ResidualFiLMConfig(controller_unit="absolute", beta_unit="absolute"), (33,)),
    "PT4 absolute controller": (ResidualFiLMAdapter, ResidualFiLMConfig(controller_unit="absolute"), (33,)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def torch_form_after() -> Iterator[None]:
    yield
    use_kernels("torch")


def made(name: str, width: int, out: int) -> Adapter:
    cls, config, _ = CASES[name]
    torch.manual_seed(width + out)
    site = SiteShape("model.site", width, out, getattr(config, "num_heads", None))
    adapter = cls(config, site, CallState())
    adapter.reset_parameters(False, site)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapter.eval()


def guarded(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Random rows whose neighbours in memory are NaN."""
    around = torch.full((rows + 2, width), float("nan"), dtype=dtype)
    around[1:-1] = torch.randn(rows, width) * scale
    return around[1:-1]


def formula(adapter: Adapter, x: torch.Tensor, y: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """y' of the methods' docstrings, token by token in float64."""
    x, y, w = x.double(), y.double(), [part.double() for part in weights]
    s, rows = adapter.scaling, []
    for token, base in zip(x, y, strict=True):
        if isinstance(adapter, HeadGroupGatingAdapter):
            heads = token.view(adapter.num_heads, -1)
            energy = (heads.square().sum(1) / heads.square().sum()).log()
            evenness = heads.sum(1).square() / heads.square().sum(1)
            gates = 2 * torch.sigmoid((torch.cat((energy, evenness)) @ w[2] + w[3]) / adapter.temperature)
            groups = token.view(adapter.num_groups, -1)
            low = torch.cat([gates[g] * (groups[g] @ w[0][g])[:rank] for g, rank in enumerate(adapter.ranks)])
            rows.append(base + s * low @ w[1])
        elif isinstance(adapter, DynamicRankMaskAdapter):
            if w[0].dim() == 2:
                z = token @ w[0]
            else:
                z = torch.cat([part @ a for part, a in zip(token.chunk(len(w[0])), w[0], strict=True)])
                h = scipy.linalg.hadamard(len(z)) / len(z) ** 0.5 if adapter.hadamard else None
                z = z if h is None else torch.from_numpy(h) @ z
            unit = z / z.square().sum().sqrt()
            logits = adapter.mask_weight.double() if adapter.is_task_mask else unit @ w[2][:, -len(z) :]
            kept = sorted(range(len(z)), key=lambda i, given=logits: (-float(given[i]), i))[: adapter.active_rank]
            mask = torch.zeros_like(z)
            mask[kept] = 1.0
            k = adapter.active_rank
            if adapter.training and k == len(z):  # nothing is chosen: no slope
                mask = mask + 0.0 * logits
            elif adapter.training:  # straight-through: a sigmoid's slope, midway between k-th and next
                order = sorted((float(value) for value in logits), reverse=True)
                soft = torch.sigmoid((logits - (order[k - 1] + order[k]) / 2) / adapter.temperature)
                mask = mask + (soft - soft.detach())
            gate = 1 + torch.tanh(unit @ w[2][:, : len(z)]) if adapter.has_value_gate else 1.0
            rows.append(base + s * (mask * gate * z) @ w[1])
        elif isinstance(adapter, KroneckerAdapter):
            rows.append(base + s * (torch.kron(w[0], w[1]) @ token) @ w[2])
        else:
            assert isinstance(adapter, ResidualFiLMAdapter)
            rms = base.square().mean().sqrt()
            c = torch.tanh(token @ w[0] / (rms if adapter.is_relative else 1.0) + w[1])
            has_gamma, has_beta = adapter.clamp_range > 0, adapter.max_beta > 0
            gamma = c[: adapter.gamma_dim] @ w[2] if has_gamma else 0.0
            beta = c[: adapter.beta_dim] @ w[-1] if has_beta else 0.0
            rows.append(base * (1 + gamma) + beta * (rms if adapter.is_rms else 1.0))
    return torch.stack(rows)


def both_forms(adapter: Adapter, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(operator, torch form, formula in float64 of the same rounded weights)."""
    cpp.build()
    with torch.no_grad():
        weights = adapter.weights(y.dtype, MANY)
        plain = adapter.transform(x, y, *weights)
        found = adapter.operator(x, y, *adapter.weights(y.dtype, PACKED))
        return found, plain, formula(adapter, x, y, weights)


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 33, 130])
@pytest.mark.parametrize(("name", "width"), [(name, width) for name, case in CASES.items() for width in case[2]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_operator_is_at_most_twice_as_far_from_the_formula_as_torch_is(
    name: str, width: int, rows: int, dtype: torch.dtype
) -> None:
    errors, own, largest = [], [], 1.0  # over all widths: the torch form may be right by chance in a single number
    for out in (1, 5, 65, 200):
        adapter = made(name, width, out)
        x, y = guarded(rows, width, dtype), guarded(rows, out, dtype, 3.0)
        found, plain, exact = both_forms(adapter, x, y)
        assert found.dtype is dtype
        assert found.shape == y.shape
        errors.append(float((found.double() - exact).abs().max()))
        own.append(float((plain.double() - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    # float32 sums of up to 1,536 terms; half a unit in the last place where the result is rounded
    least = largest * torch.finfo(dtype).eps * (4.0 if dtype is torch.float32 else 0.51)
    assert max(errors) <= 2.0 * max(own) + least, (errors, own)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_operators_pass_torchs_own_checks_and_count_their_products(name: str) -> None:
    adapter = made(name, CASES[name][2][0], 40)
    x, y = torch.randn(2, 3, adapter.in_features), torch.randn(2, 3, 40)
    with torch.no_grad():
        packed = adapter.weights(torch.float32, PACKED)
        whole = adapter.operator(x, y, *packed)
        turned = adapter.operator(x.transpose(0, 1).contiguous().transpose(0, 1), y, *packed)
        assert torch.equal(whole, turned)
        assert torch.equal(adapter.operator(x.double(), y, *packed), whole)  # x in the dtype of y, as in autocast
        with FlopCounterMode(display=False) as counted:
            adapter.operator(x, y, *packed)
        with FlopCounterMode(display=False) as expected:
            rows = [part.reshape(6, -1) for part in (x, y)]
            adapter.transform(*rows, *adapter.weights(torch.float32, MANY))
        assert counted.get_total_flops() == expected.get_total_flops() > 0
        names = {"PT1": "head_gating", "PT2": "rank_mask", "PT3": "kronecker", "PT4": "film"}
        operator: Any = getattr(cpp.build(), names[name[:3]])
        seen: list[Any] = []

        class Spy(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is operator.default:
                    seen.append(args)
                return func(*args, **(kwargs or {}))

        with Spy():
            adapter.operator(x, y, *packed)
        torch.library.opcheck(operator.default, seen[0], test_utils=("test_schema", "test_faketensor"))
        overwriting = getattr(cpp.build(), f"{names[name[:3]]}_").default
        torch.library.opcheck(overwriting, seen[0], test_utils=("test_schema", "test_faketensor"))
        copied = y.clone()
        assert adapter.operator(x, copied, *packed, overwrite=True).data_ptr() == copied.data_ptr()
        assert torch.equal(copied, whole)
        broken = x.clone()
        broken[0, 1, 0] = float("nan")
        out = adapter.operator(broken, y, *packed)
        assert out[0, 1].isnan().any()
        assert torch.equal(out[1], whole[1])


@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        HeadGroupGatingConfig(num_groups=2, rank_per_group=3),
        DynamicRankMaskConfig(total_rank=8, active_rank=8),
        KroneckerConfig(u_rank=3, v_rank=5),
        ResidualFiLMConfig(gamma_dim=3, beta_dim=5),
    ],
    ids=["PT1", "PT2", "PT3", "PT4"],
)
def test_a_model_uses_them_at_inference_and_sees_new_weights(config: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama").to(dtype), copy.deepcopy(config), autocast_adapter_dtype=False).eval()
    ids = torch.arange(3, 33).view(3, 10)
    calls: list[str] = []
    for module in model.modules():
        if isinstance(module, Adapter):
            original = module.operator
            module.operator = lambda *a, _f=original, **k: (calls.append("operator"), _f(*a, **k))[1]  # type: ignore[method-assign]
    fresh = model.get_base_model()
    with torch.no_grad(), model.disable_adapter():
        base = fresh(ids).logits
    for is_trained in (False, True):
        with torch.no_grad():
            use_kernels("torch")
            expected = model(ids).logits
            assert not calls
            use_kernels("cpp")
            with kept_weights(model):
                found = model(ids).logits
            assert calls
            calls.clear()
            assert torch.equal(model(ids).logits, found), "where nothing is kept, by the masters themselves"
            calls.clear()
            if not is_trained:
                assert torch.equal(found, base)  # a fresh adapter gives the base's output, bit for bit
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 if dtype is torch.float32 else 0.06)
            for name, parameter in model.named_parameters():
                if "bem_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model(ids).logits.sum().backward()
    model.train()
    with torch.no_grad():
        model(ids)
    assert not calls  # whatever asks for a gradient, and what runs in training mode, does not take these operators


def test_nothing_that_another_holds_is_written_into() -> None:
    """y is overwritten only where the base layer is plain and no hook has seen its output."""
    use_kernels("cpp")
    model = get_peft_model(build("llama"), KroneckerConfig(u_rank=3, v_rank=5)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bem_" in name:
                parameter.add_(torch.randn_like(parameter))
        ids = torch.arange(3, 13).unsqueeze(0)
        expected = model(ids).logits
        site = next(module for module in model.modules() if isinstance(module, AdapterLinear))
        x, seen = torch.randn(1, 4, site.in_features), []
        base = torch.nn.functional.linear(x, site.base_layer.weight)
        hook = site.base_layer.register_forward_hook(lambda module, given, out: seen.append(out))
        assert not torch.equal(site(x), base)
        assert torch.equal(seen[0], base)
        hook.remove()
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, given, out: seen.append(out) if module is site.base_layer else None
        )
        site(x)
        hook.remove()
        assert torch.equal(seen[1], base)
        assert torch.equal(model(ids).logits, expected)


def test_what_an_operator_does_not_know_takes_the_torch_form() -> None:
    site = SiteShape("s", 12, 8, 4)
    assert not HeadGroupGatingAdapter(HeadGroupGatingConfig(retrieval="quality"), site, CallState()).has_operator
    assert not HeadGroupGatingAdapter(HeadGroupGatingConfig(attention_stats="exact"), site, CallState()).has_operator
    assert not ResidualFiLMAdapter(ResidualFiLMConfig(mode="static"), site, CallState()).has_operator
    assert not ResidualFiLMAdapter(ResidualFiLMConfig(mode="spatial"), site, CallState()).has_operator
    adapter = made("PT2", 65, 5)
    with torch.no_grad():
        assert adapter.fits_operator(torch.zeros(1, 5))
        assert not adapter.fits_operator(torch.zeros(1, 5, dtype=torch.float16))
        assert not adapter.fits_operator(torch.zeros(1, 5, device="meta"))
        adapter.observer = []  # type: ignore[assignment]
        assert not adapter.fits_operator(torch.zeros(1, 5))


def test_wrong_shapes_and_choices_are_named() -> None:
    operators = cpp.build()
    x, y = torch.zeros(2, 6), torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match=r"u must be float32 \(1, 3\), is float64 \(1, 3\)"):
        operators.kronecker(x, y, torch.zeros(1, 3).double(), torch.zeros(2, 16), torch.zeros(1, 4), 1, 1.0)
    with pytest.raises(RuntimeError, match="u and v do not fit x"):
        operators.kronecker(x, y, torch.zeros(1, 2), torch.zeros(2, 16), torch.zeros(1, 4), 1, 1.0)
    with pytest.raises(RuntimeError, match="must have the same rows"):
        operators.kronecker(x, y[:1], torch.zeros(1, 3), torch.zeros(2, 16), torch.zeros(1, 4), 1, 1.0)
    with pytest.raises(ValueError, match="BEM_PEFT_KERNELS = 'fast': must be one of auto, torch"):
        use_kernels("fast")
    done = subprocess.run(
        [sys.executable, "-c", "import bem_peft"], env={"BEM_PEFT_KERNELS": "x", "PATH": ""}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "BEM_PEFT_KERNELS = 'x'" in done.stderr
