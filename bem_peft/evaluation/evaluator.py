"""A whole comparison: systems against an anchor on every metric and slice, on the Pareto frontiers, and judged.

report = ComprehensiveEvaluator(read_results(paths), anchor="anchor-lora", stands_on="slice_b").report()
write_files(report, folder)                                  # report.json, report.md, report.html (report/files.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

from bem_peft._version import __version__
from bem_peft.evaluation.pareto import Objective, ParetoAnalyzer, ParetoPoint
from bem_peft.evaluation.profile_document import ProfileDocument
from bem_peft.evaluation.promotion import Promotion, judge
from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.resampling import resampled_means
from bem_peft.evaluation.results import OBJECTIVES, QUALITY, SystemResult
from bem_peft.evaluation.scores import PairedScores
from bem_peft.evaluation.slices import DEVELOPMENT, HELD_OUT, SliceResult, check_disjoint, compare_slices


class ComprehensiveEvaluator:
    """Compares systems with an anchor.

    Args:
        systems: at least two, or one and the anchor among them.
        anchor: name of the system that the others are measured against.
        stands_on: "slice_a" (development) or "slice_b" (held out): what the scores were made on.
        development: results on Slice-A, whose items must not be among the held-out ones.
        margin: how much worse counts as no worse, one for all metrics or one a metric.
        correction: "by", "bh" or "holm".
        quality: the metric that the Pareto frontiers trade against costs; None: the first that every system has, of
            nll, accuracy, chrf, bleu, exact_match, f1, rouge_l, json_validity.
        profiles: times of the systems by name, of `PerformanceProfiler`; their medians are costs.
        progress: wraps the names of the systems while they are compared, as tqdm does.

    Raises:
        ValueError: an anchor that is not there, another direction of slices, items in both slices, a quality that a
            system lacks, or profiles of none of the systems.
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
        self.systems = {system.name: system for system in systems}
        self.profiles = profiles
        if quality is not None and (quality not in QUALITY or any(quality not in s.values for s in systems)):
            raise ValueError(f"`quality` = {quality!r}: must be of {', '.join(QUALITY)}, and every system's.")
        self.quality = quality
        known = {metric for system in systems for metric in system.scores}
        strange = [metric for metric in margin if metric not in known] if isinstance(margin, Mapping) else []
        if strange:
            raise ValueError(f"`margin` of {strange[0]!r}: the systems were scored by {', '.join(sorted(known))}.")
        if anchor not in self.systems:
            raise ValueError(f"`anchor` = {anchor!r}: must be one of {', '.join(self.systems)}.")
        if stands_on not in (DEVELOPMENT, HELD_OUT):
            raise ValueError(f"`stands_on` = {stands_on!r}: must be {DEVELOPMENT!r} or {HELD_OUT!r}.")
        if development and stands_on != HELD_OUT:
            raise ValueError(
                "`development` results go with stands_on='slice_b': they are what the others are held out of."
            )
        self.anchor, self.stands_on, self.title = anchor, stands_on, title
        self.margin, self.correction, self.confidence = margin, correction, confidence
        for system in development:
            for seen in system.scores.values():
                for other in systems:
                    for held in other.scores.values():
                        check_disjoint(
                            dict(zip(seen.items, seen.sha256 or seen.items, strict=True)),
                            dict(zip(held.items, held.sha256 or held.items, strict=True)),
                        )

    def comparisons(self) -> dict[str, list[SliceResult]]:
        """System -> its results against the anchor; nothing for systems without item scores.

        Raises:
            ValueError: systems that were scored on other items or seeds than the anchor.
        """
        base = self.systems[self.anchor]
        found = {}
        for name in self.progress(list(self.systems)):
            system = self.systems[name]
            pairs = {m: PairedScores(s, base.scores[m]) for m, s in system.scores.items() if m in base.scores}
            if name != self.anchor and pairs:
                found[name] = compare_slices(
                    pairs, stands_on=self.stands_on, margin=self.margin, confidence=self.confidence,
                    correction=self.correction,
                )  # fmt: skip
        return found

    def objectives(self) -> list[Objective]:
        """One of quality, then the costs, that every system has a value of; several qualities would rank nobody."""
        shared = [name for name in OBJECTIVES if all(name in s.values for s in self.systems.values())]
        quality = [self.quality] if self.quality is not None else [name for name in shared if name in QUALITY][:1]
        return [OBJECTIVES[name] for name in (*quality, *(name for name in shared if name not in QUALITY))]

    def pareto(self) -> list[ParetoPoint]:
        """Every system's place; empty where fewer than two objectives are known of all.

        Probabilities come from 1,000 joint resamples of seeds and items (clusters), the same for every system.
        """
        objectives = self.objectives()
        if len(objectives) < 2 or objectives[0].name not in QUALITY:
            return []
        analyzer, quality = ParetoAnalyzer(objectives), objectives[0].name
        names = [objective.name for objective in objectives]
        draws = resampled_means([s.scores[quality] for s in self.systems.values() if quality in s.scores])
        has_draws = draws is not None and len(draws) == len(self.systems)
        for row, system in enumerate(self.systems.values()):
            found = {quality: draws[row]} if draws is not None and has_draws else None
            analyzer.add_result(system.name, {n: system.values[n] for n in names}, found)
        return analyzer.analyze()

    def report(self) -> Report:
        """Everything, judged."""
        compared, points = self.comparisons(), {point.name: point for point in self.pareto()}
        promotions: list[Promotion] = [
            judge(name, compared.get(name, []), system.budget_is_met, points.get(name))
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
            comparisons=compared,
            pareto=list(points.values()),
            promotions=promotions,
            profiles=self.profiles,
        )
