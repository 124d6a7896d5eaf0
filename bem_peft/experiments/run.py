"""Run an experiment: one adapter a seed, each with its result, its items' scores and its provenance.

OUTPUT_DIR/seed-0/adapter/          the adapter, with its budget report
OUTPUT_DIR/seed-0/result.json       loss, sizes, budget, provenance
OUTPUT_DIR/seed-0/items.jsonl       one line an item of the evaluation
OUTPUT_DIR/seed-0/checkpoints/      of the Trainer; a run that was stopped goes on from the last whole one
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bem_peft.budget.check import BudgetConstraints, adapted_copy, at_sites_of, budget_of
from bem_peft.budget.match import match_budget
from bem_peft.budget.parameters import count_parameters
from bem_peft.experiments.encoding import encode_items
from bem_peft.experiments.experiment import check_counts, check_evaluation
from bem_peft.experiments.items import Item, read_items, read_items_of, selected
from bem_peft.experiments.provenance import provenance
from bem_peft.experiments.retained import read_texts, score_texts, write_texts
from bem_peft.experiments.scoring import ItemScores, score_model
from bem_peft.experiments.sections import DataSection, EvaluationSection, Experiment, ModelSection
from bem_peft.experiments.seed_folder import PartialScores, begin, changes, fingerprint
from bem_peft.json_text import read_json
from bem_peft.training.checkpoints import last_complete_checkpoint
from bem_peft.training.trainer import PTTrainer, PTTrainingConfig
from bem_peft.whole_file import prove_writable, write_whole

RESULT_VERSION = 1
SECTIONS = ("model", "adapter", "data", "evaluation", "training", "budget")  # which a seed that goes on must share


def run_experiment(experiment: Experiment, report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run every seed that has no result yet; `report` gets lines of progress.

    Returns:
        The results, one a seed, as they stand in `result.json`.

    Raises:
        ValueError: data that do not fit the templates, results of other settings in `output_dir`, or a budget whose
            sizes cannot be matched.
        BudgetError: the adapter does not keep its budget (policy "raise").
    """
    items = read_items(experiment.data)
    report(f"{experiment.name}: {len(items[0]):,} items to train on, {len(items[1]):,} to evaluate on")
    results = []
    prove_writable(Path(experiment.output_dir))
    for seed in experiment.seeds:
        folder = Path(experiment.output_dir) / f"seed-{seed}"
        done = folder / "result.json"
        if done.is_file():
            result = json.loads(done.read_text(encoding="utf-8"))
            _check_same_settings(experiment, result, done)
            report(f"seed {seed}: done before, loss {result['metrics']['loss']:.4f}")
        else:
            _begin(experiment, folder, items)
            result = _run_seed(experiment, seed, folder, items, report)
            report(f"seed {seed}: loss {result['metrics']['loss']:.4f}")
        results.append(result)
    return results


def _check_same_settings(experiment: Experiment, result: dict[str, Any], path: Path) -> None:
    before = result["provenance"]["settings"]
    now = json.loads(json.dumps(experiment.document, default=str))
    changed = [line for name in SECTIONS for line in changes(before.get(name), now.get(name), name)]
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed)}): choose another `output_dir`, or remove it."
        )


def _begin(experiment: Experiment, folder: Path, items: tuple[list[Item], list[Item]]) -> None:
    document = {name: experiment.document.get(name) for name in SECTIONS}
    begin(folder, {**document, "training_items": fingerprint(items[0]), "evaluation_items": fingerprint(items[1])})


def _run_seed(
    experiment: Experiment,
    seed: int,
    folder: Path,
    items: tuple[list[Item], list[Item]],
    report: Callable[[str], None],
) -> dict[str, Any]:
    transformers.set_seed(seed)
    model, tokenizer = load_model(experiment.model)
    is_seq2seq = bool(model.config.is_encoder_decoder)
    config = experiment.adapter
    anchor = experiment.anchor
    if experiment.budget is not None and experiment.budget.match:
        config = _matched(experiment, model, report)
    transformers.set_seed(seed)
    model = get_peft_model(model, config)
    budget: BudgetConstraints | None = None
    if experiment.budget is not None and anchor is not None:
        budget = budget_of(model, anchor, experiment.budget.quantities, experiment.budget.tolerance_ratio)
    fitting = encode_items(
        items[0], tokenizer, max_tokens=experiment.data.max_tokens, is_seq2seq=is_seq2seq,
        too_long=experiment.data.too_long, what="training",
    )  # fmt: skip
    if fitting.left_out:
        report(f"seed {seed}: {len(fitting.left_out)} training items are too long and left out")
    defaults = {"save_total_limit": 2, "report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    options = {**defaults, **experiment.training}
    arguments = PTTrainingConfig(str(folder / "checkpoints"), seed=seed, **options)
    if experiment.budget is not None:
        arguments.budget_policy = experiment.budget.policy
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    watched = None
    if str(arguments.eval_strategy.value) != "no":
        watched = encode_items(
            items[1], tokenizer, max_tokens=experiment.data.max_tokens, is_seq2seq=is_seq2seq,
            too_long=experiment.data.too_long, what="evaluation",
        ).encoded  # fmt: skip
    trainer = PTTrainer(
        model, arguments, budget=budget, train_dataset=fitting.encoded, eval_dataset=watched, data_collator=collator
    )
    last = last_complete_checkpoint(folder / "checkpoints")
    if last is not None:
        report(f"seed {seed}: goes on from {Path(last).name}")
    start = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder / "adapter"))
    if not trainer.is_world_process_zero():
        return {"metrics": {"loss": float("nan")}}
    scores = score_model(
        trainer.model, tokenizer, items[1], folder, data=experiment.data, evaluation=experiment.evaluation,
        batch=arguments.per_device_eval_batch_size, label=f"seed {seed}", is_quiet=bool(arguments.disable_tqdm),
    )  # fmt: skip
    if scores.left_out:
        report(f"seed {seed}: {len(scores.left_out)} evaluation items are too long and left out")
    result = {
        **_result(experiment.name, seed, config, trainer.model, scores, experiment.document),
        "too_long": {"training": len(fitting.left_out), "evaluation": len(scores.left_out)},
        "budget": _budget_lines(trainer),
        "curve": _curve(trainer),
        "selected_on_evaluation": bool(arguments.load_best_model_at_end),
        "training_seconds": seconds,
    }
    result["metrics"]["train_loss"] = outcome.training_loss
    result["metrics"] |= _retained(
        trainer.model, tokenizer, folder, experiment.data, experiment.evaluation, arguments.per_device_eval_batch_size
    )
    _finish(folder, scores, result)
    return result


def _retained(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, data: DataSection,
    evaluation: EvaluationSection, batch: int,
) -> dict[str, float]:  # fmt: skip
    """The metrics of text that was not trained on; nothing where none was asked for."""
    if evaluation.retain is None:
        return {}
    lines = score_texts(model, tokenizer, read_texts(evaluation), max_tokens=data.max_tokens, batch=batch)
    return write_texts(folder / "retain.jsonl", lines)


def _curve(trainer: PTTrainer) -> list[dict[str, Any]]:
    """The losses that the Trainer logged, by step."""
    names = ("step", "epoch", "loss", "eval_loss", "learning_rate")
    logged = trainer.state.log_history
    return [{n: line[n] for n in names if n in line} for line in logged if "loss" in line or "eval_loss" in line]


def _finish(folder: Path, scores: ItemScores, result: dict[str, Any]) -> None:
    """The result last: a folder that has one is whole."""
    scores.write(folder / "items.jsonl")
    write_whole(folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    PartialScores(folder).remove()


def _result(
    name: str, seed: int, config: PeftConfig, model: PeftModel, scores: ItemScores, settings: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": RESULT_VERSION,
        "name": name,
        "seed": seed,
        "adapter": _json_config(config),
        "metrics": scores.metrics(),
        "parameters": vars(count_parameters(model)),
        "precision": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "items_sha256": fingerprint(scores.items),
        "provenance": provenance(settings, seed),
    }


def evaluate_adapter(
    adapter: str,
    data: DataSection,
    folder: Path,
    *,
    name: str,
    seed: int = 0,
    base: str | None = None,
    batch: int = 8,
    evaluation: EvaluationSection | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Score a saved adapter of any PEFT method on `data.eval`, and write what `run` writes. A stopped one goes on.

    Args:
        adapter: folder or hub id. base: of the base model; None: the one that the adapter names.
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
    check_evaluation(evaluation, "", problems)
    check_counts(data, "", problems)
    if batch < 1:
        problems.append(f"batch = {batch}: must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    out = folder / f"seed-{seed}"
    if (out / "result.json").exists():
        raise ValueError(f"{out / 'result.json'} is there already: choose another folder or seed.")
    items = selected(read_items_of(data, str(data.eval)), data.eval_items)
    if not items:
        raise ValueError(f"{data.eval}: holds no item.")
    prove_writable(folder)
    config = PeftConfig.from_pretrained(adapter)
    path = base or config.base_model_name_or_path
    if path is None:
        raise ValueError(f"{adapter} names no base model: give `base`.")
    dtype = dtype if dtype is not None else _dtype_of_run(Path(adapter))
    settings = {
        "adapter": adapter, "model": {"path": path, "dtype": dtype}, "data": vars(data), "evaluation": vars(evaluation)
    }  # fmt: skip
    begin(out, {**settings, "evaluation_items": fingerprint(items)})
    model, tokenizer = load_model(ModelSection(path, dtype))
    model = PeftModel.from_pretrained(model, adapter)
    scores = score_model(model, tokenizer, items, out, data=data, evaluation=evaluation, batch=batch, label=name)
    model.set_requires_grad(model.active_adapters, True)  # as when it was trained: what counts as its parameters
    result = {
        **_result(name, seed, config, model, scores, settings), "budget": None, "training_seconds": 0.0,
        "too_long": {"training": 0, "evaluation": len(scores.left_out)},
    }  # fmt: skip
    result["metrics"] |= _retained(model, tokenizer, out, data, evaluation, batch)
    _finish(out, scores, result)
    return result


def _dtype_of_run(adapter: Path) -> str:
    """The precision that the run scored its adapter in; "auto" where no result stands beside the adapter."""
    beside = adapter.parent / "result.json"
    return str(read_json(beside).get("precision", "auto")) if beside.is_file() else "auto"


def load_model(section: ModelSection) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer), causal or encoder-decoder as its config says."""
    config = AutoConfig.from_pretrained(section.path, revision=section.revision)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options: dict[str, Any] = {"revision": section.revision}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    model = auto.from_pretrained(section.path, dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(section.path, revision=section.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _matched(experiment: Experiment, model: PreTrainedModel, report: Callable[[str], None]) -> PeftConfig:
    """The adapter's config with the sizes that meet the anchor. Raises ValueError where none does."""
    budget = experiment.budget
    assert budget is not None
    assert experiment.anchor is not None
    anchor = at_sites_of(experiment.anchor, lambda: adapted_copy(model, experiment.adapter))
    match = match_budget(
        model, experiment.adapter, anchor, free=budget.match, match=budget.quantities,
        tolerance_ratio=budget.tolerance_ratio,
    )  # fmt: skip
    report(str(match))
    if not match.is_met and budget.policy == "raise":
        raise ValueError(f"no sizes of budget.match = {budget.match} meet the anchor: {match}")
    return match.config


def _budget_lines(trainer: PTTrainer) -> list[dict[str, Any]] | None:
    from bem_peft.budget.enforce import BudgetCallback

    reports = [c.report for c in trainer.callback_handler.callbacks if isinstance(c, BudgetCallback)]
    found = [report for report in reports if report is not None]
    return None if not found else [vars(line) for line in found[0].lines]


def _json_config(config: PeftConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=lambda value: sorted(value)))
