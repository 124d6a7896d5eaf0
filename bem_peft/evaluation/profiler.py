r"""How fast systems run beside each other: prefill, decoding and a training step, interleaved on one machine.

A round runs base, anchor, anchor again, candidate, and the same backwards, so that a drift of the machine cancels in

    d = (log c1 + log c2 - log a1 - log a2) / 2

whose mean over rounds has a t interval. The anchor against its own second runs is the noise floor; where that is wider
than the tolerance there is no verdict. Works for any models that transformers can run: PEFT's or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from bem_peft import upstream
from bem_peft.budget.latency import interval, no_slower
from bem_peft.budget.memory import LiveBytes
from bem_peft.kept import kept_weights

BASE, ANCHOR, AGAIN = "base", "anchor", "anchor again"
RUNS_FOR_P95 = 80  # fewer bound no 95th percentile


@dataclass(frozen=True)
class Workload:
    """What is timed. kind: "prefill" (a forward pass), "decode" (one token with a cache of `tokens`), "train_step"."""

    kind: str
    batch: int
    tokens: int

    def __post_init__(self) -> None:
        if self.kind not in ("prefill", "decode", "train_step"):
            raise ValueError(f"`kind` = {self.kind!r}: must be 'prefill', 'decode' or 'train_step'.")
        for name in ("batch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` = {getattr(self, name)}: must be at least 1.")

    @property
    def tokens_a_run(self) -> int:
        return self.batch if self.kind == "decode" else self.batch * self.tokens


@dataclass(frozen=True)
class Profile:
    """Times of one system at one workload, in milliseconds a run; ratios to base and anchor with 90 % intervals.

    p95_interval: of 95 %; None under 80 runs. peak_memory_bytes: the allocator's on CUDA and XPU; elsewhere of
    the live storages of one untimed run, weights included.
    verdict: PASS, FAIL or INCONCLUSIVE: surely no more than the tolerance slower than the anchor; None for base and
    anchor.
    times_ms: every run, as they came.
    """

    system: str
    workload: Workload
    runs: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    p95_interval: tuple[float, float] | None
    tokens_per_second: float
    peak_memory_bytes: int
    ratio_to_base: tuple[float, float, float] | None
    ratio_to_anchor: tuple[float, float, float] | None
    noise: tuple[float, float]
    verdict: str | None
    times_ms: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PerformanceProfiler:
    """Times candidates against a base and an anchor.

    Args:
        base, anchor: models on one device. candidates: name -> model.
        rounds: timed rounds, at least 5; each runs every system twice. warm_up: rounds that are not counted.
        tolerance_ratio: 0.05 is 5 %.
        progress: wraps the range of rounds, as tqdm does, and is given `desc`; None: nothing is shown.

    Raises:
        ValueError: too few rounds, no candidate, a reserved name, or models on several devices.
    """

    def __init__(
        self,
        base: nn.Module,
        anchor: nn.Module,
        candidates: Mapping[str, nn.Module],
        *,
        rounds: int = 30,
        warm_up: int = 2,
        tolerance_ratio: float = 0.05,
        progress: Callable[..., Iterable[int]] | None = None,
    ) -> None:
        self.progress = progress
        if rounds < 5:
            raise ValueError(f"`rounds` = {rounds}: must be at least 5, for an interval.")
        if not candidates or {BASE, ANCHOR, AGAIN} & set(candidates):
            raise ValueError(f"`candidates` = {list(candidates)}: must be some, none called {BASE!r} or {ANCHOR!r}.")
        if not tolerance_ratio > 0:
            raise ValueError(f"`tolerance_ratio` = {tolerance_ratio}: must be above 0.")
        self.models = {BASE: base, ANCHOR: anchor, AGAIN: anchor, **candidates}
        devices = {next(model.parameters()).device for model in self.models.values()}
        if len(devices) != 1:
            raise ValueError(f"the models stand on {sorted(map(str, devices))}: must be one device.")
        self.device = devices.pop()
        self.rounds, self.warm_up, self.tolerance_ratio = rounds, warm_up, tolerance_ratio

    def profile(self, workloads: Sequence[Workload]) -> list[Profile]:
        """Every system at every workload. Nothing else should run on the machine."""
        found = []
        for workload in workloads:
            with ExitStack() as scopes:
                for model in self.models.values() if workload.kind == "decode" else ():
                    scopes.enter_context(kept_weights(model))  # as inside `generate`
                found += self._one(workload)
        return found

    def _one(self, workload: Workload) -> list[Profile]:
        runs = {name: self._runner(model, workload) for name, model in self.models.items()}
        order = [*runs, *reversed(runs)]
        times: dict[str, list[float]] = {name: [] for name in runs}
        peaks = {name: 0 if self._has_peak else live_peak(self.models[name], run) for name, run in runs.items()}
        every = range(self.warm_up + self.rounds)
        for round_number in every if self.progress is None else self.progress(every, desc=f"timing {workload.kind}"):
            for name in order:
                seconds, peak = self._timed(runs[name])
                if round_number >= self.warm_up:
                    times[name].append(seconds)
                    peaks[name] = max(peaks[name], peak)
        logs = {name: np.log(np.array(found)).reshape(-1, 2).mean(1) for name, found in times.items()}
        noise = interval(logs[AGAIN] - logs[ANCHOR])
        return [
            self._profile(name, workload, np.array(times[name]), peaks[name], logs, noise)
            for name in runs
            if name != AGAIN
        ]

    def _profile(
        self, name: str, workload: Workload, seconds: np.ndarray, peak: int, logs: dict[str, np.ndarray],
        noise: tuple[float, float, float],
    ) -> Profile:  # fmt: skip
        p50, p95, p99 = (float(v) for v in np.percentile(seconds, (50, 95, 99)) * 1e3)
        bounds = None
        if len(seconds) >= RUNS_FOR_P95:
            found = stats.quantile_test(seconds * 1e3, q=0, p=0.95).confidence_interval(0.95)
            bounds = (float(found.low), float(found.high))
        to_anchor = None if name == ANCHOR else interval(logs[name] - logs[ANCHOR])
        verdict = None
        if to_anchor is not None and name != BASE:
            verdict = no_slower(to_anchor[1], to_anchor[2], noise[1], noise[2], self.tolerance_ratio)
        return Profile(
            name, workload, len(seconds), p50, p95, p99, bounds, workload.tokens_a_run / p50 * 1e3, peak,
            None if name == BASE else interval(logs[name] - logs[BASE]), to_anchor, (noise[1], noise[2]), verdict,
            tuple(round(float(value), 4) for value in seconds * 1e3),
        )  # fmt: skip

    @property
    def _has_peak(self) -> bool:
        return self.device.type in ("cuda", "xpu")

    def _timed(self, run: Callable[[], object]) -> tuple[float, int]:
        """Seconds, and the allocator's peak where it tells one, else 0."""
        if self._has_peak:
            torch.accelerator.reset_peak_memory_stats(self.device)
        self._synchronize()
        start = time.perf_counter()
        run()
        self._synchronize()
        seconds = time.perf_counter() - start
        return seconds, int(torch.accelerator.max_memory_allocated(self.device)) if self._has_peak else 0

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _runner(self, model: nn.Module, workload: Workload) -> Callable[[], object]:
        """One run of the workload, without arguments."""
        config: Any = model.config
        ids = torch.arange(workload.batch * workload.tokens, device=self.device) % (config.vocab_size - 4) + 3
        ids = ids.view(workload.batch, workload.tokens)
        inputs: dict[str, torch.Tensor] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            if workload.kind == "decode":
                raise ValueError("decoding is profiled for causal models; use 'prefill' for an encoder-decoder.")
            inputs["decoder_input_ids"] = ids
        if workload.kind == "train_step":
            return self._training_step(model, inputs, ids)
        cache: Any = None
        cached: dict[str, Any] = {}
        if workload.kind == "decode":
            with torch.no_grad():
                cache = upstream.cache_of(model.eval()(**inputs, use_cache=True))
            inputs = {"input_ids": ids[:, -1:]}
            cached = {upstream.cache_argument(model): cache, "use_cache": True}

        @torch.no_grad()
        def run() -> object:
            model.eval()
            out = model(**inputs, **cached)
            if cache is not None:
                cache.crop(-1)  # the next run decodes at the same length
            return out

        return run

    @staticmethod
    def _training_step(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Callable[[], object]:
        trainable = [p for p in model.parameters() if p.requires_grad]

        def run() -> object:
            model.train()
            given = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
            loss = model(**given, labels=labels).loss
            if trainable:
                loss.backward()
                for parameter in trainable:
                    parameter.grad = None
            return loss

        return run


def live_peak(model: nn.Module, run: Callable[[], object]) -> int:
    """The most bytes that the model's weights and what `run` makes take together."""
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.see(tensor)
        run()
    return live.peak


def requests_per_minute(prefill: Profile, decode: Profile, new_tokens: int) -> float:
    """Requests of one prompt and `new_tokens` answers that a device serves, from median times.

    Raises:
        ValueError: profiles of other kinds, systems or batches.
    """
    if (prefill.workload.kind, decode.workload.kind) != ("prefill", "decode"):
        raise ValueError("give a profile of 'prefill' and one of 'decode'.")
    if prefill.system != decode.system or prefill.workload.batch != decode.workload.batch:
        raise ValueError("the profiles are of other systems or batches.")
    seconds = (prefill.p50_ms + new_tokens * decode.p50_ms) / 1e3
    return 60.0 / seconds * prefill.workload.batch
