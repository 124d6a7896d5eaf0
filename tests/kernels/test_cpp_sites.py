"""The operator past the dispatcher, in a scope that keeps weights: it steps aside for what must see a call."""

from __future__ import annotations

import copy
import gc
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bem_peft import use_kernels
from bem_peft.kept import kept_of, kept_weights
from bem_peft.kernels import cpp
from bem_peft.tuners.base.adapter import Adapter
from bem_peft.tuners.base.forms import SITE
from tests.kernels.test_cpp_operators import CASES, made, pytestmark, torch_form_after

__all__ = ["pytestmark", "torch_form_after"]
NAMES = ["PT1", "PT2", "PT2 a task", "PT3", "PT4"]


SCOPES = ExitStack()


@pytest.fixture(autouse=True)
def _scopes() -> Iterator[None]:
    with SCOPES:
        yield


def ready(name: str) -> tuple[Adapter, torch.Tensor, torch.Tensor]:
    """An adapter whose next call goes past the dispatcher."""
    use_kernels("cpp")
    adapter = made(name, CASES[name][2][0], 40)
    SCOPES.enter_context(kept_weights(adapter))
    x, y = torch.randn(2, 3, adapter.in_features), torch.randn(2, 3, 40)
    with torch.no_grad():
        adapter(x, y)
    assert SITE in kept_of(adapter)
    return adapter, x, y


def is_past(adapter: Adapter, x: torch.Tensor, y: torch.Tensor) -> bool:
    with torch.no_grad():
        return cpp.run_site(kept_of(adapter)[SITE], adapter._parameters, x, y, False) is not None


def expected(adapter: Adapter, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    fresh = copy.deepcopy(adapter)
    use_kernels("torch")
    with torch.no_grad():
        out: torch.Tensor = fresh(x, y)
    use_kernels("cpp")
    return out


def in_place(adapter: Adapter, name: str) -> None:
    adapter._parameters[name].mul_(1.5)  # type: ignore[union-attr]


def in_data(adapter: Adapter, name: str) -> None:
    adapter._parameters[name].data = adapter._parameters[name].data * 1.5  # type: ignore[union-attr]


def replaced(adapter: Adapter, name: str) -> None:
    setattr(adapter, name, nn.Parameter(adapter._parameters[name] * 1.5))  # type: ignore[operator]


def assigned(adapter: Adapter, name: str) -> None:
    state = {key: value * 1.5 if key == name else value for key, value in adapter.state_dict().items()}
    adapter.load_state_dict(state, assign=True)


def with_another_dict(adapter: Adapter, name: str) -> None:
    adapter._parameters = dict(adapter._parameters)
    in_place(adapter, name)


@pytest.mark.parametrize("change", [in_place, in_data, replaced, assigned, with_another_dict])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_changed_master_is_seen(name: str, change: Callable[[Adapter, str], None]) -> None:
    for parameter in made(name, CASES[name][2][0], 40)._parameters:
        adapter, x, y = ready(name)
        assert is_past(adapter, x, y)
        before = adapter(x, y)
        with torch.no_grad():
            change(adapter, parameter)
            assert not is_past(adapter, x, y)
            after = adapter(x, y)
            assert is_past(adapter, x, y), "and the next call goes past the dispatcher again"
            torch.testing.assert_close(adapter(x, y), after, rtol=0, atol=0)
        torch.testing.assert_close(after, expected(adapter, x, y), rtol=1e-4, atol=1e-4)
        del before


def test_functional_call_is_seen() -> None:
    adapter, x, y = ready("PT3")
    other = {name: parameter.detach() * 1.5 for name, parameter in adapter.named_parameters()}
    with torch.no_grad():
        plain = adapter(x, y)
        found = torch.func.functional_call(adapter, other, (x, y))
        torch.testing.assert_close(found - y, (plain - y) * 1.5**3, rtol=1e-3, atol=1e-4)
        assert torch.equal(adapter(x, y), plain)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_steps_aside(name: str) -> None:
    adapter, x, y = ready(name)
    operator = {"PT1": "head_gating", "PT2": "rank_mask", "PT3": "kronecker", "PT4": "film"}[name[:3]]
    with torch.no_grad():
        whole = adapter(x, y)
        with FlopCounterMode(display=False) as counted:
            adapter(x, y)
        assert counted.get_total_flops() > 0
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            adapter(x, y)
        assert f"bem_peft_cpu::{operator}" in {event.name for event in seen.events()}
        assert not is_past(adapter, x.as_subclass(Subclass), y)
        assert not is_past(adapter, x, y.double())
        assert not is_past(adapter, x.to("meta"), y.to("meta"))
        assert torch.equal(adapter(x.double(), y), whole), "x comes in the dtype of y"
        rows = torch.func.vmap(lambda a, b: adapter(a, b))(x, y)
        torch.testing.assert_close(rows, whole, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            assert torch.equal(adapter(x, y), whole)
        overwritten = y.clone()
        assert adapter.forward(x, overwritten, True).data_ptr() == overwritten.data_ptr()
        assert torch.equal(overwritten, whole)
        turned = y.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(adapter.forward(x, turned, True), whole)
        assert torch.equal(turned, y), "what is not contiguous is not written into"
        use_kernels("torch")
        torch.testing.assert_close(adapter(x, y), whole, rtol=1e-4, atol=1e-4)
    use_kernels("cpp")
    assert adapter(x.requires_grad_(), y).requires_grad
    masks: list[torch.Tensor] = []
    adapter.observer = masks
    with torch.no_grad():
        adapter(x, y)
    assert bool(masks) == name.startswith("PT2")


def test_copies_have_a_site_of_their_own() -> None:
    adapter, x, y = ready("PT3")
    stream = io.BytesIO()
    torch.save(adapter, stream)
    stream.seek(0)
    for other in (copy.deepcopy(adapter), torch.load(stream, weights_only=False)):
        assert kept_of(other) is None
        with torch.no_grad():
            other.B.mul_(2.0)
            torch.testing.assert_close(other(x, y) - y, (adapter(x, y) - y) * 2.0)


def test_a_site_keeps_nothing_alive_but_its_masters() -> None:
    adapter, x, y = ready("PT4")
    watched: list[Any] = [adapter.gamma, adapter._parameters, next(iter(adapter._parameters))]
    with torch.no_grad():
        adapter(x, y)
        gc.collect()
        counts = [sys.getrefcount(object_) for object_ in watched]
        for _ in range(100):
            del kept_of(adapter)[SITE]
            adapter(x, y)
            for _ in range(3):
                adapter(x, y)
        gc.collect()
    assert [sys.getrefcount(object_) for object_ in watched] == counts


def test_a_site_that_does_not_fit_its_operator_is_named() -> None:
    adapter, _, _ = ready("PT3")
    with pytest.raises(RuntimeError, match="a site of film with 1 weights and 0 options does not fit"):
        cpp.make_site("film", adapter._parameters, (torch.zeros(1),), (), torch.float32)
    with pytest.raises(RuntimeError, match="no operator is named fly"):
        cpp.make_site("fly", adapter._parameters, (), (), torch.float32)
