r"""How much a penalty counts in one call of the model:  the gradient of (loss + w p), whatever scales the loss later.

a, the factor that the loss gets on its way to the gradient (accumulation, float16 scaling, the number of processes), is
read from the graph: it is the gradient of the model's own loss. w is the share of the call in the optimizer step: its
share of `num_items_in_batch` where the call gets that number, and then sequences count by their labels; otherwise 1,
and every sequence counts alike.

A loss that somebody else computes from the logits (DPO, label smoothing) leaves no such trace. Then a is what the
training loop is known to do: 1 / accumulation steps, times the float16 scale, as accelerate's shared state and
transformers' Trainer tell (`LoopScale`). A call's penalty depends on that call alone: two calls whose losses are added
carry two, as two losses with their penalties would, and a forward pass that is never used changes nothing.

A compiled layer cannot read a graph that is yet to be built. Its penalties wait for the model's own loss, L, which
becomes L + (w p - c), c the number w p is: L to the last bit, and the gradient a w with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Scaler(Protocol):
    """A GradScaler, torch's or another one."""

    def get_scale(self) -> float: ...


@dataclass(frozen=True)
class Sequences:
    """Which sequence each of N tokens belongs to.

    index: (N,), in [0, S). real: (N,) float, 1 at real tokens. weight: (S,), sums to 1; 0 where there is no sequence.
    """

    index: torch.Tensor
    real: torch.Tensor
    weight: torch.Tensor

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """values (N, ...) summed over the real tokens of each sequence, (S, ...)."""
        real = self.real.view(-1, *(1,) * (values.dim() - 1)).to(values.dtype)
        total = values.new_zeros(self.weight.shape[0], *values.shape[1:])
        return total.index_add(0, self.index, values * real)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """values (N, C) averaged over the real tokens of each sequence, (S, C)."""
        count = torch.zeros_like(self.weight).index_add(0, self.index, self.real)
        return self.sums(values) / count.clamp_min(1.0).unsqueeze(1).to(values.dtype)

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """One value a sequence, (S,), averaged by weight."""
        return (values * self.weight.to(values.dtype)).sum()


def sequences_of(
    shape: torch.Size,
    device: torch.device,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    items: torch.Tensor | None,
) -> Sequences:
    """The sequences of a batch of `shape` (B, T).

    Args:
        mask: (B, T), 1 at real tokens; None: all are.
        position_ids: (B, T) or (1, T); where they do not go on by one, a packed sequence starts. None: a row is one.
        items: what sequences count by, (B, T) a token or (B,) a row; None: they count alike.
    """
    tokens = shape.numel()
    real = torch.ones(shape, device=device) if mask is None else (mask.to(device) != 0).float()
    if position_ids is None:
        index = torch.arange(shape[0], device=device).unsqueeze(1).expand(shape)
        slots = shape[0]
    else:
        positions = position_ids.to(device).expand(shape)
        starts = torch.ones(shape, dtype=torch.long, device=device)
        starts[:, 1:] = ((positions[:, 1:] != positions[:, :-1] + 1) & (real[:, 1:] > 0)).long()
        index = starts.flatten().cumsum(0).view(shape) - 1
        slots = tokens  # as many as there could be: counting them would make the host wait
    index, real = index.reshape(tokens), real.reshape(tokens)
    counts = torch.zeros(slots, device=device)
    if items is None:
        weight = (counts.index_add(0, index, real) > 0).float()
    elif items.dim() == 1:
        weight = counts.index_add(0, index.view(shape)[:, 0], items.to(device))
    else:
        weight = counts.index_add(0, index, items.to(device).reshape(tokens))
    return Sequences(index, real, weight / weight.sum().clamp_min(1.0))


@dataclass
class LoopScale:
    """What the training loop does to a loss that it computes itself; steps None: as accelerate's state says."""

    accumulation_steps: Callable[[], int] | None = None
    scaler: Scaler | None = None

    def factor(self, in_float16: bool) -> float:
        """1 / accumulation steps, times the float16 scale.

        Raises:
            RuntimeError: the forward pass ran under float16 autocast and nobody told the scale of the loss.
        """
        from accelerate.state import GradientState

        if self.accumulation_steps is not None:
            steps = self.accumulation_steps()
        else:
            steps = GradientState().num_steps if GradientState._shared_state else 1
        if self.scaler is None and in_float16:
            raise RuntimeError(
                "a penalty cannot tell the float16 scale of a loss that is not the model's own: use PTTrainer or "
                "transformers' Trainer, or call bem_peft.set_loss_scale(model, scaler=...) before training."
            )
        return (1.0 if self.scaler is None else float(self.scaler.get_scale())) / steps


Entry = tuple[str, str, torch.Tensor, torch.Tensor]  # a penalty: its name, its site, its value, and times its strength


@dataclass(eq=False)
class PenaltyCall:
    """One forward pass in training: its sequences, and what its penalties are multiplied by."""

    stacks: Mapping[str, Sequences | str | None] = field(default_factory=dict)  # a str: why there are none
    in_float16: bool = False  # the forward pass runs under float16 autocast
    step_share: torch.Tensor | None = None  # share of the optimizer step, where the call knows it
    loop: LoopScale = field(default_factory=LoopScale)
    loss_gradient: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    owners: dict[object, object] = field(default_factory=dict)
    compiled: list[Entry] = field(default_factory=list)  # penalties of compiled layers, which wait for the loss
    is_over: bool = False  # what runs now is a block under gradient checkpointing, again

    def add_compiled(self, name: str, site: str, value: torch.Tensor, weighted: torch.Tensor, owner: object) -> None:
        """A penalty of a compiled layer; that of an `owner` counts once."""
        if self.is_over:
            return
        if owner is None or owner not in self.owners:
            self.compiled.append((name, site, value, weighted))
        if owner is not None:
            self.owners[owner] = None

    def with_compiled(self, loss: torch.Tensor) -> torch.Tensor:
        """loss, whose gradient is also that of the compiled penalties, w of them."""
        total = torch.stack([weighted.to(loss) for _, _, _, weighted in self.compiled]).sum()
        if self.step_share is not None:
            total = total * self.step_share.to(total)
        return loss + (total - total.detach())

    def receive_loss_gradient(self, gradient: torch.Tensor) -> None:
        """The hook on the model's own loss; it runs before the backward pass of any layer."""
        self.loss_gradient = gradient.detach().float()
        self.factor = None  # another backward pass of the same graph

    def factor_for(self, node: object, owner: object) -> torch.Tensor:
        """a w for one carrier in the backward pass; 0 for a parameter's penalty that another layer call has carried."""
        if owner is not None and self.owners.setdefault(owner, node) is not node:
            return torch.zeros((), device="cpu")  # numbers of no dimension go with tensors of any device
        if self.factor is None:
            self.factor = self._settle()
        return self.factor

    def _settle(self) -> torch.Tensor:
        if self.loss_gradient is None:
            return torch.tensor(self.loop.factor(self.in_float16), device="cpu")
        share = torch.ones((), device="cpu") if self.step_share is None else self.step_share
        return self.loss_gradient * share.to(self.loss_gradient.device)


def penalty_call(given: Mapping[str, Any], config: Any, loop: LoopScale) -> PenaltyCall:
    """The `PenaltyCall` of a forward pass with the arguments `given`, of a model with `config`."""
    labels, total = given.get("labels"), given.get("num_items_in_batch")
    is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    items = None
    if isinstance(labels, torch.Tensor) and total is not None:
        items = _items(labels, given.get("shift_labels"), is_seq2seq)
    share = None
    if items is not None and total is not None:
        count = total.to(items.device).float() if isinstance(total, torch.Tensor) else float(total)
        share = items.sum() / count
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if not is_seq2seq:
        stacks = {"": _stack(given.get("input_ids"), given.get("inputs_embeds"), mask, positions, items)}
    else:
        rows = None if items is None else items if items.dim() == 1 else items.sum(1)
        target = given.get("decoder_input_ids")
        decoder_mask = given.get("decoder_attention_mask")
        if target is None and given.get("decoder_inputs_embeds") is None:
            target = labels
            if decoder_mask is None and isinstance(labels, torch.Tensor):
                decoder_mask = (labels != -100).long()
        stacks = {
            "encoder": _stack(given.get("input_ids"), given.get("inputs_embeds"), mask, None, rows),
            "decoder": _stack(target, given.get("decoder_inputs_embeds"), decoder_mask, None, rows),
        }
    in_float16 = any(
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16 for kind in ("cuda", "cpu")
    )
    return PenaltyCall(stacks, in_float16, share, loop)


def _items(labels: torch.Tensor, shifted: object, is_seq2seq: bool) -> torch.Tensor:
    """1 where a token (B, T), or a row (B,), is counted by the loss; as transformers' Trainer counts."""
    if isinstance(shifted, torch.Tensor):
        return (shifted != -100).float()
    counted = (labels != -100).float()
    if labels.dim() != 2 or is_seq2seq:
        return counted.flatten(1).sum(1) if labels.dim() > 2 else counted
    return torch.nn.functional.pad(counted[:, 1:], (0, 1))  # a causal model's loss shifts them


def _stack(
    ids: object, embeds: object, mask: object, positions: object, items: torch.Tensor | None
) -> Sequences | str | None:
    """None: no tokens and no mask, as in a model of one's own; all rows of a site count."""
    tokens = ids if isinstance(ids, torch.Tensor) else embeds
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        return None if mask is None else "the call has an `attention_mask` but neither token ids nor embeddings"
    shape = tokens.shape[:2]
    for name, value in (("attention_mask", mask), ("position_ids", positions)):
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape[1] != shape[1]:
            return f"`{name}` is not of shape (batch, tokens), so it does not tell the real tokens of a sequence"
    return sequences_of(shape, tokens.device, mask, positions, items)  # type: ignore[arg-type]


class PenaltyLog:
    """Means of the penalties' values since they were last read; nothing is synchronised until then.

    Of a compiled model the values of its last call alone: a mean would have it compiled anew at each step.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, int]] = {}
        self.compiled: tuple[Entry, ...] = ()

    def record_compiled(self, entries: list[Entry]) -> None:
        """What compiled layers found in a call."""
        found = tuple((name, site, value.detach(), weighted.detach()) for name, site, value, weighted in entries)
        if torch.compiler.is_compiling():
            self.compiled = found
        else:
            for entry in found:
                self.record(*entry)

    def record(self, name: str, site: str, value: torch.Tensor, weighted: torch.Tensor) -> None:
        value, weighted = value.detach().float(), weighted.detach().float()
        if (name, site) in self.entries:
            seen, seen_weighted, count = self.entries[name, site]
            self.entries[name, site] = (seen + value, seen_weighted + weighted, count + 1)
        else:
            self.entries[name, site] = (value, weighted, 1)

    def read(self) -> dict[str, float]:
        """{"penalty/<name>": mean over calls and sites, "penalty/total": what was added to the loss}; forgets them."""
        values: dict[str, list[float]] = {}
        total = 0.0
        for entry in self.compiled:
            self.record(*entry)
        self.compiled = ()
        for (name, _), (value, weighted, count) in self.entries.items():
            values.setdefault(f"penalty/{name}", []).append(float(value) / count)
            total += float(weighted) / count
        self.entries.clear()
        means = {name: sum(found) / len(found) for name, found in values.items()}
        return {**means, "penalty/total": total} if means else {}
