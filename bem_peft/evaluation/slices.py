"""Slices and the discipline of two of them: Slice-A is for development, Slice-B is held out, and only Slice-B promotes.

An item that stands in both would let what was tuned on promote itself; items are told apart by the hash of their
content, so that a copy under another id is found as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bem_peft.evaluation.intervals import Comparison, compare_means, too_few
from bem_peft.evaluation.multiplicity import adjusted_p_values
from bem_peft.evaluation.paired import PairedScores

DEVELOPMENT, HELD_OUT = "slice_a", "slice_b"
WHOLE = "all"
Key = TypeVar("Key", bound=Hashable)  # names of systems


@dataclass(frozen=True)
class SliceResult:
    """One metric on one slice. `stands_on`: "slice_a" or "slice_b". `adjusted_p_value`: over metrics and slices, and
    over systems where several were compared.

    `is_better` and `is_worse` hold after correction, `is_inferior` where the interval's lower end lies below -margin
    (a single claim a slice, which needs no correction). A result that is conditional on one seed, or whose comparison
    has a `refusal`, claims nothing.
    """

    metric: str
    slice: str
    stands_on: str
    comparison: Comparison
    adjusted_p_value: float
    is_better: bool
    is_worse: bool
    is_inferior: bool
    margin: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "comparison": self.comparison.to_dict()}


@dataclass(frozen=True)
class Unjudged:
    """A slice of which nothing can be said, and why."""

    metric: str
    slice: str
    reason: str


def interval_text(found: SliceResult) -> str:
    """The difference with its interval: "+0.012 [+0.004, +0.020]"."""
    c = found.comparison
    return f"{c.estimate:+.3g} [{c.low:+.3g}, {c.high:+.3g}]"


def check_disjoint(development: Mapping[str, str], held_out: Mapping[str, str]) -> None:
    """Raise ValueError where an item of `held_out` (id -> sha256 of its content) stands in `development` too.

    Items are told apart by their content. Ids say nothing: they are numbers by default, and two files count from 0.
    """
    by_content = {digest: item for item, digest in development.items()}
    for item, digest in held_out.items():
        if digest in by_content:
            raise ValueError(
                f"the held-out item {item!r} stands in the development slice too (as {by_content[digest]!r}): what was "
                "seen cannot promote; take it out of one of them."
            )


def measure_slices(
    pairs: Mapping[str, PairedScores], *, confidence: float = 0.95, least_items: int = 20
) -> tuple[dict[tuple[str, str], Comparison], list[Unjudged]]:
    """Every metric on the whole and on every slice: what can be compared by (metric, slice), and what cannot."""
    compared: dict[tuple[str, str], Comparison] = {}
    unjudged: list[Unjudged] = []
    for metric, pair in pairs.items():
        for name, ids in [(WHOLE, None), *sorted(pair.slices.items())]:
            if ids is not None and len(ids) < least_items:
                unjudged.append(Unjudged(metric, name, f"{len(ids)} items: fewer than {least_items}"))
                continue
            difference, clusters = (pair.difference, pair.cluster_index) if ids is None else pair.part(ids)
            reason = too_few(difference, clusters)
            if reason is None and ids is None and pair.is_all_zero:
                reason = "every score of both systems is 0: the metric cannot tell them apart"
            if reason is None:
                compared[metric, name] = compare_means(difference, clusters, confidence=confidence)
            else:
                unjudged.append(Unjudged(metric, name, reason))
    return compared, unjudged


def judge_slices(
    compared: Mapping[Key, Mapping[tuple[str, str], Comparison]],
    *,
    stands_on: str,
    margin: float | Mapping[str, float] = 0.0,
    correction: str = "by",
) -> dict[Key, list[SliceResult]]:
    """What each system's comparisons say, corrected over all systems, metrics and slices together.

    Args:
        compared: system -> what `measure_slices` found.
        stands_on, margin, correction: as in `compare_slices`.
    """
    if stands_on not in (DEVELOPMENT, HELD_OUT):
        raise ValueError(f"`stands_on` = {stands_on!r}: must be {DEVELOPMENT!r} or {HELD_OUT!r}.")
    metrics = {metric for found in compared.values() for metric, _ in found}
    margins = {metric: margin.get(metric, 0.0) if isinstance(margin, Mapping) else margin for metric in metrics}
    for metric, value in margins.items():
        if not value >= 0.0:
            raise ValueError(f"`margin` = {value!r} for {metric!r}: must be at least 0, in the metric's units.")
    p_values = {
        (system, *key): comparison.claim_p_value
        for system, found in compared.items() for key, comparison in found.items() if comparison.may_claim
    }  # fmt: skip
    adjusted = adjusted_p_values(p_values, correction)
    judged: dict[Key, list[SliceResult]] = {}
    for system, found in compared.items():
        judged[system] = []
        for (metric, name), comparison in found.items():
            p = adjusted.get((system, metric, name), 1.0)
            is_sure = comparison.may_claim and p <= 1.0 - comparison.confidence
            judged[system].append(
                SliceResult(
                    metric, name, stands_on, comparison, p, is_sure and comparison.estimate > 0.0,
                    is_sure and comparison.estimate < 0.0, comparison.low < -margins[metric], margins[metric],
                )
            )  # fmt: skip
    return judged


def compare_slices(
    pairs: Mapping[str, PairedScores],
    *,
    stands_on: str,
    margin: float | Mapping[str, float] = 0.0,
    confidence: float = 0.95,
    correction: str = "by",
    least_items: int = 20,
) -> list[SliceResult]:
    """Every metric on the whole and on every slice of at least `least_items` items. Of several systems against one
    anchor use `measure_slices` of each and one `judge_slices`, which corrects over the systems too.

    Args:
        pairs: metric -> candidate and anchor.
        stands_on: "slice_a" or "slice_b".
        margin: how much worse counts as no worse, in the metric's units, >= 0; or one a metric (0 where
            none is given).
        correction: "by" (slices overlap), "bh" or "holm".

    Warns:
        UserWarning: slices of which nothing can be said, and why.

    Raises:
        ValueError: an unknown slice name or correction, a negative margin, or data that cannot be compared.
    """
    compared, unjudged = measure_slices(pairs, confidence=confidence, least_items=least_items)
    for left in unjudged:
        warnings.warn(f"{left.metric} on {left.slice!r} is left out: {left.reason}.", stacklevel=2)
    return judge_slices({WHOLE: compared}, stands_on=stands_on, margin=margin, correction=correction)[WHOLE]


def slice_b_analysis(
    development: Mapping[str, PairedScores], held_out: Mapping[str, PairedScores], **options: Any
) -> list[SliceResult]:
    """The results on Slice-A and on Slice-B, after it is sure that no item stands in both.

    Raises:
        ValueError: an item in both, an item without a hash of its content, or what `compare_slices` raises.
    """
    hashes: list[dict[str, str]] = []
    for name, pairs in ((DEVELOPMENT, development), (HELD_OUT, held_out)):
        found: dict[str, str] = {}
        for pair in pairs.values():
            if pair.a.sha256 is None:
                raise ValueError(
                    f"{name}: the scores of {pair.a.system!r} have no `sha256` of their items, so that slices cannot "
                    "be kept apart; give it with the records."
                )
            found |= dict(zip(pair.a.items, pair.a.sha256, strict=True))
        hashes.append(found)
    check_disjoint(*hashes)
    return [
        *compare_slices(development, stands_on=DEVELOPMENT, **options),
        *compare_slices(held_out, stands_on=HELD_OUT, **options),
    ]


def promoting(results: Sequence[SliceResult]) -> list[SliceResult]:
    """The gains that may promote: on Slice-B, better after correction, of several seeds."""
    return [found for found in results if found.stands_on == HELD_OUT and found.is_better]
