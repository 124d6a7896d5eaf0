"""Scores of one system, item by item and seed by seed, and two systems' scores side by side.

    D[seed, item] = score_A - score_B, with the sign turned where lower is better: above 0 A is the better one

Items are aligned by id, never by position; what one system has and the other has not is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bem_peft.evaluation.corpus import pseudo_values
from bem_peft.evaluation.metrics import corpus_metric
from bem_peft.json_text import read_json
from bem_peft.whole_file import write_whole

VERSION = 1
BY_LENGTH = ("shortest third", "longest third")
ROUNDING = 1e-12  # of a score: sums of the same numbers in another order differ by so much


@dataclass(frozen=True)
class Scores:
    """Scores of one system under one metric.

    Args:
        system, metric: names.
        values: (seeds, items), finite.
        seeds: (K,) whole numbers. items: (N,) ids. All different.
        higher_is_better: the metric's direction.
        clusters: (N,) names of what items belong together (a document, a chapter); None: each item alone.
        slices: slice name -> ids of its items; an item may be in several.
        sha256: (N,) hashes of the items' content, by which slices are kept apart; None: not known.
        counts: of the corpus metrics "bleu" and "chrf" alone: (seeds, items, S), what each sentence contributes. Their
            `values` are pseudo-values, made anew for a part of the items; see `corpus_scores`.

    Raises:
        ValueError: shapes that do not agree, ids or seeds that stand twice, scores that are not finite.
    """

    system: str
    metric: str
    values: np.ndarray
    seeds: tuple[int, ...]
    items: tuple[str, ...]
    higher_is_better: bool = True
    clusters: tuple[str, ...] | None = None
    slices: Mapping[str, frozenset[str]] = field(default_factory=dict)
    sha256: tuple[str, ...] | None = None
    counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        object.__setattr__(self, "values", values)
        where = f"scores of {self.system!r} ({self.metric})"
        if values.shape != (len(self.seeds), len(self.items)):
            raise ValueError(f"{where}: values {values.shape} for {len(self.seeds)} seeds and {len(self.items)} items.")
        for name, given in (("seed", self.seeds), ("item", self.items)):
            twice = _first_twice(given)
            if twice is not None:
                raise ValueError(f"{where}: the {name} {twice!r} stands twice; ids must be different.")
        if not np.isfinite(values).all():
            seed, item = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"{where}: {values[seed, item]} for item {self.items[item]!r}, seed {self.seeds[seed]}; every score "
                "must be finite: give a failed item the metric's worst value, and say so."
            )
        for name in ("clusters", "sha256"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.items):
                raise ValueError(f"{where}: {len(given)} {name} for {len(self.items)} items.")
        if self.counts is not None and (self.counts.ndim != 3 or self.counts.shape[:2] != values.shape):
            raise ValueError(f"{where}: counts {self.counts.shape} for values {values.shape}.")
        known = set(self.items)
        for name, ids in self.slices.items():
            unknown = sorted(set(ids) - known)
            if unknown or not ids:
                what = f"names {unknown[:3]}, which are no items" if unknown else "is empty"
                raise ValueError(f"{where}: slice {name!r} {what}.")

    @classmethod
    def from_records(
        cls, records: Iterable[Mapping[str, Any]], *, system: str, metric: str, higher_is_better: bool = True
    ) -> Scores:
        """From one mapping a score: `seed`, `id`, `value`, and optionally `cluster`, `sha256`, `slices` (a list).

        Raises:
            ValueError: a seed lacks an item that another has, an item's cluster, hash or slices differ by seed, or some
            items have a cluster or a hash and others none.
        """
        table: dict[int, dict[str, float]] = {}
        about: dict[str, tuple[Any, Any, tuple[str, ...]]] = {}
        for record in records:
            seed, item = int(record["seed"]), str(record["id"])
            if item in table.setdefault(seed, {}):
                raise ValueError(f"scores of {system!r}: item {item!r} stands twice for seed {seed}.")
            table[seed][item] = float(record["value"])
            facts = (record.get("cluster"), record.get("sha256"), tuple(sorted(record.get("slices") or ())))
            if about.setdefault(item, facts) != facts:
                raise ValueError(
                    f"scores of {system!r}: item {item!r} has another cluster, hash or slice for seed {seed}."
                )
        seeds, items = sorted(table), list(about)
        for seed in seeds:
            missing = [item for item in items if item not in table[seed]]
            if missing:
                raise ValueError(f"scores of {system!r}: seed {seed} has no score for {_some(missing)}.")
        slices: dict[str, set[str]] = {}
        for item, (_, _, names) in about.items():
            for name in names:
                slices.setdefault(name, set()).add(item)

        def column(position: int, name: str) -> tuple[str, ...] | None:
            found = [about[item][position] for item in items]
            without = [item for item, value in zip(items, found, strict=True) if value is None]
            if without and len(without) < len(items):
                raise ValueError(
                    f"scores of {system!r}: no `{name}` of {_some(without)}, and one of the others: give every item "
                    "one (an item that stands alone its own id), or none."
                )
            return None if without else tuple(map(str, found))

        return cls(
            system, metric, np.array([[table[seed][item] for item in items] for seed in seeds]).reshape(len(seeds), -1),
            tuple(seeds), tuple(items), higher_is_better, column(0, "cluster"),
            {name: frozenset(ids) for name, ids in slices.items()}, column(1, "sha256"),
        )  # fmt: skip

    def restricted_to(self, ids: Iterable[str]) -> Scores:
        """The same scores of some items, in this object's order."""
        kept = set(ids)
        at = [i for i, item in enumerate(self.items) if item in kept]
        items = tuple(self.items[i] for i in at)
        slices = {name: frozenset(set(members) & kept) for name, members in self.slices.items()}
        counts = None if self.counts is None else self.counts[:, at]
        return Scores(
            self.system, self.metric, self.values[:, at] if counts is None else corpus_values(self.metric, counts),
            self.seeds, items, self.higher_is_better,
            None if self.clusters is None else tuple(self.clusters[i] for i in at),
            {name: members for name, members in slices.items() if members},
            None if self.sha256 is None else tuple(self.sha256[i] for i in at), counts,
        )  # fmt: skip

    def to_json(self) -> str:
        """A versioned document; `read` is its inverse, to the last bit."""
        document = {
            "version": VERSION, "system": self.system, "metric": self.metric,
            "higher_is_better": self.higher_is_better, "seeds": list(self.seeds), "items": list(self.items),
            "values": self.values.tolist(), "clusters": None if self.clusters is None else list(self.clusters),
            "slices": {name: sorted(ids) for name, ids in self.slices.items()},
            "sha256": None if self.sha256 is None else list(self.sha256),
            "counts": None if self.counts is None else self.counts.tolist(),
        }  # fmt: skip
        return json.dumps(document, ensure_ascii=False)

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read a document of `write`. Raises ValueError where it is none, or of a later version."""
        try:
            given = read_json(path)
            version = given.pop("version")
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is no document of scores: {error!r}.") from error
        if version != VERSION:
            raise ValueError(f"{path} has version {version}, this release reads {VERSION}: update bem_peft.")
        for name in ("seeds", "items", "clusters", "sha256"):
            given[name] = None if given[name] is None else tuple(given[name])
        given["slices"] = {name: frozenset(ids) for name, ids in given["slices"].items()}
        given["values"] = np.array(given["values"], dtype=np.float64).reshape(len(given["seeds"]), len(given["items"]))
        given["counts"] = None if given["counts"] is None else np.array(given["counts"], dtype=np.float64)
        return cls(**given)


def corpus_values(metric: str, counts: np.ndarray) -> np.ndarray:
    """Pseudo-values (seeds, items) of counts (seeds, items, S); each row's mean is that seed's corpus score."""
    return np.stack([pseudo_values(corpus_metric(metric), of_seed) for of_seed in counts])


def corpus_scores(like: Scores, metric: str, counts: np.ndarray) -> Scores:
    """Scores under "bleu" or "chrf" on the seeds, items, clusters and slices of `like`, from counts (seeds, items, S).

    Raises:
        ValueError: counts of other seeds or items.
    """
    if counts.ndim != 3 or counts.shape[:2] != like.values.shape:
        raise ValueError(f"counts {counts.shape} of {metric!r} for {like.values.shape} seeds and items.")
    return replace(like, metric=metric, values=corpus_values(metric, counts), higher_is_better=True, counts=counts)


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
                    f"{pair} have other {name}: {_some(lone)} of the first alone, {_some(other)} of the second alone; "
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
                    f"{_some(sorted(found[name] ^ ids))}; score both with the same slices."
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


def _first_twice(values: Sequence[Any]) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _some(values: Sequence[Any]) -> str:
    if not values:
        return "none"
    shown = ", ".join(repr(value) for value in list(values)[:3])
    return shown if len(values) <= 3 else f"{shown} and {len(values) - 3} more"
