"""Each invariant, broken on purpose once: the check must notice."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bem_peft import use_kernels
from bem_peft.tuners.base.layer import AdapterLinear
from bem_peft.tuners.pt3_kronecker import KroneckerAdapter, KroneckerModel
from tests.contract import invariants


@pytest.fixture(autouse=True)
def torch_forms() -> None:
    """What is broken here is the formula in torch, which the C++ operators do not read."""
    use_kernels("torch")


Break = Callable[[pytest.MonkeyPatch], None]
TRANSFORM = KroneckerAdapter.transform


def transform(change: Callable[..., torch.Tensor]) -> Break:
    """Replace PT3's formula by `change(adapter, x, y, result)`."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        def broken(self: Any, x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            return change(self, x, y, TRANSFORM(self, x, y, *weights))

        patch.setattr(KroneckerAdapter, "transform", broken)

    return apply


def ignore_disable(patch: pytest.MonkeyPatch) -> None:
    forward = AdapterLinear.forward

    def broken(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        was, self._disable_adapters = self._disable_adapters, False
        try:
            return forward(self, x, *args, **kwargs)
        finally:
            self._disable_adapters = was

    patch.setattr(AdapterLinear, "forward", broken)


def unsaved_state(patch: pytest.MonkeyPatch) -> None:
    init = KroneckerAdapter.__init__

    def broken(self: Any, *args: Any) -> None:
        init(self, *args)
        self.scaling = random.uniform(1.0, 2.0)

    patch.setattr(KroneckerAdapter, "__init__", broken)


def half_delta(patch: pytest.MonkeyPatch) -> None:
    delta = KroneckerAdapter.delta_weight
    patch.setattr(KroneckerAdapter, "delta_weight", lambda self: delta(self) * 0.5)


def half_precision_masters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KroneckerModel, "_cast_adapter_dtype", lambda *args, **kwargs: None)


def writes_base(patch: pytest.MonkeyPatch) -> None:
    forward = AdapterLinear.forward

    def broken(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            self.get_base_layer().weight.add_(1e-3)
        return forward(self, x, *args, **kwargs)

    patch.setattr(AdapterLinear, "forward", broken)


class Counter:
    calls = 0


def changes_with_each_call(self: Any, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    Counter.calls += 1
    return y + (out - y) * (1.0 + Counter.calls)


# the first token of the batch leaks into every other one, and so would a later one: pooling on a causal path
pooled = transform(lambda self, x, y, out: out + x.mean() * 0.1)
BREAKS: dict[str, tuple[Callable[..., None], Break]] = {
    "I1 fresh is not the identity": (invariants.i1_fresh_is_base, transform(lambda self, x, y, out: out + 1e-3)),
    "I1 disabling does nothing": (invariants.i1_fresh_is_base, ignore_disable),
    "I2 pools over the sequence": (invariants.i2_causal, pooled),
    "I3 depends on the length of the call": (
        invariants.i3_cached_decoding,
        transform(lambda self, x, y, out: y + (out - y) * x.shape[0]),
    ),
    "I3 static cache": (invariants.i3_static_cache, transform(lambda self, x, y, out: y + (out - y) * x.shape[0])),
    "I3 generation": (invariants.i3_generate, transform(lambda self, x, y, out: out.roll(x.shape[0], dims=1))),
    "I4 pools over the batch": (invariants.i4_batch_equals_alone, pooled),
    "I5 recomputation sees another state": (invariants.i5_gradient_checkpointing, transform(changes_with_each_call)),
    "I5 depends on the batch": (
        invariants.i5_accumulation_and_two_forwards,
        transform(lambda self, x, y, out: y + (out - y) * x.shape[0]),
    ),
    "I6 state that is not saved": (invariants.i6_saved_and_loaded, unsaved_state),
    "I8 merges half of the update": (invariants.i8_merged_equals_unmerged, half_delta),
    "I11 masters in half precision": (invariants.i11_dtypes, half_precision_masters),
    "I12 writes the base weight": (invariants.i12_only_sites_touched, writes_base),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_invariant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check, break_it = BREAKS[name]
    extra = (tmp_path,) if check is invariants.i6_saved_and_loaded else ()
    dtype = torch.bfloat16 if name.startswith("I11") else torch.float32
    check("kronecker", "llama", dtype, *extra)  # it holds
    break_it(monkeypatch)
    with pytest.raises((AssertionError, torch.utils.checkpoint.CheckpointError)):
        check("kronecker", "llama", dtype, *extra)


def test_graph_break_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    transform(lambda self, x, y, out: out * (1.0 if x.sum().item() > 0 else 2.0))(monkeypatch)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        invariants.i10_compiles_whole("kronecker", "llama", torch.float32)


def test_recompilation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    transform(changes_with_each_call)(monkeypatch)
    with pytest.raises((torch._dynamo.exc.RecompileError, AssertionError)):
        invariants.i10_compiles_whole("kronecker", "llama", torch.float32)
