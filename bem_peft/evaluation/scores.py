"""Scores of one system, item by item and seed by seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bem_peft.evaluation.corpus import pseudo_values
from bem_peft.evaluation.metrics import corpus_metric
from bem_peft.json_text import read_json
from bem_peft.whole_file import write_whole

VERSION = 1


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
                raise ValueError(f"scores of {system!r}: seed {seed} has no score for {some(missing)}.")
        slices: dict[str, set[str]] = {}
        for item, (_, _, names) in about.items():
            for name in names:
                slices.setdefault(name, set()).add(item)

        def column(position: int, name: str) -> tuple[str, ...] | None:
            found = [about[item][position] for item in items]
            without = [item for item, value in zip(items, found, strict=True) if value is None]
            if without and len(without) < len(items):
                raise ValueError(
                    f"scores of {system!r}: no `{name}` of {some(without)}, and one of the others: give every item "
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


def _first_twice(values: Sequence[Any]) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def some(values: Sequence[Any]) -> str:
    """The first of them, for a message."""
    if not values:
        return "none"
    shown = ", ".join(repr(value) for value in list(values)[:3])
    return shown if len(values) <= 3 else f"{shown} and {len(values) - 3} more"
