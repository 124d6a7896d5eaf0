"""The profiler: arithmetic on made-up clocks; no assertion on real time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bem_peft.evaluation import profiler
from bem_peft.evaluation.profiler import (
    PerformanceProfiler,
    Profile,
    Workload,
    live_peak,
    requests_per_minute,
)
from bem_peft.upstream import cache_argument
from tests.contract.methods import adapted
from tests.tiny_models import build


def profiled(monkeypatch: pytest.MonkeyPatch, seconds: Any, rounds: int = 40, **options: Any) -> dict[str, Profile]:
    """Profiles whose runs take what `seconds(system, number of the run)` says."""
    models = {"base": build("llama"), "anchor": adapted("kronecker", "llama"), "film": adapted("film", "llama")}
    tool = PerformanceProfiler(models["base"], models["anchor"], {"film": models["film"]}, rounds=rounds, **options)
    names, count = [*tool.models, *reversed(tool.models)], itertools.count()

    def timed(run: Any) -> tuple[float, int]:
        number = next(count)
        run()
        return seconds(names[number % len(names)], number), 0

    monkeypatch.setattr(tool, "_timed", timed)
    return {found.system: found for found in tool.profile([Workload("prefill", 2, 5)])}


COST = {"base": 0.010, "anchor": 0.011, "anchor again": 0.011, "film": 0.01122}


def test_ratios_hold_although_the_machine_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profiled(monkeypatch, lambda name, number: COST[name] * 1.0005**number)
    assert found["film"].ratio_to_anchor == pytest.approx((1.02, 1.02, 1.02), rel=1e-6)
    assert found["film"].ratio_to_base == pytest.approx((1.122,) * 3, rel=1e-6)
    assert found["film"].verdict == "PASS"
    assert found["film"].noise == pytest.approx((1.0, 1.0))
    assert (found["base"].verdict, found["anchor"].verdict) == (None, None)


def test_verdicts_are_three(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = profiled(monkeypatch, lambda name, number: COST[name] * (1.2 if name == "film" else 1.0))
    assert slow["film"].verdict == "FAIL"
    fast = profiled(monkeypatch, lambda name, number: COST[name] * (0.8 if name == "film" else 1.0))
    assert fast["film"].verdict == "PASS"  # faster than the tolerance is no fault
    rng = np.random.default_rng(0)
    noisy = profiled(monkeypatch, lambda name, number: COST[name] * float(np.exp(rng.normal(0, 0.8))))
    assert noisy["film"].verdict == "INCONCLUSIVE"
    assert noisy["film"].noise[1] > 1.05


def test_percentiles_and_rates_are_numpys_and_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {}

    def seconds(name: str, number: int) -> float:
        value = COST[name] * float(np.exp(rng.normal(0, 0.1)))
        times.setdefault(name, []).append(value)
        return value

    film = profiled(monkeypatch, seconds, rounds=50, warm_up=2)["film"]
    counted = np.array(times["film"][4:]) * 1e3  # without two rounds of warm-up
    assert film.runs == 100
    assert (film.p50_ms, film.p95_ms, film.p99_ms) == pytest.approx(tuple(np.percentile(counted, (50, 95, 99))))
    bounds = stats.quantile_test(counted, q=0, p=0.95).confidence_interval(0.95)
    assert film.p95_interval == pytest.approx((bounds.low, bounds.high))
    assert film.tokens_per_second == pytest.approx(10 / film.p50_ms * 1e3)
    short = profiled(monkeypatch, seconds, rounds=5)["film"]
    assert short.p95_interval is None
    assert short.to_dict()["workload"] == {"kind": "prefill", "batch": 2, "tokens": 5}


@pytest.mark.parametrize("kind", ["prefill", "decode", "train_step"])
def test_every_workload_runs_and_leaves_no_gradient(kind: str) -> None:
    candidate = adapted("composite", "llama")
    tool = PerformanceProfiler(
        build("llama"), adapted("kronecker", "llama"), {"composite": candidate}, rounds=5, warm_up=0
    )
    found = tool.profile([Workload(kind, 2, 6)])
    assert [p.system for p in found] == ["base", "anchor", "composite"]
    assert all(p.p50_ms > 0 and p.runs == 10 for p in found)
    assert all(p.grad is None for p in candidate.parameters())


def test_decoding_stays_at_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    model = build("llama")
    argument = cache_argument(model)
    original = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(argument) is not None:
            lengths.append(kwargs[argument].get_seq_length())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    PerformanceProfiler(model, build("llama"), {"x": build("llama")}, rounds=5, warm_up=1).profile(
        [Workload("decode", 1, 7)]
    )
    assert set(lengths) == {7}


def test_requests_are_a_prompt_and_its_answer() -> None:
    def profile(kind: str, p50: float, system: str = "a", batch: int = 4) -> Profile:
        return Profile(
            system, Workload(kind, batch, 8), 10, p50, p50, p50, None, 1.0, None, None, None, (1.0, 1.0), None
        )

    assert requests_per_minute(profile("prefill", 100.0), profile("decode", 10.0), 40) == pytest.approx(60 / 0.5 * 4)
    with pytest.raises(ValueError, match="one of 'decode'"):
        requests_per_minute(profile("decode", 1.0), profile("prefill", 1.0), 4)
    with pytest.raises(ValueError, match="other systems or batches"):
        requests_per_minute(profile("prefill", 1.0), profile("decode", 1.0, system="b"), 4)


def test_wrong_settings_are_refused() -> None:
    model = build("llama")
    for options, text in (({"rounds": 4}, "`rounds` = 4"), ({"tolerance_ratio": 0.0}, "`tolerance_ratio` = 0.0")):
        with pytest.raises(ValueError, match=text):
            PerformanceProfiler(model, model, {"x": model}, **options)
    for names in ({}, {"base": model}):
        with pytest.raises(ValueError, match="`candidates`"):
            PerformanceProfiler(model, model, names)
    with pytest.raises(ValueError, match="must be one device"):
        PerformanceProfiler(model, model, {"x": build("llama").to("meta")})
    for fields, text in ((("sleep", 1, 1), "`kind`"), (("decode", 0, 1), "`batch` = 0")):
        with pytest.raises(ValueError, match=text):
            Workload(*fields)
    t5 = build("t5")
    tool = PerformanceProfiler(t5, t5, {"x": t5}, rounds=5)
    with pytest.raises(ValueError, match="causal models"):
        tool.profile([Workload("decode", 1, 4)])
    assert profiler.RUNS_FOR_P95 == 80


def test_peak_memory_is_that_of_weights_and_live_results() -> None:
    """Against a sum by hand: a product's input is held by the caller, its result and its sum are live together."""
    model = torch.nn.Linear(64, 32, bias=False)
    given = torch.randn(10, 64)
    assert live_peak(model, lambda: model(given).sum()) == 4 * (64 * 32 + 10 * 32 + 1)
    models = {"base": build("llama"), "anchor": adapted("kronecker", "llama"), "film": adapted("film", "llama")}
    tool = PerformanceProfiler(models["base"], models["anchor"], {"film": models["film"]}, rounds=5)
    peaks = {p.system: p.peak_memory_bytes for p in tool.profile([Workload("prefill", 1, 5)])}
    weights = {n: sum(p.numel() * p.element_size() for p in m.parameters()) for n, m in models.items()}
    assert all(peaks[name] > weights[name] for name in weights)
    assert peaks["anchor"] - peaks["base"] >= weights["anchor"] - weights["base"]
