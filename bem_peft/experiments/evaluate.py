"""Score a saved adapter of any PEFT method, and write what a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from bem_peft.experiments.experiment import check_counts, check_evaluation, check_item_fields
from bem_peft.experiments.items import read_evaluation_items
from bem_peft.experiments.loading import load_model, load_tokenizer
from bem_peft.experiments.prepared import prepare
from bem_peft.experiments.sections import DataSection, EvaluationSection, ModelSection
from bem_peft.experiments.seed_folder import begin
from bem_peft.experiments.seed_result import score_seed
from bem_peft.json_text import read_json
from bem_peft.whole_file import prove_writable


def evaluate_adapter(
    adapter: str, data: DataSection, folder: Path, *, name: str, seed: int = 0, base: str | None = None, batch: int = 8,
    evaluation: EvaluationSection | None = None, dtype: str | None = None, revision: str | None = None,
    attn_implementation: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a saved adapter on the evaluation items of `data`, and write what `run` writes. A stopped one goes on.

    Args:
        adapter: folder or hub id.
        base: of the base model; None: the one that the adapter names. revision, attn_implementation: of it.
        dtype: of the base model; None: that of the run whose adapter it is, where its result stands beside it, else
            "auto".
        folder: gets seed-<seed>/result.json and items.jsonl.
        seed: the seed that the adapter was trained with, by which results are paired.
        evaluation: metrics; None: the loss alone.

    Raises:
        ValueError: data that do not fit the templates, a metric that cannot be had, or a result that is there already.
    """
    evaluation = EvaluationSection() if evaluation is None else evaluation
    problems: list[str] = []
    check_item_fields(data, "", problems)
    check_evaluation(evaluation, "", problems)
    check_counts(data, "", problems)
    if batch < 1:
        problems.append(f"batch = {batch}: must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    out = folder / f"seed-{seed}"
    if (out / "result.json").exists():
        raise ValueError(f"{out / 'result.json'} is there already: choose another folder or seed.")
    items = read_evaluation_items(data)
    prove_writable(folder)
    config = PeftConfig.from_pretrained(adapter)
    path = base or config.base_model_name_or_path
    if path is None:
        raise ValueError(f"{adapter} names no base model: give `base`.")
    section = ModelSection(path, dtype or _dtype_of_run(Path(adapter)), revision, attn_implementation)
    tokenizer, is_seq2seq = load_tokenizer(section)
    prepared = prepare(data, evaluation, tokenizer, is_seq2seq, training_items=None, evaluation_items=items)
    settings = {
        "adapter": adapter, "model": vars(section), "data": vars(data), "evaluation": vars(evaluation)
    }  # fmt: skip
    begin(out, {**settings, **prepared.fingerprints})
    model = PeftModel.from_pretrained(load_model(section), adapter)
    model.set_requires_grad(model.active_adapters, True)  # as when it was trained: what counts as its parameters
    return score_seed(
        model, prepared, out, name=name, seed=seed, config=config, evaluation=evaluation, settings=settings,
        about={"budget": None, "training_seconds": 0.0}, batch=batch, label=name,
    )  # fmt: skip


def _dtype_of_run(adapter: Path) -> str:
    """The precision that the run scored its adapter in; "auto" where no result stands beside the adapter."""
    beside = adapter.parent / "result.json"
    return str(read_json(beside).get("precision", "auto")) if beside.is_file() else "auto"
