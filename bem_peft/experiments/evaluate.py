"""Score a saved adapter of any PEFT method, and write what a run writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from bem_peft.budget.parameters import count_parameters
from bem_peft.experiments.experiment import check_counts, check_evaluation, check_item_fields
from bem_peft.experiments.items import read_evaluation_items
from bem_peft.experiments.loading import load_model, load_tokenizer
from bem_peft.experiments.prepared import prepare
from bem_peft.experiments.sections import DataSection, EvaluationSection, ModelSection
from bem_peft.experiments.seed_folder import RESULT, SETTINGS, begin
from bem_peft.experiments.seed_result import score_seed, write_result
from bem_peft.json_text import read_json
from bem_peft.whole_file import prove_writable


def evaluate_adapter(
    adapter: str | None, data: DataSection, folder: Path, *, name: str, seed: int = 0, base: str | None = None,
    batch: int = 8, evaluation: EvaluationSection | None = None, dtype: str | None = None,
    revision: str | None = None, attn_implementation: str | None = None, report: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Score a saved adapter on the evaluation items of `data`, and write what `run` writes. A stopped one goes on.

    Args:
        adapter: folder or hub id; None: none, the base model alone.
        base: of the base model; None: the one that the adapter names. revision, attn_implementation: of it.
        dtype: of the base model; None: that of the run whose adapter it is, where its result or its settings stand
            beside it, else "auto".
        folder: gets seed-<seed>/result.json and items.jsonl.
        seed: the seed that the adapter was trained with, by which results are paired.
        evaluation: metrics; None: the loss alone.
        report: gets lines of progress.

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
    refuse_done(folder, [seed])
    items = read_evaluation_items(data)
    prove_writable(folder)
    config = None if adapter is None else PeftConfig.from_pretrained(adapter)
    path = base or (None if config is None else config.base_model_name_or_path)
    if path is None:
        raise ValueError(f"{adapter or 'no adapter'} names no base model: give `base`.")
    run = None if adapter is None else _run_of(Path(adapter))
    found, where = (dtype, "as asked") if dtype is not None else _dtype_of(run)
    section = ModelSection(path, found, revision, attn_implementation)
    tokenizer, is_seq2seq = load_tokenizer(section)
    prepared = prepare(data, evaluation, tokenizer, is_seq2seq, training_items=None, evaluation_items=items)
    settings = {
        "adapter": adapter, "model": vars(section), "data": vars(data), "evaluation": vars(evaluation)
    }  # fmt: skip
    begin(out, {**settings, **prepared.fingerprints})
    loaded: Any = load_model(section)
    report(f"{name}: {path} in {str(loaded.dtype).removeprefix('torch.')}, {where}")
    model, budget = loaded, {"budget": None, "budget_from": None}
    if adapter is not None:
        model = PeftModel.from_pretrained(loaded, adapter)
        model.set_requires_grad(model.active_adapters, True)  # as when it was trained: what counts as its parameters
        budget = _budget_of(run, model, name, report)
    return score_seed(
        model, prepared, out, name=name, seed=seed, config=config, evaluation=evaluation, settings=settings,
        about={**budget, "training_seconds": 0.0}, batch=batch, label=name,
    )  # fmt: skip


def _budget_of(run: Path | None, model: PeftModel, name: str, report: Callable[[str], None]) -> dict[str, Any]:
    """{"budget": as the adapter's own run measured it, "budget_from": its result}, both None where none is kept."""
    path = None if run is None else run / RESULT
    if path is None or not path.is_file():
        return {"budget": None, "budget_from": None}
    found = read_json(path)
    try:
        budget, measured = found["budget"], found["parameters"]["trainable"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is none of `bem-peft run`: {error!r}; move the adapter elsewhere.") from error
    trainable = count_parameters(model).trainable
    if budget is not None and trainable != measured:
        report(
            f"{name}: {path} is of an adapter of {measured:,} parameters, not {trainable:,}: its budget is not taken"
        )
        budget = None
    return {"budget": budget, "budget_from": None if budget is None else str(path)}


def evaluate_base(
    base: str, data: DataSection, folder: Path, *, name: str, seeds: Sequence[int] = (0,), **options: Any
) -> dict[str, Any]:
    """Score the base model alone, so that it can stand beside adapters: the same result under every seed of `seeds`.

    Args:
        options: as `evaluate_adapter` has them.

    Raises:
        ValueError: as `evaluate_adapter`, or a result of one of the seeds that is there already.
    """
    first, *others = seeds
    for seed in others:
        if (folder / f"seed-{seed}").exists():
            raise ValueError(f"{folder / f'seed-{seed}'} is there already: choose another folder or seed.")
    result = evaluate_adapter(None, data, folder, name=name, seed=first, base=base, **options)
    for seed in others:
        out = folder / f"seed-{seed}"
        shutil.copytree(folder / f"seed-{first}", out, ignore=shutil.ignore_patterns(RESULT))
        again = {**result, "seed": seed, "provenance": {**result["provenance"], "seed": seed}}
        write_result(out, again)
    return result


def adapters_of_run(folder: str | None) -> dict[int, str]:
    """Seed -> adapter's folder, where `folder` is one of `bem-peft run`, or of one of its seeds; else empty."""
    if folder is None or (Path(folder) / "adapter_config.json").is_file():
        return {}
    whole = Path(folder)
    seeds = [whole] if whole.name.startswith("seed-") else whole.glob("seed-*")
    found = {seed.name.removeprefix("seed-"): seed / "adapter" for seed in seeds}
    return {int(seed): str(found[seed]) for seed in sorted(found, key=_number) if found[seed].is_dir()}


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"seed-{text}: is no folder of `bem-peft run`, which names it by a number.") from error


def refuse_done(folder: Path, seeds: Iterable[int]) -> None:
    """Raise ValueError where a seed has its result already."""
    for seed in seeds:
        result = folder / f"seed-{seed}" / RESULT
        if result.exists():
            raise ValueError(f"{result} is there already: choose another folder or seed.")


def _run_of(adapter: Path) -> Path | None:
    """The seed's folder that `bem-peft run` made the adapter, or the checkpoint, in; None: no run stands beside it."""
    if not adapter.is_dir():
        return None
    beside = adapter.resolve().parent
    folder = beside.parent if beside.name == "checkpoints" else beside
    return folder if any((folder / name).is_file() for name in (RESULT, SETTINGS)) else None


def _dtype_of(run: Path | None) -> tuple[str, str]:
    """(precision that the run scores its adapter in, where that stands); before it has, the one it was begun with."""
    if run is None:
        return "auto", "as the checkpoint has it"
    path = run / (RESULT if (run / RESULT).is_file() else SETTINGS)
    found = read_json(path)
    try:
        dtype = found.get("precision", "auto") if path.name == RESULT else found["model"].get("dtype", "auto")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is none of `bem-peft run`: {error!r}; give `dtype`.") from error
    return str(dtype), f"as {path} has it"
