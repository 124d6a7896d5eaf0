"""Tests without an assumption on the distribution: sign flips of differences, and McNemar's of two outcomes."""

from __future__ import annotations

import numpy as np
from scipy import stats

EXACT_LIMIT = 2**14  # sign patterns that are enumerated instead of drawn


def sign_flip_p_value(differences: np.ndarray, *, resamples: int = 9_999, random_seed: int = 0) -> float:
    """Two-sided p-value of mean(differences) = 0 by flipping signs, (n,) -> (0, 1].

    Patterns at least as extreme count (>=, within rounding), and so does the observed one: p is never 0, and 1 for
    identical systems. All 2^n patterns are enumerated where they are at most 16,384.
    """
    row = np.asarray(differences, dtype=np.float64)
    if row.ndim != 1 or row.size < 1 or not np.isfinite(row).all():
        raise ValueError(f"`differences` has shape {row.shape}: must be (n,), finite, n at least 1.")
    observed = abs(float(row.sum()))
    bound = observed - 1e-12 * float(np.abs(row).sum())
    if 2**row.size <= EXACT_LIMIT:
        patterns = (np.arange(2**row.size)[:, None] >> np.arange(row.size)) & 1
        return float((np.abs((1.0 - 2.0 * patterns) @ row) >= bound).mean())
    rng = np.random.default_rng(random_seed)
    extreme, left = 0, resamples
    bytes_a_row = -(-row.size // 8)
    while left:
        block = min(left, 1024)
        bits = np.unpackbits(rng.integers(0, 256, (block, bytes_a_row), dtype=np.uint8), axis=1, count=row.size)
        sums = row.sum() - 2.0 * (bits @ row)
        extreme += int((np.abs(sums) >= bound).sum())
        left -= block
    return (extreme + 1) / (resamples + 1)


def mcnemar_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """Exact McNemar test of two systems' binary scores (n,) on one seed: binomial on the items that they split."""
    first, second = np.asarray(a), np.asarray(b)
    for name, given in (("a", first), ("b", second)):
        if given.ndim != 1 or not np.isin(given, (0, 1)).all():
            raise ValueError(f"`{name}` must be (n,) of zeros and ones.")
    if first.shape != second.shape:
        raise ValueError(f"`a` has {first.size} items and `b` {second.size}: score both on the same ones.")
    wins, losses = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    return 1.0 if wins + losses == 0 else float(stats.binomtest(wins, wins + losses, 0.5).pvalue)
