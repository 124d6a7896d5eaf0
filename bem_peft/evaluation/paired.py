"""Two systems' scores side by side.

    D[seed, item] = score_A - score_B, with the sign turned where lower is better: above 0 A is the better one

Items are aligned by id, never by position; what one system has and the other has not is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bem_peft.evaluation.scores import Scores, some

BY_LENGTH = ("shortest third", "longest third")
ROUNDING = 1e-12  # of a score: sums of the same numbers in another order differ by so much


@dataclass(frozen=True)
class PairedScores:
    """Two systems on the same items and seeds. `a` is the candidate, `b` the anchor.

    Raises:
        ValueError: other metrics or directions, items or seeds that only one has, or content that differs by hash.
    """

    a: Scores
    b: Scores

    def __post_init__(self) -> None:
        a, b = self.a, self.b
        pair = f"{a.system!r} and {b.system!r}"
        if (a.metric, a.higher_is_better) != (b.metric, b.higher_is_better):
            raise ValueError(f"{pair} have other metrics: {a.metric!r} and {b.metric!r}, or other directions.")
        of_both: tuple[tuple[str, Sequence[Any], Sequence[Any]], ...]
        of_both = (("items", a.items, b.items), ("seeds", a.seeds, b.seeds))
        for name, first, second in of_both:
            if first == second:
                continue
            mine, theirs = set(first), set(second)
            lone, other = [x for x in first if x not in theirs], [x for x in second if x not in mine]
            if lone or other:
                raise ValueError(
                    f"{pair} have other {name}: {some(lone)} of the first alone, {some(other)} of the second alone; "
                    "score both on the same ones."
                )
        order = self._items_of_b
        is_same = (a.items, a.sha256) == (b.items, b.sha256)
        if a.sha256 is not None and b.sha256 is not None and not is_same:
            for item, digest, place in zip(a.items, a.sha256, order, strict=True):
                if b.sha256[place] != digest:
                    raise ValueError(
                        f"{pair}: the item {item!r} has other content in each; it was scored on other data."
                    )
        self._check_clusters()

    def _check_clusters(self) -> None:
        """Raises where both have clusters and two items belong together in one alone."""
        if self.a.clusters is None or self.b.clusters is None:
            return
        if (self.a.items, self.a.clusters) == (self.b.items, self.b.clusters):
            return
        theirs = [self.b.clusters[place] for place in self._items_of_b]
        for first, second in ((self.a.clusters, theirs), (theirs, self.a.clusters)):
            seen: dict[str, tuple[str, str]] = {}
            for item, mine, other in zip(self.a.items, first, second, strict=True):
                before, at = seen.setdefault(mine, (other, item))
                if before != other:
                    raise ValueError(
                        f"{self.a.system!r} and {self.b.system!r}: the items {at!r} and {item!r} belong together in "
                        "one of them and not in the other; give both the same clusters."
                    )

    @cached_property
    def _items_of_b(self) -> np.ndarray:
        """(N,) where each item of `a` stands in `b`."""
        if self.a.items == self.b.items:
            return np.arange(len(self.a.items))
        place = {item: i for i, item in enumerate(self.b.items)}
        return np.array([place[item] for item in self.a.items])

    @cached_property
    def difference(self) -> np.ndarray:
        """D (seeds, items), above 0 where `a` is better; in the order of `a`'s items and seeds. What lies within
        rounding of the two scores is 0."""
        seeds = {seed: i for i, seed in enumerate(self.b.seeds)}
        mine, other = self.a.values, self.b.values[[seeds[seed] for seed in self.a.seeds]][:, self._items_of_b]
        found = mine - other
        found[np.abs(found) <= ROUNDING * np.maximum(np.abs(mine), np.abs(other))] = 0.0
        return found if self.a.higher_is_better else 0.0 - found

    @cached_property
    def is_all_zero(self) -> bool:
        """Whether nobody scored anything, by a metric of which more is better: the metric may not know the answers'
        form."""
        return self.a.higher_is_better and not self.a.values.any() and not self.b.values.any()

    @cached_property
    def cluster_index(self) -> np.ndarray | None:
        """(N,) number of each item's cluster, of `a` or else of `b`; None: each item alone."""
        names = self.a.clusters
        if names is None and self.b.clusters is not None:
            names = tuple(self.b.clusters[place] for place in self._items_of_b)
        if names is None:
            return None
        number: dict[str, int] = {}
        return np.array([number.setdefault(name, len(number)) for name in names])

    @cached_property
    def slices(self) -> dict[str, frozenset[str]]:
        """The slices of both, by name; those by length, which each system's own tokens make, are the anchor's.

        Raises:
            ValueError: another name holds other items in each.
        """
        found = dict(self.a.slices) | {name: ids for name, ids in self.b.slices.items() if name in BY_LENGTH}
        for name, ids in self.b.slices.items():
            if found.setdefault(name, ids) != ids:
                raise ValueError(
                    f"{self.a.system!r} and {self.b.system!r}: the slice {name!r} holds other items in each, as "
                    f"{some(sorted(found[name] ^ ids))}; score both with the same slices."
                )
        return found

    def part(self, ids: Iterable[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """(difference, cluster_index) of some items. A corpus metric is computed anew for them."""
        kept = set(ids)
        if self.a.counts is not None:
            pair = PairedScores(self.a.restricted_to(kept), self.b.restricted_to(kept))
            return pair.difference, pair.cluster_index
        at = np.flatnonzero([item in kept for item in self.a.items])
        return self.difference[:, at], None if self.cluster_index is None else self.cluster_index[at]

    def restricted_to(self, ids: Iterable[str]) -> PairedScores:
        kept = set(ids)
        return PairedScores(self.a.restricted_to(kept), self.b.restricted_to(kept))
