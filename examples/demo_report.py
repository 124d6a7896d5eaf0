"""The demo's results as a report: the adapters against LoRA, verse by verse."""

from __future__ import annotations

from typing import Any

from bem_peft import ComprehensiveEvaluator, Scores
from bem_peft.evaluation.formats.run_folder import with_length_slices
from bem_peft.evaluation.report.report import Report
from bem_peft.evaluation.results import SystemResult
from bem_peft.experiments.provenance import provenance

WARNING = "one seed and one learning rate: a demonstration, not a comparison to choose by"


def comparison(results: dict[str, dict[str, Any]], anchor: str, settings: dict[str, Any]) -> Report | None:
    """The report on the held-out verses, whose chapters are clusters; None without the anchor or another adapter."""
    trained = [result for name, result in results.items() if name != "base"]
    if len(trained) < 2 or all(result["title"] != anchor for result in trained):
        return None
    title = f"Demo: {settings['steps']} steps of {settings['batch']} verses"
    systems = [system_of(result, settings) for result in trained]
    return ComprehensiveEvaluator(systems, anchor, stands_on="slice_b", title=title).report()


def system_of(result: dict[str, Any], settings: dict[str, Any]) -> SystemResult:
    records = [
        {
            "seed": settings["seed"],
            "id": item["id"],
            "value": item["nll"] / item["tokens"],
            "cluster": item["id"].rpartition(":")[0],
            "sha256": item["sha256"],
        }
        for item in result["items"]
    ]
    scores = Scores.from_records(records, system=result["title"], metric="nll", higher_is_better=False)
    return SystemResult(
        name=result["title"],
        method=result["title"],
        values={"nll": float(scores.values.mean()), "parameters": float(result["parameters"])},
        scores={"nll": with_length_slices(scores, {item["id"]: item["tokens"] for item in result["items"]})},
        budget=result["budget"],
        seeds=(settings["seed"],),
        provenance=[provenance(settings, settings["seed"])],
        warnings=(WARNING,),
    )
