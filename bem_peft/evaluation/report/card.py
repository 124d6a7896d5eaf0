"""Results in a model card: `model-index` metadata, a section of tables, and `.eval_results/` for the Hub's datasets.

A card belongs to whoever wrote it. Its metadata is taken apart as text: the block of `model-index` alone is written
again, and in it our own entry alone changes; everything else stays as it stands, to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry
from huggingface_hub import eval_result_entries_to_yaml as entries_to_yaml

from bem_peft.evaluation.report.markdown import to_markdown
from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.report.text import STANDS
from bem_peft.evaluation.results import shared_objectives
from bem_peft.json_text import text_of
from bem_peft.whole_file import write_whole

START, END = "<!-- bem_peft: evaluation -->", "<!-- bem_peft: end of evaluation -->"
TASK = "text-generation"
OURS = {"seeds", "stands_on", "anchor"}  # the `args` of a metric that we wrote
INDEX = re.compile(r"^model-index:.*?(?=^[^\s#-]|\Z)", re.S | re.M)


@dataclass
class Card:
    """A README.md in parts. head: the metadata without its rules; None: there is none. newline: as the file has it."""

    head: str | None
    body: str
    newline: str

    @classmethod
    def read(cls, path: Path) -> Card:
        """Raises ValueError for metadata that is no YAML mapping, or marks of ours that do not pair."""
        text = text_of(path) if path.is_file() else "---\nlibrary_name: peft\n---\n"
        newline = "\r\n" if "\r\n" in text else "\n"
        text = text.replace("\r\n", "\n")
        found = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", text, re.S | re.M)
        card = cls(None, text, newline) if found is None else cls(found[1], text[found.end() :], newline)
        if (
            card.body.count(START) != card.body.count(END)
            or card.body.count(START) > 1
            or (START in card.body and card.body.index(END) < card.body.index(START))
        ):
            raise ValueError(
                f"{path}: {START!r} and {END!r} must stand once each and in this order, or not at all: what lies "
                "between them is written anew; mend them, or take both out."
            )
        card.index(path)
        return card

    def index(self, path: Path) -> list[dict[str, Any]]:
        """What the metadata says under `model-index`. Raises ValueError where it is of no form that the Hub knows."""
        try:
            metadata = yaml.safe_load(self.head or "") or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: its metadata is no YAML ({error}).") from None
        found = metadata.get("model-index") or [] if isinstance(metadata, dict) else None
        if not isinstance(found, list) or any(
            not isinstance(model, dict) or not isinstance(model.get("results", []), list) for model in found
        ):
            raise ValueError(f"{path}: its `model-index` must be a list of models, each with a list of `results`.")
        return found

    def with_index(self, index: list[dict[str, Any]]) -> str:
        """The metadata with this `model-index`."""
        block = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True, width=10_000)
        head = self.head or ""
        if INDEX.search(head):
            return INDEX.sub(lambda _: block, head, count=1)
        return head + ("" if head.endswith("\n") or not head else "\n") + block

    def text(self, head: str) -> str:
        return f"---\n{head}---\n{self.body}".replace("\n", self.newline)


def check_card(text: str, systems: Sequence[str], dataset: str | None) -> tuple[str, Path]:
    """(system, folder) of "SYSTEM=FOLDER", before anything is computed.

    Raises:
        ValueError: no such system, no adapter in the folder, no name of the dataset, or a card that cannot be kept.
    """
    system, equals, folder = text.rpartition("=") if text.rpartition("=")[0] in systems else text.partition("=")
    if not equals or system not in systems:
        raise ValueError(f"--card {text}: write SYSTEM=FOLDER with a system of {', '.join(systems)}.")
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"--card {text}: {folder} holds no adapter (no adapter_config.json).")
    if dataset is None:
        raise ValueError("--card needs --dataset, the name that the card gives the data.")
    Card.read(Path(folder) / "README.md")
    return system, Path(folder)


def index_entry(report: Report, system: str, dataset: str, dataset_id: str | None = None) -> dict[str, Any]:
    """Our entry of `model-index`: the mean over seeds of each metric of quality. Raises KeyError for no such system."""
    found = {s.name: s for s in report.systems}[system]
    about = {"seeds": len(found.seeds), "stands_on": report.stands_on, "anchor": report.anchor}
    metrics = [
        {"type": quality.name, "value": found.values[quality.name], "name": quality.name, "args": about}
        for quality in shared_objectives([found])[0]
    ]
    name = dataset_id or re.sub(r"\W+", "-", dataset).strip("-").lower()
    return {"task": {"type": TASK}, "dataset": {"type": name, "name": dataset}, "metrics": metrics}


def _is_ours(metric: Any, result: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether we wrote this metric of a result, on the same data: without a configuration, a split or a source."""
    dataset = result.get("dataset")
    arguments = metric.get("args") if isinstance(metric, dict) else None
    return (
        isinstance(dataset, dict)
        and dataset.get("type") == entry["dataset"]["type"]
        and not {"config", "split", "revision"} & set(dataset)
        and "source" not in result
        and isinstance(arguments, dict)
        and set(arguments) == OURS
    )


def merged(index: list[dict[str, Any]], entry: dict[str, Any], system: str) -> list[dict[str, Any]]:
    """`index` with our entry in its first model, in place of what we wrote there before."""
    first, *others = index or [{"name": system, "results": []}]
    results = []
    for result in first.get("results", []):
        metrics = result.get("metrics") if isinstance(result, dict) else None
        if isinstance(metrics, list):
            kept = [metric for metric in metrics if not _is_ours(metric, result, entry)]
            if len(kept) != len(metrics):
                if kept:
                    results.append({**result, "metrics": kept})
                continue
        results.append(result)
    return [{**first, "results": [*results, entry]}, *others]


def write_card(report: Report, system: str, folder: Path, dataset: str, dataset_id: str | None = None) -> list[Path]:
    """Write the results into `folder/README.md`, and with `dataset_id` into `folder/.eval_results/`.

    What else stands in the card stays; our results on the same data, and the section of an earlier report, are
    replaced. Returns the paths.
    """
    path = folder / "README.md"
    card, entry = Card.read(path), index_entry(report, system, dataset, dataset_id)
    head = card.with_index(merged(card.index(path), entry, system))
    section = f"{START}\n\n{to_markdown(report)}\n{END}"
    if START in card.body:
        start, end = card.body.index(START), card.body.index(END) + len(END)
        card.body = card.body[:start] + section + card.body[end:]
    else:
        card.body = f"{card.body.rstrip()}\n\n{section}\n"
    write_whole(path, card.text(head))
    written = [path]
    if dataset_id is not None:
        seeds = entry["metrics"][0]["args"]["seeds"] if entry["metrics"] else 0
        notes = f"mean over {seeds} seed(s), {STANDS[report.stands_on]}"
        entries = [
            EvalResultEntry(dataset_id=dataset_id, task_id=metric["type"], value=metric["value"], notes=notes,
                            date=report.created)
            for metric in entry["metrics"]
        ]  # fmt: skip
        out = folder / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '--', dataset_id)}.yaml"
        out.parent.mkdir(exist_ok=True)
        write_whole(out, yaml.safe_dump(entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
        written.append(out)
    return written
