"""A report as files: `report.json` (versioned, with a JSON Schema), `report.md` for a card, `report.html`."""

from __future__ import annotations

from pathlib import Path

from bem_peft.evaluation.report.html import to_html
from bem_peft.evaluation.report.markdown import to_markdown
from bem_peft.evaluation.report.report import Report
from bem_peft.whole_file import write_whole


def write_files(report: Report, folder: Path) -> list[Path]:
    """Write report.json, report.md and report.html, each whole or not at all; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (
        ("report.json", report.to_json()), ("report.md", to_markdown(report)), ("report.html", to_html(report)),
    ):  # fmt: skip
        path = folder / name
        write_whole(path, text)
        written.append(path)
    return written
