"""The report of a comparison: `report.json` (versioned, with a JSON Schema), `report.md` for a card, `report.html`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bem_peft.evaluation.pareto import Objective, ParetoPoint
from bem_peft.evaluation.profile_document import ProfileDocument
from bem_peft.evaluation.promotion import Promotion, interval_text
from bem_peft.evaluation.results import QUALITY, SystemResult
from bem_peft.evaluation.slices import SliceResult
from bem_peft.whole_file import write_whole

VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
STANDS = {"slice_a": "Slice-A (development)", "slice_b": "Slice-B (held out)"}


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

    def to_markdown(self) -> str:
        """Tables for a model card: verdicts, differences, values."""
        lines = [
            f"## {self.title}",
            "",
            f"Against `{self.anchor}` on {STANDS[self.stands_on]}; intervals of {self.confidence:.0%}, "
            f"p-values corrected over metrics and slices ({self.correction}).",
            "",
        ]
        names = self.values
        lines += ["| system | method | " + " | ".join(names) + " | seeds | budget |"]
        lines += ["| --- | --- |" + " ---: |" * len(names) + " ---: | --- |"]
        for system in self.systems:
            values = " | ".join(number(system.values[name]) for name in names)
            count = len(system.seeds)
            lines.append(f"| {system.name} | {system.method} | {values} | {count} | {budget_text(system)} |")
        if self.comparisons:
            lines += [
                "",
                "Differences are from the anchor; above zero is better, also where less of the metric is (nll).",
            ]
            lines += ["", "| system | metric | slice | difference | adjusted p | verdict |"]
            lines += ["| --- | --- | --- | ---: | ---: | --- |"]
        for name, results in self.comparisons.items():
            for found in results:
                p = f"{found.adjusted_p_value:.3g}"
                cells = (name, found.metric, found.slice, interval_text(found), p, verdict_text(found))
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| system | verdict | reasons |", "| --- | --- | --- |"]
        lines += [f"| {p.system} | {p.verdict} | {'; '.join(p.reasons)} |" for p in self.promotions]
        if self.profiles is not None:
            lines += ["", self.profiles.to_markdown()]
        warnings = self.warnings()
        if warnings:
            lines += ["", *[f"- {text}" for text in warnings]]
        return "\n".join(lines) + "\n"

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

    def write(self, folder: Path) -> list[Path]:
        """Write report.json, report.md and report.html, each whole or not at all; returns their paths."""
        from bem_peft.evaluation.report.html import to_html

        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, text in (
            ("report.json", self.to_json()), ("report.md", self.to_markdown()), ("report.html", to_html(self)),
        ):  # fmt: skip
            path = folder / name
            write_whole(path, text)
            written.append(path)
        return written


def number(value: float) -> str:
    """A value in few characters: 783,360; 0.965; 1.2e-05."""
    if value == int(value) and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def budget_text(system: SystemResult) -> str:
    return {None: "not measured", True: "kept", False: "not kept"}[system.budget_is_met]


def verdict_text(found: SliceResult) -> str:
    """What a result says, in two words."""
    if found.comparison.is_conditional:
        return "one seed"
    if found.is_better:
        return "better"
    if found.is_worse:
        return "worse"
    return "may be worse" if found.is_inferior else "no worse"
