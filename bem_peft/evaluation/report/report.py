"""The report of a comparison, and what `report.json` says of it (versioned, with a JSON Schema)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bem_peft.evaluation.pareto import Objective, ParetoPoint
from bem_peft.evaluation.profile_document import ProfileDocument
from bem_peft.evaluation.promotion import Promotion
from bem_peft.evaluation.results import QUALITY, SystemResult
from bem_peft.evaluation.slices import SliceResult

VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


@dataclass
class Report:
    """All that a comparison found. `comparisons`: system -> results against the anchor."""

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

    @property
    def values(self) -> list[str]:
        """What every system has a value of: the objectives, after their quality the other metrics of quality."""
        names = [objective.name for objective in self.objectives]
        others = [m for m in QUALITY if m not in names and all(m in s.values for s in self.systems)]
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
        for text, names in found.items():
            who = ", ".join(names) if len(names) <= 3 else f"{len(names)} systems"
            lines.append(f"{text} ({who})")
        return lines
