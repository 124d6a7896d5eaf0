"""A whole comparison: systems against an anchor on every metric and slice, on the Pareto frontiers, and judged.

report = ComprehensiveEvaluator(read_results(paths), anchor="anchor-lora", stands_on="slice_b").report()
write_files(report, folder)                                  # report.json, report.md, report.html (report/files.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

from bem_peft._version import __version__
from bem_peft.evaluation.intervals import Comparison
from bem_peft.evaluation.outlook import Outlook, outlooks
from bem_peft.evaluation.paired import PairedScores
from bem_peft.evaluation.pareto import Objective, ParetoAnalyzer, ParetoPoint
from bem_peft.evaluation.profile_document import ProfileDocument
from bem_peft.evaluation.promotion import Promotion, judge
from bem_peft.evaluation.ranking import Ranking, rank_systems
from bem_peft.evaluation.rate_curves import RateCurve, rate_curves
from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.resampling import resampled_means
from bem_peft.evaluation.results import SystemResult, shared_objectives
from bem_peft.evaluation.scores import Scores
from bem_peft.evaluation.slices import (
    DEVELOPMENT,
    HELD_OUT,
    Unjudged,
    check_disjoint,
    judge_slices,
    measure_slices,
)


class ComprehensiveEvaluator:
    """Compares systems with an anchor.

    Args:
        systems: at least two, the anchor among them.
        anchor: name of the system that the others are measured against.
        stands_on: "slice_a" (development) or "slice_b" (held out): what the scores were made on.
        development: results on Slice-A, whose items must not be among the held-out ones.
        margin: how much worse counts as no worse, one for all metrics or one a metric.
        correction: "by", "bh" or "holm".
        quality: the metric that the Pareto frontiers trade against costs; None: the first that every system has, of
            nll, accuracy, exact_match, f1, rouge_l, json_validity, bleu, chrf, then by name.
        profiles: times of the systems by name, of `PerformanceProfiler`; their medians are costs.
        progress: wraps the names of the systems while they are compared, as tqdm does.

    Raises:
        ValueError: an anchor that is not there or stands alone, another direction of slices, items in both slices, a
            quality that a system lacks, or profiles of none of the systems.
    """

    def __init__(
        self,
        systems: Sequence[SystemResult],
        anchor: str,
        *,
        stands_on: str = DEVELOPMENT,
        development: Sequence[SystemResult] = (),
        margin: float | Mapping[str, float] = 0.0,
        correction: str = "by",
        confidence: float = 0.95,
        title: str = "Comparison of adapters",
        quality: str | None = None,
        profiles: ProfileDocument | None = None,
        progress: Callable[[list[str]], Iterable[str]] = iter,
    ) -> None:
        self.progress = progress
        if profiles is not None:
            systems = profiles.with_times(systems)
        self.left_out = frozenset().union(*(system.left_out for system in systems))
        self.systems = {system.name: system.without(self.left_out) for system in systems}
        self.profiles = profiles
        qualities = [objective.name for objective in shared_objectives(systems)[0]]
        if quality is not None and quality not in qualities:
            raise ValueError(f"`quality` = {quality!r}: must be one that every system has, of {', '.join(qualities)}.")
        self.quality = quality
        known = {metric for system in systems for metric in system.scores}
        strange = [metric for metric in margin if metric not in known] if isinstance(margin, Mapping) else []
        if strange:
            raise ValueError(f"`margin` of {strange[0]!r}: the systems were scored by {', '.join(sorted(known))}.")
        if anchor not in self.systems:
            raise ValueError(f"`anchor` = {anchor!r}: must be one of {', '.join(self.systems)}.")
        if len(self.systems) < 2:
            raise ValueError(f"{anchor!r} is the only system: give another one too, to compare it with.")
        if stands_on not in (DEVELOPMENT, HELD_OUT):
            raise ValueError(f"`stands_on` = {stands_on!r}: must be {DEVELOPMENT!r} or {HELD_OUT!r}.")
        if development and stands_on != HELD_OUT:
            raise ValueError(
                "`development` results go with stands_on='slice_b': they are what the others are held out of."
            )
        self.anchor, self.stands_on, self.title = anchor, stands_on, title
        self.margin, self.correction, self.confidence = margin, correction, confidence
        held = _contents(systems)
        for seen in _contents(development):
            for other in held:
                check_disjoint(seen, other)

    def pairs(self, system: str) -> dict[str, PairedScores]:
        """Metric -> the system's and the anchor's scores.

        Raises:
            ValueError: the two were scored on other items or seeds.
        """
        mine, base = self.systems[system].scores, self.systems[self.anchor].scores
        return {m: PairedScores(mine[m], base[m]) for m in mine if m in base}

    def quality_objective(self) -> Objective | None:
        """The metric that is traded against costs: the one asked for, or the first that every system has and under
        which some item scores."""
        qualities, _ = shared_objectives(list(self.systems.values()))
        if self.quality is not None:
            return next((found for found in qualities if found.name == self.quality), None)
        for found in qualities:
            scores = self._scores_of(found.name)
            if scores is None or any(one.values.any() for one in scores):
                return found
        return next(iter(qualities), None)

    def objectives(self) -> list[Objective]:
        """One of quality, then the costs, that every system has a value of; several qualities would rank nobody."""
        quality = self.quality_objective()
        return [*([quality] if quality else []), *shared_objectives(list(self.systems.values()))[1]]

    def pareto(self) -> list[ParetoPoint]:
        """Every system's place; empty where fewer than two objectives are known of all.

        Probabilities come from 1,000 joint resamples of seeds and items (clusters), the same for every system.
        """
        objectives, quality = self.objectives(), self.quality_objective()
        if len(objectives) < 2 or quality is None:
            return []
        analyzer, scores = ParetoAnalyzer(objectives), self._scores_of(quality.name)
        draws = None if scores is None else resampled_means(scores)
        for row, system in enumerate(self.systems.values()):
            found = None if draws is None else {quality.name: draws[row]}
            analyzer.add_result(system.name, {o.name: system.values[o.name] for o in objectives}, found)
        return analyzer.analyze()

    def ranking(self) -> Ranking | None:
        """The systems in their order under the metric of quality; None where they were not scored on the same items."""
        quality = self.quality_objective()
        scores = None if quality is None else self._scores_of(quality.name)
        return None if scores is None else rank_systems(scores, self.confidence)

    def curves(self) -> list[RateCurve]:
        """Runs that differ by their learning rate alone, under the metric of quality."""
        quality = self.quality_objective()
        if quality is None:
            return []
        return rate_curves(list(self.systems.values()), quality.name, quality.higher_is_better)

    def _scores_of(self, metric: str) -> list[Scores] | None:
        """Every system's scores under `metric`, or None where one has none."""
        found = [system.scores.get(metric) for system in self.systems.values()]
        scores = [one for one in found if one is not None]
        return scores if len(scores) == len(found) else None

    def report(self) -> Report:
        """Everything, judged."""
        compared: dict[str, dict[tuple[str, str], Comparison]] = {}
        unjudged: dict[str, list[Unjudged]] = {}
        outlook: list[Outlook] = []
        for name in self.progress([name for name in self.systems if name != self.anchor]):
            pairs = self.pairs(name)
            if pairs:
                compared[name], unjudged[name] = measure_slices(pairs, confidence=self.confidence)
                margins = self.margin if isinstance(self.margin, Mapping) else dict.fromkeys(pairs, self.margin)
                outlook += outlooks(name, pairs, margins, self.confidence)
        judged = judge_slices(compared, stands_on=self.stands_on, margin=self.margin, correction=self.correction)
        points = {point.name: point for point in self.pareto()}
        promotions: list[Promotion] = [
            judge(name, judged.get(name, []), system.budget_is_met, points.get(name), unjudged.get(name, []))
            for name, system in self.systems.items()
            if name != self.anchor
        ]
        return Report(
            title=self.title,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            bem_peft_version=__version__,
            anchor=self.anchor,
            stands_on=self.stands_on,
            confidence=self.confidence,
            correction=self.correction,
            objectives=self.objectives(),
            systems=list(self.systems.values()),
            comparisons=judged,
            pareto=list(points.values()),
            promotions=promotions,
            profiles=self.profiles,
            unjudged={name: found for name, found in unjudged.items() if found},
            outlooks=outlook,
            ranking=self.ranking(),
            curves=self.curves(),
            left_out=sorted(self.left_out),
        )


def _contents(systems: Sequence[SystemResult]) -> list[dict[str, str]]:
    """Each different set of items once, id -> sha256 of its content (its id where no hash is known)."""
    found: list[dict[str, str]] = []
    known: set[tuple[str, ...]] = set()
    for system in systems:
        for scores in system.scores.values():
            hashes = scores.sha256 or scores.items
            if hashes not in known:
                known.add(hashes)
                found.append(dict(zip(scores.items, hashes, strict=True)))
    return found
