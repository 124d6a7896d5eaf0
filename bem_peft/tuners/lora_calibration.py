r"""What a LoRA loses that stands for an adapter: gates fixed where that loses least, errors at sites and in the logits.

    u_t = B (g_t * z_t),  z_t = A x_t;   g = argmin sum_t |B ((g - g_t) * z_t)|^2,   H g = c,
    H = B^T B * sum_t z_t z_t^T,   c_i = sum_j (B^T B)_ij sum_t z_ti z_tj g_tj

over the N real tokens of the calibration, ranks of one group added up; where H leaves g open, the mean gate. The error
of a site is (sum_t |u_t - B (g * z_t)|^2 / sum_t |u_t|^2)^1/2.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from bem_peft.tuners.base.layer import AdapterLinear
from bem_peft.tuners.base.low_rank import LowRankAdapter

Batch = dict[str, Any]
Factors = tuple[torch.Tensor, torch.Tensor]
Rows = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LogitsReport:
    """The whole model with the exported LoRA against the adapter, over the logits of the calibration's real tokens.

    relative_error: |exported - adapter| / |adapter - base|, the share of the adapter's effect that is lost; 0 where the
        adapter has none. largest_difference: of one logit.
    nll: of the next token (or of `labels`), nats, for "base", "adapter" and "exported"; empty where no call tells it.
    """

    tokens: int
    relative_error: float
    largest_difference: float
    nll: dict[str, float]

    @property
    def perplexity(self) -> dict[str, float]:
        """exp(nll)."""
        return {name: math.exp(value) for name, value in self.nll.items()}


class _Gates:
    """Sums over the tokens that reached one adapter."""

    def __init__(self, adapter: LowRankAdapter, gates: torch.Tensor) -> None:
        count = gates.shape[1]
        self.a, b = (factor.double() for factor in adapter.lora_factors(gates.new_ones(count)))
        each = [adapter.lora_factors(one)[0].ne(0).any(dim=1) for one in torch.eye(count, device=gates.device)]
        self.member = torch.stack(each, dim=1).double()  # (R, G): the group of each rank
        self.gram = b.t() @ b
        self.count, self.total = 0, gates.new_zeros(count, dtype=torch.float64)
        self.squares, self.gated = torch.zeros_like(self.gram), torch.zeros_like(self.gram)

    def add(self, x: torch.Tensor, gates: torch.Tensor) -> None:
        z, gates = x.double() @ self.a.t(), gates.double()
        self.count += x.shape[0]
        self.total += gates.sum(0)
        self.squares += z.t() @ z
        self.gated += z.t() @ (z * (gates @ self.member.t()))

    def best(self) -> torch.Tensor:
        """The constant gates that lose least, (G,)."""
        mean = self.total / self.count
        h = self.member.t() @ (self.gram * self.squares) @ self.member
        rest = self.member.t() @ (self.gram * self.gated).sum(1) - h @ mean
        step: torch.Tensor = torch.linalg.pinv(h, rtol=1e-10, hermitian=True) @ rest
        return (mean + step).float()


@torch.no_grad()
def best_gates(
    model: nn.Module, adapter_name: str, adapters: list[LowRankAdapter], batches: list[Batch]
) -> dict[LowRankAdapter, torch.Tensor]:
    """For each gated adapter its constant gates, (G,) or (R,). Raises ValueError where no token reached one."""
    sums: dict[LowRankAdapter, _Gates] = {}
    for batch in batches:
        tokens = RealTokens(model, batch)

        def see(
            adapter: LowRankAdapter, args: tuple[torch.Tensor, ...], out: torch.Tensor, tokens: RealTokens = tokens
        ) -> None:
            x = tokens.rows(adapter.site_name, args[0]).float()
            if x.shape[0]:
                gates = adapter.gate_values(x)
                sums.setdefault(adapter, _Gates(adapter, gates)).add(x, gates)

        with _alone(model, adapter_name), _hooked(adapters, see):
            model(**tokens.batch)
    for adapter in adapters:
        if adapter not in sums:
            raise ValueError(f"`calibration` brought no token to {adapter.site_name}: pass at least one batch.")
    return {adapter: found.best() for adapter, found in sums.items()}


@torch.no_grad()
def measure(
    model: nn.Module,
    adapter_name: str,
    gated: dict[LowRankAdapter, Factors],
    exported: dict[AdapterLinear, Factors],
    batches: list[Batch],
) -> tuple[dict[str, float], LogitsReport | None]:
    """The relative error of each gated site, and that of the logits, for A, s B of adapters and of layers."""
    squares: dict[LowRankAdapter, list[float]] = {adapter: [0.0, 0.0] for adapter in gated}
    seen = _Logits()
    for batch in batches:
        tokens = RealTokens(model, batch)

        def see(
            adapter: LowRankAdapter, args: tuple[torch.Tensor, ...], out: torch.Tensor, tokens: RealTokens = tokens
        ) -> None:
            x, y, new = (tokens.rows(adapter.site_name, t).double() for t in (args[0], args[1], out))
            a, b = (factor.double() for factor in gated[adapter])
            squares[adapter][0] += float((new - y - x @ a.t() @ b.t()).square().sum())
            squares[adapter][1] += float((new - y).square().sum())

        with _alone(model, adapter_name, is_disabled=True):
            base = model(**tokens.batch)
        with _alone(model, adapter_name):
            with _hooked(list(gated), see):
                adapted = model(**tokens.batch)
            handles = [layer.register_forward_hook(partial(_as_lora, *pair)) for layer, pair in exported.items()]
            try:
                approximate = model(**tokens.batch)
            finally:
                for handle in handles:
                    handle.remove()
        if getattr(adapted, "logits", None) is not None:
            seen.add(tokens, {"base": base.logits, "adapter": adapted.logits, "exported": approximate.logits})
    errors = {
        adapter.site_name: math.sqrt(lost / whole) if whole > 0 else 0.0 for adapter, (lost, whole) in squares.items()
    }
    return errors, seen.report()


def _as_lora(
    a: torch.Tensor, b: torch.Tensor, layer: AdapterLinear, args: tuple[torch.Tensor, ...], out: object
) -> torch.Tensor:
    """What PEFT's LoRA returns in place of `layer`, its weights in float32."""
    y: torch.Tensor = layer.base_layer(*args)
    update = args[0].float() @ a.float().t() @ b.float().t()
    return (y + update).to(y.dtype)


@dataclass
class _Logits:
    """Sums over real tokens."""

    tokens: int = 0
    lost: float = 0.0
    effect: float = 0.0
    largest: float = 0.0
    counted: int = 0
    nll: dict[str, float] = field(default_factory=dict)

    def add(self, tokens: RealTokens, logits: dict[str, torch.Tensor]) -> None:
        rows = {name: tokens.output_rows(value).double() for name, value in logits.items()}
        difference = rows["exported"] - rows["adapter"]
        self.tokens += difference.shape[0]
        self.lost += float(difference.square().sum())
        self.effect += float((rows["adapter"] - rows["base"]).square().sum())
        self.largest = max(self.largest, float(difference.abs().max()) if difference.numel() else 0.0)
        for name, value in logits.items():
            found = tokens.nll(value)
            if found is not None:
                self.nll[name] = self.nll.get(name, 0.0) + found[0]
                self.counted += found[1] if name == "base" else 0

    def report(self) -> LogitsReport | None:
        if not self.tokens:
            return None
        error = math.sqrt(self.lost / self.effect) if self.effect > 0 else 0.0
        nll = {name: total / self.counted for name, total in self.nll.items()} if self.counted else {}
        return LogitsReport(self.tokens, error, self.largest, nll)


class RealTokens:
    """Which rows of a call's tensors belong to real tokens; `batch` is the call.

    Raises:
        ValueError: a mask is not (batch, tokens), so that it does not tell.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.batch = batch
        get_base: Callable[[], Any] | None = getattr(model, "get_base_model", None)
        base = model if get_base is None else get_base()
        self.is_seq2seq = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        mask = self._mask("attention_mask")
        self.masks = {"encoder": mask}
        if self.is_seq2seq:
            target = self._mask("decoder_attention_mask")
            labels = batch.get("labels")
            if target is None and isinstance(labels, torch.Tensor) and batch.get("decoder_input_ids") is None:
                target = labels != -100
            self.masks["decoder"] = target
        elif mask is not None and not mask[:, 0].all() and takes_positions(base) and batch.get("position_ids") is None:
            # else padding on the left would move the positions
            self.batch = {**batch, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}

    def _mask(self, name: str) -> torch.Tensor | None:
        mask = self.batch.get(name)
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise ValueError(
                f"`calibration`: `{name}` must be a tensor (batch, tokens), 1 at real tokens, is "
                f"{tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__}."
            )
        return mask != 0

    def rows(self, site: str, tensor: torch.Tensor) -> torch.Tensor:
        """The real rows of what a site sees, (..., C) -> (N, C)."""
        return self._real("decoder" if self.is_seq2seq and "decoder" in site.split(".") else "encoder", site, tensor)

    def output_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """The real rows of the model's logits."""
        return self._real("decoder" if self.is_seq2seq else "encoder", "the logits", logits)

    def _real(self, stack: str, where: str, tensor: torch.Tensor) -> torch.Tensor:
        flat, mask = tensor.reshape(-1, tensor.shape[-1]), self.masks[stack]
        if mask is None or bool(mask.all()):
            return flat
        if flat.shape[0] != mask.numel():
            raise ValueError(
                f"`calibration` has padding, and {where} has {flat.shape[0]} rows for {mask.numel()} tokens, so that "
                "the padding cannot be told (rows of experts, for instance): pass batches without padding."
            )
        return flat[mask.flatten().to(flat.device)]

    def nll(self, logits: torch.Tensor) -> tuple[float, int] | None:
        """Sum of the negative log-likelihoods of the labels, or of the next tokens, and their number.

        A token counts where it is real and stands behind a real one.
        """
        given = self.batch.get("labels" if self.is_seq2seq or "labels" in self.batch else "input_ids")
        if not isinstance(given, torch.Tensor):
            return None
        labels, mask = given, self.masks["encoder"]
        if not self.is_seq2seq:
            logits, labels = logits[:, :-1], labels[:, 1:]
            if mask is not None:
                labels = labels.masked_fill(~(mask[:, 1:] & mask[:, :-1]).to(labels.device), -100)
        labels = labels.flatten().to(logits.device)
        total = nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels, ignore_index=-100, reduction="sum")
        return float(total), int((labels != -100).sum())


def takes_positions(model: nn.Module) -> bool:
    """Whether the forward of `model` has an argument `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


@contextmanager
def _hooked(adapters: list[LowRankAdapter], see: Callable[..., None]) -> Iterator[None]:
    handles = [adapter.register_forward_hook(see) for adapter in adapters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _alone(model: nn.Module, adapter_name: str, is_disabled: bool = False) -> Iterator[None]:
    """The model in evaluation, with one adapter, or none, on; as it was, afterwards."""
    training = {module: module.training for module in model.modules()}
    before: list[tuple[Any, dict[str, Any]]] = []
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            names = ("_active_adapter", "_disable_adapters")
            before.append((module, {name: getattr(module, name) for name in names}))
            module.__dict__["_disable_adapters"] = is_disabled or isinstance(module, AuxiliaryTrainingWrapper)
            if isinstance(module, BaseTunerLayer):
                module.__dict__["_active_adapter"] = [adapter_name]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for module, values in before:
            module.__dict__.update(values)
