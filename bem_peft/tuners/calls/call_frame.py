"""Where the values of a call live: in the call, not on the model, so that calls do not see each other.

Threads, async tasks, nested calls and the backward pass each have their own. A context variable holds them. A compiled
region cannot read one, so the innermost call also stands on the `CallFrames` object itself, for tracing alone; where a
compiled region reads it and two threads are at work, that is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from bem_peft.tuners.calls.attention_stats import AttentionRows
from bem_peft.tuners.calls.penalty_call import PenaltyCall
from bem_peft.tuners.calls.routing import Routing

is_compiling = torch.compiler.is_compiling


@dataclass(frozen=True)
class CallValues:
    """Values of one call.

    quality (B,) or (B, T) in [0, 1]; scores (B, K); adapter_names: one a row; penalty: in training, if one is on;
    may_repeat: a value may stand for several rows, as `generate` makes them of one sequence.
    """

    retrieval_quality: torch.Tensor | None = None
    retrieval_scores: torch.Tensor | None = None
    adapter_names: tuple[str, ...] | None = None
    penalty: PenaltyCall | None = None
    may_repeat: bool = False

    def rows(self, rows: torch.Tensor, batch: int) -> CallValues:
        """The values of some rows (indices) of a batch; a value for each sequence that became n rows is repeated."""

        def pick(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else repeat_rows(value, batch)[rows]

        return CallValues(pick(self.retrieval_quality), pick(self.retrieval_scores), None, self.penalty)

    def check_rows(self, batch: int) -> None:
        """Raise ValueError where they do not fit a call of `batch` rows: one value a row, in the order of the rows."""
        given = {
            name: len(value)
            for name in ("retrieval_quality", "retrieval_scores", "adapter_names")
            if (value := getattr(self, name)) is not None
        }
        for name, count in given.items():
            if count == batch or (self.may_repeat and count and batch % count == 0):
                continue
            if name == "adapter_names":
                raise ValueError(
                    f"Length of `adapter_names` should be the same as the number of inputs, but got {count} and "
                    f"{batch} respectively."
                )
            raise ValueError(
                f"`{name}` holds {count} values and the call has {batch} rows: must be one a row, in the order of the "
                "rows. A batch that joins pairs, (chosen, rejected) say, takes the values of both, joined alike."
            )


def repeat_rows(value: torch.Tensor, batch: int) -> torch.Tensor:
    """(b, ...) -> (batch, ...), each row batch/b times in a row: beams, or tokens that were flattened.

    Raises:
        ValueError: batch is no multiple of b.
    """
    given = value.shape[0]
    if given == batch:
        return value
    if given == 0 or batch % given:
        raise ValueError(f"values for {given} sequences were given to a batch of {batch}: must be one a sequence.")
    return value.repeat_interleave(batch // given, dim=0)


@dataclass(eq=False)
class Frame:
    """What a call sees. ambient: what holds for each call inside a `with` block or a `generate`."""

    ambient: CallValues
    values: CallValues
    outer: Frame | None
    is_traced: bool = False  # put there by a compiled region
    is_over: bool = False  # taken away by a compiled region, which cannot write the context variable

    @property
    def is_empty(self) -> bool:
        held = self.ambient, self.values
        return all(
            v.retrieval_quality is None and v.retrieval_scores is None and v.adapter_names is None and v.penalty is None
            for v in held
        )


NOTHING = CallValues()
_frames: ContextVar[dict[Any, Frame] | None] = ContextVar("bem_peft_calls", default=None)
_leads: ContextVar[torch.Size] = ContextVar("bem_peft_lead", default=torch.Size())  # noqa: B039, it cannot change
_routing: ContextVar[Routing | None] = ContextVar("bem_peft_routing", default=None)
_rows: ContextVar[dict[Any, Any] | None] = ContextVar("bem_peft_attention_rows", default=None)


class CallFrames:
    """The calls of one model that run now, as this thread and async task see them."""

    def __init__(self) -> None:
        self.traced: Frame | None = None  # the innermost one, for compiled regions
        self.is_read_compiled = False  # a compiled region reads `traced`
        self.traced_lead: torch.Size = torch.Size()
        self.traced_routing: Routing | None = None
        self.threads: dict[int, int] = {}  # thread -> calls that run in it

    def frame(self) -> Frame | None:
        """The innermost call or `with` block around us."""
        if is_compiling():
            if self.traced is not None and not (self.traced.is_traced or self.traced.is_empty or self.is_read_compiled):
                self.is_read_compiled = True
            return self.traced
        found = _frames.get()
        frame = None if found is None else found.get(self)
        while frame is not None and frame.is_over:
            frame = frame.outer
        if frame is None and self.traced is not None and self.traced.is_traced:
            return self.traced  # we run between two compiled parts of one call
        return frame

    @property
    def values(self) -> CallValues:
        frame = self.frame()
        return NOTHING if frame is None else frame.values

    @property
    def ambient(self) -> CallValues:
        frame = self.frame()
        return NOTHING if frame is None else frame.ambient

    def push(self, ambient: CallValues, values: CallValues) -> None:
        outer = self.frame()
        frame = Frame(ambient, values, outer, is_compiling())
        if not is_compiling():
            self._count(+1, frame)
            _frames.set({**(_frames.get() or {}), self: frame})
        self.traced = frame

    def pop(self) -> None:
        frame = self.frame()
        if frame is not None:
            if not is_compiling():
                self._count(-1, frame)
            else:
                frame.is_over = True
            self._restore(frame.outer)

    def _restore(self, frame: Frame | None) -> None:
        if not is_compiling():
            others = {state: held for state, held in (_frames.get() or {}).items() if state is not self}
            _frames.set(others if frame is None else {**others, self: frame})
        self.traced = frame

    def _count(self, change: int, frame: Frame) -> None:
        thread = threading.get_ident()
        count = self.threads.get(thread, 0) + change
        if count > 0:
            self.threads[thread] = count
        else:
            self.threads.pop(thread, None)
        if change > 0 and self.is_read_compiled and len(self.threads) > 1 and not frame.is_empty:
            self._count(-1, frame)
            raise RuntimeError(
                "a compiled region of the model reads values of the call (retrieval, adapter names, penalties), and "
                "two threads call the model at once: it could read the other one's. Compile the whole model, or none "
                "of it, or call it from one thread."
            )

    @contextmanager
    def using(self, values: CallValues) -> Iterator[None]:
        """`values` for the calls of layers inside the block."""
        self.push(self.ambient, values)
        try:
            yield
        finally:
            self.pop()

    @contextmanager
    def using_ambient(self, **values: Any) -> Iterator[None]:
        """`values` for each call of the model inside the block; after it, all is as before, however it ended."""
        before = self.frame()
        ambient = replace(self.ambient, **values)
        self.push(ambient, ambient)
        try:
            yield
        finally:
            self.unwind(before)

    def unwind(self, before: Frame | None) -> None:
        """End all calls since `before` was the innermost one: an interrupt skips a module's hooks."""
        while (frame := self.frame()) is not None and frame is not before:
            self.pop()

    # what a layer leaves for itself

    @property
    def lead(self) -> torch.Size:
        """The shape of the leading axes of the site that runs now."""
        return self.traced_lead if is_compiling() else _leads.get()

    @lead.setter
    def lead(self, lead: torch.Size) -> None:
        if is_compiling():
            self.traced_lead = lead
        else:
            _leads.set(lead)

    @property
    def routing(self) -> Routing | None:
        """The pass through fused experts that runs now, if a penalty there reads tokens."""
        return self.traced_routing if is_compiling() else _routing.get()

    @routing.setter
    def routing(self, routing: Routing | None) -> None:
        if is_compiling():
            self.traced_routing = routing
        else:
            _routing.set(routing)


class RowReader(Protocol):
    """An adapter that reads the rows of the attention before its site."""

    traced_rows: AttentionRows | None  # in a compiled region, which cannot read a context variable


def leave_rows(reader: RowReader, rows: AttentionRows | None) -> None:
    """Leave the rows of the attention that runs now for the adapter `reader`, which takes them in the same call."""
    if is_compiling():
        reader.traced_rows = rows
    else:
        _rows.set({**(_rows.get() or {}), reader: rows})


def take_rows(reader: RowReader) -> AttentionRows | None:
    """What was left for `reader`, once; None: nothing."""
    if is_compiling():
        rows, reader.traced_rows = reader.traced_rows, None
        return rows
    held = _rows.get() or {}
    if reader in held:
        _rows.set({other: rows for other, rows in held.items() if other is not reader})
    return held.get(reader)
