"""What a check of a budget found: a line a quantity, as a table, as JSON, and as the error of a budget not kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"


@dataclass(frozen=True)
class BudgetLine:
    """One quantity. `deviation_ratio` is measured / anchor - 1; `how` says how it was found, and whether exactly."""

    quantity: str
    unit: str
    measured: float | None
    anchor: float
    deviation_ratio: float | None
    lower: float
    upper: float
    verdict: str
    how: str


def judged(
    quantity: str, unit: str, measured: float | None, anchor: float, tolerance_ratio: float, how: str
) -> BudgetLine:
    """The line of a measured number against the anchor's; None, which could not be measured, fails."""
    lower, upper = anchor * (1 - tolerance_ratio), anchor * (1 + tolerance_ratio)
    if measured is None:
        return BudgetLine(quantity, unit, None, anchor, None, lower, upper, FAIL, how)
    verdict = PASS if lower <= measured <= upper else FAIL
    return BudgetLine(quantity, unit, measured, anchor, measured / anchor - 1, lower, upper, verdict, how)


@dataclass(frozen=True)
class BudgetReport:
    """All lines of one check."""

    lines: tuple[BudgetLine, ...]
    scope: str
    tolerance_ratio: float

    @property
    def is_met(self) -> bool:
        """Whether every line passed."""
        return all(line.verdict == PASS for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "is_met": self.is_met,
            "scope": self.scope,
            "tolerance_ratio": self.tolerance_ratio,
            "lines": [asdict(line) for line in self.lines],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_markdown(self) -> str:
        head = ("quantity", "measured", "anchor", "deviation", "allowed", "verdict", "how")
        rows = [(*_cells(line), line.how) for line in self.lines]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))

    def __str__(self) -> str:
        rows = [("quantity", "measured", "anchor", "deviation", "allowed", "verdict"), *map(_cells, self.lines)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        how = [""] + [line.how for line in self.lines]
        return "\n".join(f"{row}  {note}".rstrip() for row, note in zip(text, how, strict=True))


class BudgetError(ValueError):
    """A budget is not kept; `report` says by what."""

    def __init__(self, report: BudgetReport) -> None:
        self.report = report
        super().__init__(
            f"the budget is not kept (scope {report.scope}, tolerance {report.tolerance_ratio:.1%}):\n{report}\n"
            "Choose sizes with bem_peft.match_budget, or widen `tolerance_ratio`."
        )


def _cells(line: BudgetLine) -> tuple[str, str, str, str, str, str]:
    def number(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if line.quantity == "latency" else f"{value:,.0f}"

    deviation = "-" if line.deviation_ratio is None else f"{line.deviation_ratio:+.2%}"
    allowed = f"{number(line.lower)} to {number(line.upper)}"
    return line.quantity, number(line.measured), number(line.anchor), deviation, allowed, line.verdict
