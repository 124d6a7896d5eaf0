"""Results in a model card: `model-index` metadata, a section of tables, and `.eval_results/` for the Hub's datasets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard
from huggingface_hub import eval_result_entries_to_yaml as entries_to_yaml

from bem_peft.evaluation.report.markdown import to_markdown
from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.report.text import STANDS
from bem_peft.evaluation.results import QUALITY
from bem_peft.whole_file import write_whole

START, END = "<!-- bem_peft: evaluation -->", "<!-- bem_peft: end of evaluation -->"
TASK = "text-generation"


def check_card(text: str, systems: Sequence[str], dataset: str | None) -> tuple[str, Path]:
    """(system, folder) of "SYSTEM=FOLDER", before anything is computed.

    Raises:
        ValueError: no such system, no adapter in the folder, or no name of the dataset.
    """
    system, equals, folder = text.partition("=")
    if not equals or system not in systems:
        raise ValueError(f"--card {text}: write SYSTEM=FOLDER with a system of {', '.join(systems)}.")
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"--card {text}: {folder} holds no adapter (no adapter_config.json).")
    if dataset is None:
        raise ValueError("--card needs --dataset, the name that the card gives the data.")
    return system, Path(folder)


def eval_results(report: Report, system: str, dataset: str, dataset_id: str | None = None) -> list[EvalResult]:
    """One entry a metric of quality: the mean over seeds. Raises KeyError for a system that is not in the report."""
    found = {s.name: s for s in report.systems}[system]
    about = {"seeds": len(found.seeds), "stands_on": report.stands_on, "anchor": report.anchor}
    return [
        EvalResult(
            task_type=TASK, dataset_type=dataset_id or re.sub(r"\W+", "-", dataset).strip("-").lower(),
            dataset_name=dataset, metric_type=metric, metric_value=found.values[metric], metric_name=metric,
            metric_args=about,
        )
        for metric in QUALITY if metric in found.values
    ]  # fmt: skip


def write_card(report: Report, system: str, folder: Path, dataset: str, dataset_id: str | None = None) -> list[Path]:
    """Write the results into `folder/README.md`, and with `dataset_id` into `folder/.eval_results/`.

    What else stands in the card stays; results on the same data and metric, and the section of an earlier report, are
    replaced. Returns the paths.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    card: Any = ModelCard(text)
    new = eval_results(report, system, dataset, dataset_id)
    kept = [
        old for old in card.data.eval_results or []
        if not any((old.dataset_type, old.metric_type) == (n.dataset_type, n.metric_type) for n in new)
    ]  # fmt: skip
    card.data.model_name = card.data.model_name or system
    card.data.eval_results = [*kept, *new]
    body = re.sub(rf"\n*{re.escape(START)}.*?{re.escape(END)}\n*", "\n", card.text, flags=re.S).rstrip()
    card.text = f"{body}\n\n{START}\n\n{to_markdown(report)}\n{END}\n"
    write_whole(path, str(card))
    written = [path]
    if dataset_id is not None:
        notes = (
            f"mean over {len({s.name: s for s in report.systems}[system].seeds)} seed(s), {STANDS[report.stands_on]}"
        )
        entries = [
            EvalResultEntry(dataset_id=dataset_id, task_id=n.metric_type, value=n.metric_value, notes=notes,
                            date=report.created)
            for n in new
        ]  # fmt: skip
        out = folder / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '--', dataset_id)}.yaml"
        out.parent.mkdir(exist_ok=True)
        write_whole(out, yaml.safe_dump(entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
        written.append(out)
    return written
