"""Correction of p-values over many comparisons: what holds over metrics, slices and systems together.

Holm bounds the chance of any false claim (gates); Benjamini-Hochberg the share of false claims among the claims, where
tests are independent or positively dependent; Benjamini-Yekutieli under any dependence (slices that overlap).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
from scipy import stats

METHODS = ("holm", "bh", "by")
Key = TypeVar("Key", bound=Hashable)


def adjusted_p_values(p_values: Mapping[Key, float], method: str = "holm") -> dict[Key, float]:
    """Adjusted p-values under the same keys; reject where one is at most alpha.

    Raises:
        ValueError: an unknown method, or a p-value outside [0, 1].
    """
    if method not in METHODS:
        raise ValueError(f"`method` = {method!r}: must be one of {', '.join(METHODS)}.")
    if not p_values:
        return {}
    keys, values = list(p_values), np.array(list(p_values.values()), dtype=np.float64)
    wrong = [key for key, value in p_values.items() if not 0.0 <= value <= 1.0]
    if wrong:
        raise ValueError(f"`p_values`[{wrong[0]!r}] = {p_values[wrong[0]]!r}: must lie in [0, 1].")
    if method == "holm":
        order = np.argsort(values)
        steps = (len(values) - np.arange(len(values))) * values[order]
        adjusted = np.empty_like(values)
        adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    else:
        adjusted = stats.false_discovery_control(values, method=method)
    return dict(zip(keys, map(float, adjusted), strict=True))
