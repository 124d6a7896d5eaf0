"""A budget, and whether a model keeps it: per quantity the measured value, the anchor's, the bounds and a verdict.

    budget = BudgetConstraints.from_anchor(base, LoraConfig(r=8, target_modules=["o_proj", "down_proj"]))
    report = BudgetValidator(budget).validate_all(get_peft_model(base, KroneckerConfig()))

Works for every PEFT method. A quantity that cannot be measured fails; it never passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from bem_peft.budget.copies import adapted_copy, at_sites_of, unadapted_copy
from bem_peft.budget.fake_run import mode_of
from bem_peft.budget.flops import count_flops
from bem_peft.budget.latency import compare_latency, why_inconclusive
from bem_peft.budget.memory import count_memory
from bem_peft.budget.parameters import count_parameters
from bem_peft.budget.report import BudgetLine, BudgetReport, judged

QUANTITIES = ("params", "flops", "memory", "stored", "latency")
UNITS = {"params": "parameters", "flops": "FLOPs a token", "memory": "bytes", "stored": "bytes", "latency": "ratio"}
SCOPES = ("adapter", "total")

# base and adapter parameters of the stack that the performance track started from
PRESETS: dict[str, dict[str, int]] = {"bem-v1.3": {"base": 124_439_808, "adapter": 524_288}}


@dataclass(frozen=True)
class BudgetConstraints:
    """What an adapter may cost, each quantity to within `tolerance_ratio` of the number given; None: not constrained.

    Args:
        params: trainable parameters ("total": with the base's).
        flops: forward and backward FLOPs a token, of the adapter ("total": with the base's).
        memory: bytes that the adapter adds to the peak of a training step ("total": the peak).
        stored: bytes of the saved adapter.
        anchor: the anchor's model, which latency is measured against.
        inputs: one batch, keyword arguments; what FLOPs, memory and latency are measured on.
        tolerance_ratio: 0.05 is 5 %.
        scope: "adapter" or "total".

    Raises:
        ValueError: a number is not positive, an unknown scope, or nothing is constrained.
    """

    params: float | None = None
    flops: float | None = None
    memory: float | None = None
    stored: float | None = None
    anchor: nn.Module | None = field(default=None, repr=False, compare=False)
    inputs: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    tolerance_ratio: float = 0.05
    scope: str = "adapter"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"`scope` = {self.scope!r}: must be one of {', '.join(SCOPES)}.")
        check_positive("tolerance_ratio", self.tolerance_ratio)
        if self.tolerance_ratio >= 1:
            raise ValueError(f"`tolerance_ratio` = {self.tolerance_ratio}: is a ratio, below 1; 0.05 stands for 5 %.")
        for name in ("params", "flops", "memory", "stored"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if not self.quantities:
            raise ValueError("nothing is constrained: give at least one of params, flops, memory, stored or anchor.")

    @property
    def quantities(self) -> tuple[str, ...]:
        """The constrained ones, in the order of `QUANTITIES`."""
        given = [name for name in QUANTITIES[:-1] if getattr(self, name) is not None]
        return (*given, "latency") if self.anchor is not None else tuple(given)

    @classmethod
    def from_anchor(
        cls,
        model: nn.Module,
        config: PeftConfig,
        *,
        quantities: Sequence[str] = ("params", "flops"),
        inputs: Mapping[str, Any] | None = None,
        tolerance_ratio: float = 0.05,
        scope: str = "adapter",
    ) -> BudgetConstraints:
        """The budget of the adapter that `config` would make on `model`, a base model (weights are shared, not copied).

        Raises:
            ValueError: `model` has an adapter already, or a quantity of the anchor is unknown or zero.
        """
        unknown = sorted(set(quantities) - set(QUANTITIES))
        if unknown or not quantities:
            raise ValueError(f"`quantities` = {list(quantities)}: must be a choice of {', '.join(QUANTITIES)}.")
        inputs = example_inputs(model) if inputs is None else inputs
        anchor = adapted_copy(model, config)
        measured = {name: _measure(name, anchor, inputs, scope) for name in quantities if name != "latency"}
        for name, value in measured.items():
            if value == 0:
                raise ValueError(f"the anchor {type(config).__name__} counts 0 {UNITS[name]}: take `{name}` out.")
        return cls(
            **measured,
            anchor=anchor if "latency" in quantities else None,
            inputs=inputs,
            tolerance_ratio=tolerance_ratio,
            scope=scope,
        )

    @classmethod
    def from_preset(cls, name: str, *, tolerance_ratio: float = 0.05, scope: str = "adapter") -> BudgetConstraints:
        """A named budget of parameters; "bem-v1.3": 124,439,808 of the base and 524,288 of the adapter."""
        if name not in PRESETS:
            raise ValueError(f"`name` = {name!r}: must be one of {', '.join(PRESETS)}.")
        numbers = PRESETS[name]
        params = numbers["adapter"] + (numbers["base"] if scope == "total" else 0)
        return cls(params=params, tolerance_ratio=tolerance_ratio, scope=scope)


class BudgetValidator:
    """Checks models against one `BudgetConstraints`."""

    def __init__(self, constraints: BudgetConstraints) -> None:
        self.constraints = constraints

    def validate_parameters(self, model: nn.Module) -> BudgetLine:
        """Exact: logical parameters, also under 4-bit, FSDP2 and ZeRO-3."""
        return self._line("params", model, "exact: counted")

    def validate_stored(self, model: nn.Module) -> BudgetLine:
        """Exact: bytes of the tensors that `save_pretrained` writes."""
        return self._line("stored", model, "exact: tensors of the state dict")

    def validate_flops(self, model: nn.Module) -> BudgetLine:
        """Exact for the operators that have a formula: forward and backward, a token."""
        return self._line("flops", model, "exact: products counted by operator, forward and backward")

    def validate_memory(self, model: nn.Module) -> BudgetLine:
        """Exact: live storages of one forward and backward pass."""
        return self._line("memory", model, "exact: live storages of a training step, without the optimizer's")

    def validate_latency(self, model: nn.Module, *, blocks: int = 50) -> BudgetLine:
        """Measured: interleaved forward passes against the anchor's model."""
        limits = self.constraints
        anchor = limits.anchor
        if anchor is None:
            raise ValueError(
                "latency is not constrained: use BudgetConstraints.from_anchor(quantities=[..., 'latency'])"
            )
        inputs = self._inputs(model)
        upper = 1.0 + limits.tolerance_ratio
        with mode_of(anchor, False), mode_of(model, False), torch.inference_mode():
            found = compare_latency(
                lambda: anchor(**inputs),
                lambda: model(**inputs),
                blocks=blocks,
                tolerance_ratio=limits.tolerance_ratio,
            )
        how = (
            f"measured: {found.blocks} ABBA blocks, ratio {found.ratio:.3f} [{found.ratio_low:.3f}, "
            f"{found.ratio_high:.3f}], A/A [{found.noise_low:.3f}, {found.noise_high:.3f}], "
            f"anchor {found.anchor_ms:.1f} ms"
        )
        if found.verdict == "INCONCLUSIVE":
            bounds = found.ratio_low, found.ratio_high, found.noise_low, found.noise_high
            how += f"; inconclusive: {why_inconclusive(*bounds, limits.tolerance_ratio)}"
        return BudgetLine("latency", "ratio", found.ratio, 1.0, found.ratio - 1, 1 / upper, upper, found.verdict, how)

    def validate_all(self, model: nn.Module) -> BudgetReport:
        """Every constrained quantity; one that cannot be measured is a FAIL with the reason."""
        checks: dict[str, Callable[[nn.Module], BudgetLine]] = {
            "params": self.validate_parameters,
            "flops": self.validate_flops,
            "memory": self.validate_memory,
            "stored": self.validate_stored,
            "latency": self.validate_latency,
        }
        lines = tuple(checks[name](model) for name in self.constraints.quantities)
        return BudgetReport(lines, self.constraints.scope, self.constraints.tolerance_ratio)

    def _inputs(self, model: nn.Module) -> Mapping[str, Any]:
        return example_inputs(model) if self.constraints.inputs is None else self.constraints.inputs

    def _line(self, quantity: str, model: nn.Module, how: str) -> BudgetLine:
        anchor = getattr(self.constraints, quantity)
        if anchor is None:
            raise ValueError(f"`{quantity}` is not constrained by these BudgetConstraints.")
        measured: float | None = None
        try:
            measured = _measure(quantity, model, self._inputs(model), self.constraints.scope)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            how = f"not measured: {error}"
        return judged(quantity, UNITS[quantity], measured, anchor, self.constraints.tolerance_ratio, how)


def check_positive(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` = {value!r}: must be a number.")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"`{name}` = {value!r}: must be finite and above 0.")


def budget_of(
    model: nn.Module, anchor: PeftConfig, quantities: Sequence[str] = ("params", "flops"), tolerance_ratio: float = 0.05
) -> BudgetConstraints:
    """The budget of `anchor` on the base of the adapted `model`; without target_modules it stands at the same sites.

    Raises:
        ValueError: `model` is no PeftModel.
    """
    if not isinstance(model, PeftModel):
        raise ValueError("a budget by an anchor needs a PeftModel: call get_peft_model first, or pass `budget`.")
    anchor = at_sites_of(anchor, lambda: model)
    return BudgetConstraints.from_anchor(
        unadapted_copy(model), anchor, quantities=quantities, tolerance_ratio=tolerance_ratio
    )


def example_inputs(model: nn.Module, batch: int = 1, tokens: int = 128) -> dict[str, torch.Tensor]:
    """A batch for measuring: token ids (batch, tokens), with labels where the model is an encoder-decoder."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no `config`: give `inputs`, the keyword arguments of one batch.")
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    ids = torch.ones(batch, tokens, dtype=torch.long, device=device)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "labels": ids.clone()}
    return {"input_ids": ids}


def _measure(quantity: str, model: nn.Module, inputs: Mapping[str, Any], scope: str) -> float:
    is_total = scope == "total"
    if quantity in ("params", "stored"):
        count = count_parameters(model)
        if quantity == "stored":
            return count.stored_bytes
        return count.total if is_total else count.trainable
    if quantity == "flops":
        flops = count_flops(model, inputs)
        return flops.total_per_token if is_total else flops.adapter_per_token
    memory = count_memory(model, inputs)
    return memory.peak_bytes if is_total else memory.adapter_bytes
