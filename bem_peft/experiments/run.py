"""Run an experiment: one adapter a seed, each with its result, its items' scores and its provenance.

OUTPUT_DIR/seed-0/adapter/          the adapter, with its budget report
OUTPUT_DIR/seed-0/result.json       loss, sizes, budget, provenance
OUTPUT_DIR/seed-0/items.jsonl       one line an item of the evaluation
OUTPUT_DIR/seed-0/checkpoints/      of the Trainer; a run that was stopped goes on from the last whole one

All data are read, tokenised and checked before a model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, PreTrainedModel

from bem_peft.budget.check import BudgetConstraints, budget_of
from bem_peft.budget.copies import adapted_copy, at_sites_of
from bem_peft.budget.enforce import BudgetCallback
from bem_peft.budget.match import match_sizes
from bem_peft.experiments.items import read_items, trained_on
from bem_peft.experiments.loading import load_model, load_tokenizer
from bem_peft.experiments.prepared import PreparedData, prepare
from bem_peft.experiments.sections import Experiment
from bem_peft.experiments.seed_folder import SECTIONS, begin, check_finished
from bem_peft.experiments.seed_result import score_seed
from bem_peft.experiments.training_fields import rate_told
from bem_peft.json_text import read_json
from bem_peft.training.checkpoints import last_complete_checkpoint
from bem_peft.training.parameter_groups import LearningRates
from bem_peft.training.trainer import PTTrainer, PTTrainingConfig
from bem_peft.whole_file import prove_writable


def run_experiment(experiment: Experiment, report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run every seed that has no result yet; `report` gets lines of progress.

    Returns:
        The results, one a seed, as they stand in `result.json`.

    Raises:
        ValueError: data that do not fit the templates, results of other settings or data in `output_dir`, or a budget
            whose sizes cannot be matched.
        BudgetError: the adapter does not keep its budget (policy "raise").
    """
    training, evaluation = read_items(experiment.data)
    report(f"{experiment.name}: {len(training):,} items to train on, {len(evaluation):,} to evaluate on")
    seen = [item.id for item in trained_on(training, evaluation)]
    told = rate_told(experiment)
    if told is not None:
        report(told)
    prove_writable(Path(experiment.output_dir))
    tokenizer, is_seq2seq = load_tokenizer(experiment.model)
    prepared = prepare(
        experiment.data, experiment.evaluation, tokenizer, is_seq2seq, training_items=training,
        evaluation_items=evaluation,
    )  # fmt: skip
    for name, count in prepared.too_long.items():
        if count:
            report(f"{experiment.name}: {count} {name} items are too long and left out")
    settings = {**{name: experiment.document.get(name) for name in SECTIONS}, **prepared.fingerprints}
    folders = {seed: Path(experiment.output_dir) / f"seed-{seed}" for seed in experiment.seeds}
    finished = {seed: read_json(f / "result.json") for seed, f in folders.items() if (f / "result.json").is_file()}
    for seed, result in finished.items():
        check_finished(folders[seed], result, settings)
    results = []
    for seed, folder in folders.items():
        if seed in finished:
            results.append(finished[seed])
            report(f"seed {seed}: done before, loss {finished[seed]['metrics']['loss']:.4f}")
            continue
        begin(folder, settings)
        results.append(_run_seed(experiment, seed, folder, prepared, seen, report))
        report(f"seed {seed}: loss {results[-1]['metrics']['loss']:.4f}")
    return results


def _run_seed(
    experiment: Experiment, seed: int, folder: Path, prepared: PreparedData, seen: Sequence[str],
    report: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    transformers.set_seed(seed)
    model = load_model(experiment.model)
    config = experiment.adapter
    anchor = experiment.anchor
    if experiment.budget is not None and (experiment.budget.match is None or experiment.budget.match):
        config = _matched(experiment, model, report)
    options = dict(experiment.training)
    if options.get("learning_rate") is None:
        rates = LearningRates.suggest(model, config)
        options["learning_rate"] = rates.learning_rate
        report(f"learning rate {rates.source}")
    transformers.set_seed(seed)
    model = get_peft_model(model, config)
    budget: BudgetConstraints | None = None
    if experiment.budget is not None and anchor is not None:
        budget = budget_of(model, anchor, experiment.budget.quantities, experiment.budget.tolerance_ratio)
    defaults = {"save_total_limit": 2, "report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    options = {**defaults, **options}
    arguments = PTTrainingConfig(str(folder / "checkpoints"), seed=seed, **options)
    if experiment.budget is not None:
        arguments.budget_policy = experiment.budget.policy
    assert prepared.training is not None
    trainer = PTTrainer(
        model, arguments, budget=budget, train_dataset=prepared.training.encoded,
        eval_dataset=prepared.evaluation.encoded,
        data_collator=DataCollatorForSeq2Seq(prepared.tokenizer, padding=True),
    )  # fmt: skip
    last = last_complete_checkpoint(folder / "checkpoints", before_the_end=True)
    if last is not None:
        report(f"seed {seed}: goes on from {Path(last).name}")
    start = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder / "adapter"))
    if not trainer.is_world_process_zero():
        return {"metrics": {"loss": float("nan")}}
    return score_seed(
        trainer.model, prepared, folder, name=experiment.name, seed=seed, config=config,
        evaluation=experiment.evaluation, settings=experiment.document,
        about={
            "metrics": {"train_loss": outcome.training_loss},
            "budget": _budget_lines(trainer),
            "curve": _curve(trainer),
            "trained_on": {"items": len(seen), "first": list(seen[:10])},  # of the evaluation's
            "selected_on_evaluation": bool(arguments.load_best_model_at_end),
            "training_seconds": seconds,
        },
        batch=arguments.per_device_eval_batch_size, label=f"seed {seed}", is_quiet=bool(arguments.disable_tqdm),
    )  # fmt: skip


def _curve(trainer: PTTrainer) -> list[dict[str, Any]]:
    """The losses that the Trainer logged, by step."""
    names = ("step", "epoch", "loss", "eval_loss", "learning_rate")
    logged = trainer.state.log_history
    return [{n: line[n] for n in names if n in line} for line in logged if "loss" in line or "eval_loss" in line]


def _matched(experiment: Experiment, model: PreTrainedModel, report: Callable[[str], None]) -> PeftConfig:
    """The adapter's config with the sizes that meet the anchor. Raises ValueError where none does."""
    budget = experiment.budget
    assert budget is not None
    assert experiment.anchor is not None
    anchor = at_sites_of(experiment.anchor, lambda: adapted_copy(model, experiment.adapter))
    match = match_sizes(model, experiment.adapter, anchor, budget.match, budget.quantities, budget.tolerance_ratio)
    if not match.is_met and budget.policy == "raise":
        raise ValueError(f"no sizes meet the anchor: {match}")
    report(str(match))
    return match.config


def _budget_lines(trainer: PTTrainer) -> list[dict[str, Any]] | None:
    reports = [c.report for c in trainer.callback_handler.callbacks if isinstance(c, BudgetCallback)]
    found = [report for report in reports if report is not None]
    return None if not found else [vars(line) for line in found[0].lines]
