"""Slices and the discipline of two of them: Slice-A is for development, Slice-B is held out, and only Slice-B promotes.

An item that stands in both would let what was tuned on promote itself; items are told apart by the hash of their
content, so that a copy under another id is found as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bem_peft.evaluation.intervals import Comparison, compare_means
from bem_peft.evaluation.multiplicity import adjusted_p_values
from bem_peft.evaluation.scores import PairedScores

DEVELOPMENT, HELD_OUT = "slice_a", "slice_b"
WHOLE = "all"


@dataclass(frozen=True)
class SliceResult:
    """One metric on one slice. `stands_on`: "slice_a" or "slice_b". `adjusted_p_value`: over metrics and slices.

    `is_better` and `is_worse` hold after correction, `is_inferior` where the interval's lower end lies below -margin
    (a single claim a slice, which needs no correction). A result that is conditional on one seed claims nothing.
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


def interval_text(found: SliceResult) -> str:
    """The difference with its interval: "+0.012 [+0.004, +0.020]"."""
    c = found.comparison
    return f"{c.estimate:+.3g} [{c.low:+.3g}, {c.high:+.3g}]"


def check_disjoint(development: Mapping[str, str], held_out: Mapping[str, str]) -> None:
    """Raise ValueError where an item of `held_out` (id -> sha256 of its content) stands in `development` too."""
    by_content = {digest: item for item, digest in development.items()}
    for item, digest in held_out.items():
        if item in development or digest in by_content:
            twin = item if item in development else by_content[digest]
            raise ValueError(
                f"the held-out item {item!r} stands in the development slice too (as {twin!r}): what was seen cannot "
                "promote; take it out of one of them."
            )


def compare_slices(
    pairs: Mapping[str, PairedScores],
    *,
    stands_on: str,
    margin: float | Mapping[str, float] = 0.0,
    confidence: float = 0.95,
    correction: str = "by",
    least_items: int = 20,
) -> list[SliceResult]:
    """Every metric on the whole and on every slice of at least `least_items` items.

    Args:
        pairs: metric -> candidate and anchor.
        stands_on: "slice_a" or "slice_b".
        margin: how much worse counts as no worse, in the metric's units, >= 0; or one a metric (0 where
            none is given).
        correction: "by" (slices overlap), "bh" or "holm".

    Raises:
        ValueError: an unknown slice name or correction, a negative margin, or data that cannot be compared.
    """
    if stands_on not in (DEVELOPMENT, HELD_OUT):
        raise ValueError(f"`stands_on` = {stands_on!r}: must be {DEVELOPMENT!r} or {HELD_OUT!r}.")
    margins = {metric: margin.get(metric, 0.0) if isinstance(margin, Mapping) else margin for metric in pairs}
    for metric, value in margins.items():
        if not value >= 0.0:
            raise ValueError(f"`margin` = {value!r} for {metric!r}: must be at least 0, in the metric's units.")
    compared: dict[tuple[str, str], Comparison] = {}
    for metric, pair in pairs.items():
        compared[metric, WHOLE] = compare_means(pair.difference, pair.cluster_index, confidence=confidence)
        for name, ids in sorted(pair.a.slices.items()):
            if len(ids) >= least_items:
                part = pair.restricted_to(ids)
                compared[metric, name] = compare_means(part.difference, part.cluster_index, confidence=confidence)
    adjusted = adjusted_p_values({key: found.claim_p_value for key, found in compared.items()}, correction)
    alpha = 1.0 - confidence
    results = []
    for (metric, name), found in compared.items():
        is_sure = adjusted[metric, name] <= alpha and not found.is_conditional
        results.append(
            SliceResult(
                metric, name, stands_on, found, adjusted[metric, name], is_sure and found.estimate > 0.0,
                is_sure and found.estimate < 0.0, found.low < -margins[metric], margins[metric],
            )
        )  # fmt: skip
    return results


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
