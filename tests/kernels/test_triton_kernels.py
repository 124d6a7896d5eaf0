"""Triton's kernels in its interpreter: parity with the torch forms, torch's own checks, and whole models."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    use_kernels,
)
from bem_peft.kernels import backend, film, parity, rank_mask, triton_mark
from bem_peft_cli.main import main
from tests.tiny_models import build

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")
if sys.platform.startswith("linux"):
    from bem_peft.kernels import triton_film, triton_kronecker, triton_rank_mask, triton_tiles
    from bem_peft.kernels import triton_head_gating as triton_gate
    from bem_peft.kernels.parity import DTYPES, Case, Deviation, cases, deviations, operators

CPU = torch.device("cpu")
SIZES = [*cases((1, 7), (5,), (1, 12)), *cases((33,), (65,), (3,))]


@pytest.fixture(autouse=True)
def torch_forms_after() -> Iterator[None]:
    yield
    use_kernels("torch")


def test_the_kernels_are_interpreted_here() -> None:
    assert triton_tiles.IS_INTERPRETED


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", SIZES, ids=lambda case: f"{case.name} {'x'.join(map(str, case.sizes.values()))}")
def test_output_and_gradients_are_at_most_twice_as_far_from_float64_as_torchs(case: Case, dtype: torch.dtype) -> None:
    """At odd sizes, on strided inputs with NaN around and between their numbers."""
    found = deviations(case, dtype, CPU)
    assert len(found) >= 4
    assert [(d.tensor, d.torch_error, d.error, d.allowed) for d in found if not d.is_kept] == []


def test_ties_fall_as_in_the_torch_form() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 1.0], [-1.0, -1.0, 3.0, -1.0]])
    y, z, b_t = torch.zeros(3, 4), torch.ones(3, 4), torch.eye(4)
    for k in (1, 2, 3, 4):
        out = triton_rank_mask.masked_update(y, z, None, logits, b_t, k, 1.0)
        assert torch.equal(out, rank_mask.k_hot_mask(logits, k))


def test_film_of_rows_that_are_zero_or_nearly() -> None:
    """Their RMS is taken as `SMALLEST_RMS`, which has no slope; nothing is infinite."""
    assert triton_film.SMALLEST_RMS == film.SMALLEST_RMS
    torch.manual_seed(0)
    y = torch.randn(3, 7) * torch.tensor([[0.0], [1e-8], [1.0]])
    u = torch.randn(3, 2) * torch.tensor([[1e-6], [1e-6], [1.0]])
    given = [y, u, torch.randn(2), 0.1 * torch.randn(2, 7), torch.randn(2, 7)]
    found = []
    for form, dtype in ((triton_film.film_update, torch.float32), (film.film_update, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in given]
        out = form(*inputs, True, True)
        out.backward(torch.linspace(-1.0, 1.0, 21, dtype=dtype).view(3, 7))
        found.append([out.detach().double(), *(t.grad.double() for t in inputs if t.grad is not None)])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)
    assert not found[0][0][0].any()


def first(operator: str) -> list[Any]:
    return next(case for case in SIZES if case.operator == operator and case.sizes["rows"] == 7).arguments(
        torch.float32, CPU
    )


OPERATORS = ["kronecker", "gate", "mask", "film"]


@pytest.mark.parametrize("name", OPERATORS)
def test_torchs_own_checks_pass(name: str) -> None:
    """Schema, fake tensors, autograd registration, compilation: `opcheck`; and `torch.vmap` over a batch."""
    torch.manual_seed(0)
    arguments = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in first(name)]
    inner = {
        "kronecker": triton_kronecker._update, "gate": triton_gate.gated_update, "mask": triton_rank_mask._update,
        "film": triton_film._update,
    }[name]  # fmt: skip
    given = list(arguments)
    if name == "mask":
        given[3] = given[3].expand(given[1].shape)
    torch.library.opcheck(
        inner, tuple(given), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    rows = {"kronecker": (0, 1), "gate": (0, 1, 2), "mask": (0, 1, 2, 3), "film": (0, 1)}[name]
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in given]
    batched = [torch.stack((a, a * 0.5)) if i in rows else a for i, a in enumerate(plain)]
    dims = tuple(0 if i in rows else None for i in range(len(plain)))
    form = operators()[name]
    found = torch.vmap(form, in_dims=dims)(*batched)
    for i in range(2):
        expected = form(*(b[i] if dim == 0 else b for b, dim in zip(batched, dims, strict=True)))
        torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_flops_are_those_of_the_torch_form(name: str) -> None:
    case = next(case for case in SIZES if case.operator == name and case.sizes["rows"] == 7)
    counts = []
    for form in (case.reference, operators()[name]):
        given = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in first(name)]
        with FlopCounterMode(display=False) as counted:
            form(*given).sum().backward()
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] > 0


CONFIGS = {
    "PT1": HeadGroupGatingConfig(num_groups=2, rank_per_group=3),
    "PT1 uneven": HeadGroupGatingConfig(num_groups=2, rank_per_group=[1, 3]),
    "PT2": DynamicRankMaskConfig(total_rank=8, active_rank=3),
    "PT2 a task": DynamicRankMaskConfig(total_rank=8, active_rank=3, mask_scope="task"),
    "PT3": KroneckerConfig(u_rank=3, v_rank=5),
    "PT4": ResidualFiLMConfig(gamma_dim=3, beta_dim=5),
    "PT4 spatial": ResidualFiLMConfig(mode="spatial"),
    "composite": CompositeConfig([HeadGroupGatingConfig(rank_per_group=4), KroneckerConfig(u_rank=2, v_rank=2)]),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_model_gives_the_same_logits_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "bem_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.arange(3, 13).view(2, 5)
    found: dict[str, Any] = {}
    for kernels in ("torch", "triton"):
        use_kernels(kernels)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with torch.no_grad():
            found[kernels] = (model.eval()(ids).logits, grads)
    torch.testing.assert_close(found["triton"][0], found["torch"][0], rtol=1e-4, atol=1e-5)
    assert found["triton"][1].keys() == found["torch"][1].keys()
    for key, grad in found["torch"][1].items():
        torch.testing.assert_close(found["triton"][1][key], grad, rtol=1e-3, atol=1e-6)


def test_triton_where_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels("triton")
    monkeypatch.setattr(triton_tiles, "IS_INTERPRETED", False)
    with pytest.raises(RuntimeError, match="Triton's kernels do not run on a cpu device"):
        backend.takes_triton(torch.zeros(1))
    assert not backend.takes_triton(torch.zeros(1, device="meta"))
    assert not backend.takes_triton(torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        use_kernels("triton")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A device that says that it is a GPU, with no mark yet; `auto` is chosen."""
    properties = types.SimpleNamespace(name="NVIDIA L4", major=8, minor=9)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    use_kernels("auto")
    return torch.device("cuda", 0)


def takes_triton(device: torch.device) -> bool:
    """What `auto` takes there, asked anew."""
    use_kernels("auto")
    with FakeTensorMode():
        return backend.takes_triton(torch.empty(2, 3, device=device))


def test_auto_takes_the_kernels_on_a_gpu_where_they_were_proved_right_and_nowhere_else(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not takes_triton(gpu)
    monkeypatch.setattr(parity, "proof", lambda device: (936, []))
    assert main(["kernels", "--prove"]) == 0
    out = capsys.readouterr().out
    assert "936 outputs and gradients compared" in out
    assert "auto on cuda:0   triton" in out
    assert takes_triton(gpu)
    assert backend.form(gpu) == "triton"
    with backend.torch_forms(), FakeTensorMode():
        assert not backend.takes_triton(torch.empty(1, device=gpu))
    with FakeTensorMode():
        assert not torch.vmap(lambda y: torch.tensor(backend.takes_triton(y)))(torch.empty(1, 2, device=gpu)).any()
    assert not backend.takes_triton(torch.empty(1)), "on a CPU"
    use_kernels("torch")
    with FakeTensorMode():
        assert not backend.takes_triton(torch.empty(1, device=gpu)), "the torch forms were chosen"


@pytest.mark.parametrize("changed", ["device", "version", "kernels", "damaged", "owner"])
def test_a_mark_of_something_else_is_not_believed(
    changed: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = triton_mark.versions()
    triton_mark.write_mark(gpu, {})
    assert takes_triton(gpu)
    if changed == "device":
        other = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: other)
    elif changed == "version":
        monkeypatch.setattr(triton_mark, "versions", lambda: {**versions, "triton": "9.9"})
    elif changed == "kernels":  # moved to where the mark of other sources would stand
        held = triton_mark.mark(gpu).read_text()
        monkeypatch.setattr(triton_mark, "versions", lambda: {**versions, "kernels": "0"})
        triton_mark.write_mark(gpu, {})
        triton_mark.mark(gpu).write_text(held)
        assert "is of another kernels" in str(triton_mark.obstacle(gpu))
    elif changed == "damaged":
        triton_mark.mark(gpu).write_text("{")
        assert "is broken" in str(triton_mark.obstacle(gpu))
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        os.chown(triton_mark.mark(gpu), 54321, -1)
        assert "belongs to another user" in str(triton_mark.obstacle(gpu))
    assert not takes_triton(gpu)


def test_kernels_that_are_wrong_get_no_mark_and_lose_the_one_they_had(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    triton_mark.write_mark(gpu, {})
    wrong = Deviation(SIZES[0], torch.bfloat16, "output", 1e-3, 1.0, 2e-3)
    monkeypatch.setattr(parity, "proof", lambda device: (936, [wrong]))
    assert main(["kernels", "--prove"]) == 1
    out = capsys.readouterr().out
    assert "torch.bfloat16, output: 1 from float64, 0.002 allowed" in out
    assert "not right on NVIDIA L4" in out
    assert not takes_triton(gpu)


def test_nothing_is_proved_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", "--prove"]) == 1
    assert "torch sees no CUDA or ROCm device" in capsys.readouterr().out


def test_the_proof_compares_every_operator_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def compared(case: Case, dtype: torch.dtype, device: torch.device) -> list[Deviation]:
        seen.add((case.operator, dtype))
        return [Deviation(case, dtype, "output", 1.0, 3.0 if case.name == "gate" else 1.0, 2.0)]

    monkeypatch.setattr(parity, "deviations", compared)
    count, broken = parity.proof(CPU)
    assert count > 100
    assert {d.case.operator for d in broken} == {"gate"}
    assert seen == {(name, dtype) for name in OPERATORS for dtype in DTYPES}


def test_the_gpu_benchmark_refuses_without_a_gpu_and_has_parity_before_times(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", Path(__file__).parents[2] / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA or ROCm device"):
        gpu.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "proof", lambda device: (1, deviations(SIZES[0], torch.float32, CPU)[:1]))
    with pytest.raises(SystemExit, match="1 parity cases fail, so nothing is timed"):
        gpu.main([])
    found = list(gpu.workloads([1, 256]))
    assert {(model, case.name, case.sizes["rows"], case.sizes["out"]) for model, case in found} == {
        (model, name, rows, width)
        for model, width in (("llama-3.2-1b", 2048), ("llama-3-8b", 4096))
        for name in ("kronecker", "gate", "mask", "film")
        for rows in (1, 256)
    }
    for name in OPERATORS:
        for is_training in (False, True):
            gpu.runner(operators()[name], first(name), is_training)()
