r"""Is a candidate's time within a tolerance of the anchor's?  Interleaved runs and an equivalence test.

Each block times A B B A (anchor, candidate), so that a drift of the machine cancels. Of n blocks with log ratios
d = (log B1 + log B2 - log A1 - log A2) / 2 the mean's 90 % interval (t, n-1) decides, as in two one-sided tests at 5 %:

    PASS          the interval lies within +- log(1 + tolerance)
    FAIL          it lies wholly outside
    INCONCLUSIVE  neither: more blocks, or a quieter machine

The same interval of the anchor against itself is the noise floor; where it is wider than the tolerance there is no
verdict but INCONCLUSIVE. Timings are measured, never exact.

Source: Schuirmann, A comparison of the two one-sided tests procedure, 1987.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class LatencyComparison:
    """Ratios of candidate to anchor; `noise_*` of the anchor to itself. Medians in milliseconds a run."""

    ratio: float
    ratio_low: float
    ratio_high: float
    noise_low: float
    noise_high: float
    anchor_ms: float
    candidate_ms: float
    blocks: int
    verdict: str


def interval(log_ratios: np.ndarray) -> tuple[float, float, float]:
    """Mean ratio and its 90 % interval from log ratios (n,), n >= 2."""
    from scipy import stats  # half a second to import

    mean, error = float(log_ratios.mean()), float(log_ratios.std(ddof=1)) / math.sqrt(len(log_ratios))
    reach = float(stats.t.ppf(0.95, len(log_ratios) - 1)) * error
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def equivalence(low: float, high: float, noise_low: float, noise_high: float, tolerance_ratio: float) -> str:
    """PASS, FAIL or INCONCLUSIVE from the interval of the ratio and of the noise floor."""
    upper = 1.0 + tolerance_ratio
    lower = 1.0 / upper
    if not (lower <= noise_low and noise_high <= upper):
        return "INCONCLUSIVE"
    if lower <= low and high <= upper:
        return "PASS"
    return "FAIL" if high < lower or low > upper else "INCONCLUSIVE"


def no_slower(low: float, high: float, noise_low: float, noise_high: float, tolerance_ratio: float) -> str:
    """As `equivalence`, of one side: PASS where the time is surely no more than the tolerance above the other's."""
    upper = 1.0 + tolerance_ratio
    if not (1.0 / upper <= noise_low and noise_high <= upper):
        return "INCONCLUSIVE"
    if high <= upper:
        return "PASS"
    return "FAIL" if low > upper else "INCONCLUSIVE"


def why_inconclusive(low: float, high: float, noise_low: float, noise_high: float, tolerance_ratio: float) -> str:
    """What left a verdict open, and what settles it."""
    upper = 1.0 + tolerance_ratio
    if not (1.0 / upper <= noise_low and noise_high <= upper):
        return (
            f"the anchor against itself reaches [{noise_low:.3f}, {noise_high:.3f}], further than the tolerance of "
            f"{tolerance_ratio:.0%}: a quieter machine, or more runs"
        )
    return f"[{low:.3f}, {high:.3f}] lies on both sides of the tolerance of {tolerance_ratio:.0%}: more runs"


def compare_latency(
    anchor: Callable[[], object], candidate: Callable[[], object], *, blocks: int = 50, tolerance_ratio: float = 0.05
) -> LatencyComparison:
    """Time two functions against each other.

    Args:
        anchor, candidate: called without arguments; the device is synchronised after each call.
        blocks: of four timed runs each, and four more for the noise floor; at least 5.
        tolerance_ratio: 0.05 is 5 %.

    Raises:
        ValueError: fewer than 5 blocks, or a tolerance that is not positive.
    """
    if blocks < 5:
        raise ValueError(f"`blocks` = {blocks}: must be at least 5, for an interval.")
    if not tolerance_ratio > 0:
        raise ValueError(f"`tolerance_ratio` = {tolerance_ratio}: must be above 0.")
    for function in (anchor, candidate) * 2:  # warm-up
        _seconds(function)
    test, noise, times = [], [], {"anchor": [], "candidate": []}  # type: ignore[var-annotated]
    for _ in range(blocks):
        a1, b1, b2, a2 = (_seconds(f) for f in (anchor, candidate, candidate, anchor))
        n1, n2, n3, n4 = (_seconds(anchor) for _ in range(4))
        test.append((math.log(b1) + math.log(b2) - math.log(a1) - math.log(a2)) / 2)
        noise.append((math.log(n2) + math.log(n3) - math.log(n1) - math.log(n4)) / 2)
        times["anchor"] += [a1, a2]
        times["candidate"] += [b1, b2]
    ratio, low, high = interval(np.array(test))
    _, noise_low, noise_high = interval(np.array(noise))
    return LatencyComparison(
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        noise_low=noise_low,
        noise_high=noise_high,
        anchor_ms=float(np.median(times["anchor"])) * 1e3,
        candidate_ms=float(np.median(times["candidate"])) * 1e3,
        blocks=blocks,
        verdict=equivalence(low, high, noise_low, noise_high, tolerance_ratio),
    )


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start
