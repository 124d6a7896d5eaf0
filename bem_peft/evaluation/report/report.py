"""The report of a comparison, and what `report.json` says of it (versioned, with a JSON Schema)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bem_peft.evaluation.outlook import Outlook
from bem_peft.evaluation.pareto import Objective, ParetoPoint
from bem_peft.evaluation.profile_document import ProfileDocument
from bem_peft.evaluation.promotion import Promotion
from bem_peft.evaluation.ranking import Ranking
from bem_peft.evaluation.rate_curves import RateCurve
from bem_peft.evaluation.results import SystemResult, shared_objectives
from bem_peft.evaluation.slices import SliceResult, Unjudged

VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


@dataclass
class Report:
    """All that a comparison found.

    comparisons: system -> results against the anchor. unjudged: system -> what nothing can be said of. outlooks: what
    more data would give. ranking: under the metric of quality. curves: runs that differ by their rate alone. left_out:
    ids of items that some system could not be scored on.
    """

    title: str
    created: str
    bem_peft_version: str
    anchor: str
    stands_on: str
    confidence: float
    correction: str
    objectives: list[Objective]
    systems: list[SystemResult]
    comparisons: dict[str, list[SliceResult]]
    pareto: list[ParetoPoint]
    promotions: list[Promotion]
    profiles: ProfileDocument | None = None
    unjudged: dict[str, list[Unjudged]] = field(default_factory=dict)
    outlooks: list[Outlook] = field(default_factory=list)
    ranking: Ranking | None = None
    curves: list[RateCurve] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def values(self) -> list[str]:
        """What every system has a value of: the objectives, after their quality the other metrics of quality."""
        names = [objective.name for objective in self.objectives]
        others = [q.name for q in shared_objectives(self.systems)[0] if q.name not in names]
        return [*names[:1], *others, *names[1:]]

    def to_dict(self) -> dict[str, Any]:
        """As `report.json` has it; `report.schema.json` describes it."""
        return {
            "version": VERSION,
            "title": self.title,
            "created": self.created,
            "bem_peft_version": self.bem_peft_version,
            "anchor": self.anchor,
            "stands_on": self.stands_on,
            "confidence": self.confidence,
            "correction": self.correction,
            "objectives": [asdict(objective) for objective in self.objectives],
            "systems": [
                {
                    "name": system.name,
                    "method": system.method,
                    "values": system.values,
                    "seeds": list(system.seeds),
                    "items": {metric: len(scores.items) for metric, scores in system.scores.items()},
                    "budget": system.budget,
                    "budget_is_met": system.budget_is_met,
                    "warnings": list(system.warnings),
                    "provenance": system.provenance,
                }
                for system in self.systems
            ],
            "comparisons": {name: [found.to_dict() for found in results] for name, results in self.comparisons.items()},
            "pareto": [asdict(point) for point in self.pareto],
            "promotions": [promotion.to_dict() for promotion in self.promotions],
            "unjudged": {name: [asdict(left) for left in found] for name, found in self.unjudged.items()},
            "outlooks": [found.to_dict() for found in self.outlooks],
            "ranking": None if self.ranking is None else asdict(self.ranking),
            "curves": [asdict(curve) | {"is_bracketed": curve.is_bracketed} for curve in self.curves],
            "left_out": self.left_out,
            "profiles": None if self.profiles is None else self.profiles.to_dict(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def warnings(self) -> list[str]:
        """Each warning once, with the systems that it concerns."""
        found: dict[str, list[str]] = {}
        for system in self.systems:
            for text in system.warnings:
                found.setdefault(text, []).append(system.name)
        lines = []
        if self.left_out:
            some = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            lines.append(f"{len(self.left_out)} item(s) that some system was not scored on are left out of all: {some}")
        for text, names in found.items():
            who = ", ".join(names) if len(names) <= 3 else f"{len(names)} systems"
            lines.append(f"{text} ({who})")
        return lines
