"""result.json of a seed: loss and other metrics, sizes, provenance; and the files of its items beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from bem_peft.budget.parameters import ParameterCount, count_parameters, logical_size
from bem_peft.experiments.prepared import PreparedData
from bem_peft.experiments.provenance import provenance
from bem_peft.experiments.retained import score_texts, write_texts
from bem_peft.experiments.scoring import score_model
from bem_peft.experiments.sections import EvaluationSection
from bem_peft.experiments.seed_folder import RESULT, PartialScores, fingerprint
from bem_peft.whole_file import write_whole

RESULT_VERSION = 1


def score_seed(
    model: PreTrainedModel | PeftModel, prepared: PreparedData, folder: Path, *, name: str, seed: int,
    config: PeftConfig | None, evaluation: EvaluationSection, settings: Mapping[str, Any], about: Mapping[str, Any],
    batch: int, label: str, is_quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score the model and write all that a seed's folder holds; the result last: a folder that has one is whole.

    Args:
        config: of the adapter; None: `model` is a base model alone.
        about: what the result says beside it; its "metrics" are added to those of the items.
    """
    scores = score_model(
        model, prepared.tokenizer, prepared.evaluation, folder, evaluation=evaluation, batch=batch, label=label,
        is_quiet=is_quiet,
    )  # fmt: skip
    metrics = scores.metrics() | about.get("metrics", {})
    if prepared.retained is not None:
        lines = score_texts(model, prepared.tokenizer, prepared.retained, batch=batch)
        metrics |= write_texts(folder / "retain.jsonl", lines)
    scores.write(folder / "items.jsonl")
    result = {
        "version": RESULT_VERSION,
        "name": name,
        "seed": seed,
        "adapter": {} if config is None else json.loads(json.dumps(config.to_dict(), default=sorted)),
        "metrics": metrics,
        "parameters": vars(_parameters(model)),
        "precision": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "items_sha256": fingerprint(scores.items),
        "provenance": provenance(settings, seed),
        "too_long": prepared.too_long,
        **{name: value for name, value in about.items() if name != "metrics"},
    }
    write_result(folder, result)
    PartialScores(folder).remove()
    return result


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    write_whole(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _parameters(model: PreTrainedModel | PeftModel) -> ParameterCount:
    """Of the adapter; a base model alone has none."""
    if isinstance(model, PeftModel):
        return count_parameters(model)
    return ParameterCount(0, 0, 0, sum(map(logical_size, model.parameters())), 0)
