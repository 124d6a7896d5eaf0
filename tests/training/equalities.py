"""Penalties carried by the layers, against (loss + penalty).backward() written out, in every kind of training loop.

Each case gives two gradients of one optimizer step, which must be equal. `python -m tests.training.equalities` prints
the table of the largest deviations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ModelOutput

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    set_loss_scale,
)
from bem_peft.tuners.base.adapter import Adapter
from tests.contract.methods import adapter_parameters, randomize
from tests.tiny_models import VOCABULARY, build, tokens

Gradients = dict[str, torch.Tensor]
LENGTHS = (9, 5, 7, 3, 8, 6, 4, 9)


def penalised(architecture: str = "llama", **changes: Any) -> nn.Module:
    """A model with every penalty on, in training mode."""
    task = "SEQ_2_SEQ_LM" if architecture in ("t5", "bart") else "CAUSAL_LM"
    config = CompositeConfig(
        [
            HeadGroupGatingConfig(decorrelation_strength=3.0, gate_entropy_strength=0.7),
            DynamicRankMaskConfig(total_rank=8, active_rank=4, balance_strength=9.0, sites=["mlp_down"]),
            KroneckerConfig(u_rank=3, v_rank=2, orthogonality_strength=2.0, diversity_strength=1.5),
        ],
        task_type=task,
    )
    model = get_peft_model(build(architecture), config)
    randomize(model)
    return model.train()


class Written:
    """The penalties of the forward passes since the last `take`, as a user would have written them down."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str, bool, torch.Tensor]] = []

    def take(self) -> torch.Tensor:
        seen: set[tuple[int, str]] = set()
        total = torch.zeros(())
        for adapter, name, once, value in self.found:
            if not (once and (adapter, name) in seen):
                total = total + value
            seen.add((adapter, name))
        self.found.clear()
        return total


@contextmanager
def written_out() -> Iterator[Written]:
    """Inside, layers carry nothing; what they would carry is collected."""
    written, original = Written(), Adapter.penalise

    def collect(
        self: Adapter, y: torch.Tensor, name: str, strength: Any, value: torch.Tensor, *, once: bool = False
    ) -> torch.Tensor:
        if torch.is_grad_enabled():
            written.found.append((id(self), name, once, strength * value))
        return y

    Adapter.penalise = collect  # type: ignore[method-assign]
    try:
        yield written
    finally:
        Adapter.penalise = original  # type: ignore[method-assign]


def deviation(found: Gradients, expected: Gradients) -> float:
    """Largest difference of two gradients, relative to the largest entry of each parameter's."""
    assert set(found) == set(expected)
    return max(float((found[n] - g).abs().max() / g.abs().max().clamp_min(1e-30)) for n, g in expected.items())


def gradients_of(model: nn.Module) -> Gradients:
    return {n: p.grad.clone() for n, p in adapter_parameters(model).items() if p.grad is not None}


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Sequences of different lengths; the first third of each is prompt."""
    ids = tokens(batch=count, length=max(LENGTHS))
    found = []
    for row, length in zip(ids, LENGTHS * 2, strict=False):
        labels = row[:length].clone()
        labels[: length // 3] = -100
        found.append({"input_ids": row[:length], "labels": labels})
    return found


def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    width = max(len(f["input_ids"]) for f in features)

    def padded(row: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat((row, torch.full((width - len(row),), value)))

    return {
        "input_ids": torch.stack([padded(f["input_ids"], 0) for f in features]),
        "labels": torch.stack([padded(f["labels"], -100) for f in features]),
        "attention_mask": torch.stack([padded(torch.ones_like(f["input_ids"]), 0) for f in features]),
    }


# bare loops


def bare(explicit: bool, *, checkpointing: bool | None = None, scale: float = 1.0, autocast: bool = False) -> Gradients:
    """Two micro-batches, half of the loss each; `checkpointing`: re-entrant or not."""
    model = penalised()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    with written_out() if explicit else _nothing() as written:
        for part in (rows()[:4], rows()[4:]):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**collate(part)).loss
            if written is not None:
                loss = loss + written.take()
            (loss * scale / 2).backward()
    return {name: g / scale for name, g in gradients_of(model).items()}


def own_loss_of_logits(explicit: bool, *, scaler: bool = False) -> Gradients:
    """A loss that the model does not know, float16 scaling included."""
    model = penalised()
    tool = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaler else None
    set_loss_scale(model, accumulation_steps=2, scaler=tool)
    with written_out() if explicit else _nothing() as written:
        for part in (rows()[:4], rows()[4:]):
            inputs = collate(part)
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            loss = (logits.logsumexp(-1) * inputs["attention_mask"]).mean()
            if written is not None:
                loss = loss + written.take()
            (tool.scale(loss / 2) if tool is not None else loss / 2).backward()
    return {name: g / (1024.0 if scaler else 1.0) for name, g in gradients_of(model).items()}


def two_forwards(explicit: bool) -> Gradients:
    """Two calls before one backward pass, as a preference loss makes them: each carries its penalty."""
    model = penalised()
    with written_out() if explicit else _nothing() as written:
        outputs, penalties = [], []
        for part in (rows()[:4], rows()[4:]):
            inputs = collate(part)
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            outputs.append((logits.logsumexp(-1) * inputs["attention_mask"]).sum())
            if written is not None:
                penalties.append(written.take())
        loss = torch.sigmoid(outputs[0] / outputs[1])
        if penalties:
            loss = loss + penalties[0] + penalties[1]
        loss.backward()
    return gradients_of(model)


def bare_accelerate(explicit: bool, *, own_loss: bool = True) -> Gradients:
    reset_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(penalised(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with written_out() if explicit else _nothing() as written:
        for part in (rows()[:4], rows()[4:]):
            with accelerator.accumulate(model):
                inputs = collate(part)
                labels = inputs.pop("labels")
                if own_loss:
                    loss = model(**inputs, labels=labels).loss
                else:
                    loss = (model(**inputs).logits.logsumexp(-1) * inputs["attention_mask"]).mean()
                if written is not None:
                    loss = loss + written.take()
                accelerator.backward(loss)
                optimizer.step()
    return gradients_of(model)


# trainers


class FirstStep(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = gradients_of(kwargs["model"])


def adding(cls: type, written: Written | None, share: Callable[[Any, dict[str, Any], Any], Any]) -> type:
    """`cls` whose loss has the penalty added; `share(trainer, inputs, num_items)` of it in a micro-batch."""

    class Adding(cls):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            part = share(self, inputs, num_items_in_batch)
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if written is None or not model.training:
                return result
            loss, outputs = result if return_outputs else (result, None)
            loss = loss + part * written.take()
            return (loss, outputs) if return_outputs else loss

    return Adding


def by_items(trainer: Any, inputs: Any, num_items: Any) -> Any:
    return 1.0 if num_items is None else (inputs["labels"][:, 1:] != -100).sum() / num_items


def by_steps(trainer: Any, inputs: Any, num_items: Any) -> Any:
    return 1.0 / trainer.current_gradient_accumulation_steps


def whole(trainer: Any, inputs: Any, num_items: Any) -> Any:
    return 1.0


def hf_trainer(
    explicit: bool,
    *,
    batch: int = 2,
    accumulation: int = 4,
    share: Any = by_items,
    architecture: str = "llama",
    **changes: Any,
) -> Gradients:
    options = {name: changes.pop(name) for name in ("compute_loss_func",) if name in changes}
    with TemporaryDirectory() as folder, written_out() if explicit else _nothing() as written:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            use_cpu=True, report_to="none", max_grad_norm=0.0, disable_tqdm=True, dataloader_pin_memory=False,
            save_strategy="no", seed=1, **changes,
        )  # fmt: skip
        step = FirstStep()
        adding(Trainer, written, share)(
            model=penalised(architecture), args=arguments, train_dataset=rows(), data_collator=collate,
            callbacks=[step], **options,
        ).train()  # fmt: skip
    return step.gradients


def mean_of_logits(outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return (outputs.logits.logsumexp(-1) * (labels != -100)).sum() / num_items_in_batch


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}" if i > 2 else ("<pad>", "<eos>", "<bos>")[i]: i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def text(row: torch.Tensor) -> str:
    return " ".join(f"w{int(i)}" for i in row)


def sft(explicit: bool, **changes: Any) -> Gradients:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer import sft_trainer

    with TemporaryDirectory() as folder, written_out() if explicit else _nothing() as written:
        arguments = SFTConfig(
            folder, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4, use_cpu=True, bf16=False,
            report_to="none", max_grad_norm=0.0, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
            gradient_checkpointing=False, **changes,
        )  # fmt: skip
        step = FirstStep()
        # until trl 1.14 it is the model's own loss, over the items of the step; since then a mean a micro-batch
        is_own = not hasattr(sft_trainer, "add_fused_lm_head")
        adding(SFTTrainer, written, by_items if is_own else by_steps)(
            model=penalised(), args=arguments, processing_class=word_tokenizer(), callbacks=[step],
            train_dataset=Dataset.from_dict({"text": [text(row["input_ids"]) for row in rows()]}),
        ).train()  # fmt: skip
    return step.gradients


def dpo(explicit: bool, **changes: Any) -> Gradients:
    from trl import DPOConfig, DPOTrainer

    with TemporaryDirectory() as folder, written_out() if explicit else _nothing() as written:
        arguments = DPOConfig(
            folder, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True, bf16=False,
            report_to="none", max_grad_norm=0.0, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
            gradient_checkpointing=False, **changes,
        )  # fmt: skip
        pairs = [(text(row["input_ids"][:2]), text(row["input_ids"][2:])) for row in rows()]
        step = FirstStep()
        adding(DPOTrainer, written, whole)(
            model=penalised(), args=arguments, processing_class=word_tokenizer(), callbacks=[step],
            train_dataset=Dataset.from_dict(
                {
                    "prompt": [prompt for prompt, _ in pairs],
                    "chosen": [" " + answer for _, answer in pairs],
                    "rejected": [" " + answer for _, answer in pairs[1:] + pairs[:1]],
                }
            ),
        ).train()  # fmt: skip
    return step.gradients


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def pair(run: Callable[..., Gradients], **options: Any) -> Callable[[], tuple[Gradients, Gradients]]:
    """The gradients that the layers carry, and those of the loss written out."""
    return lambda: (run(False, **options), run(True, **options))


# name -> (found, expected)
CASES: dict[str, Callable[[], tuple[Gradients, Gradients]]] = {
    "bare loop, 2 micro-batches": pair(bare),
    "bare loop, loss scaled by 1024": pair(bare, scale=1024.0),
    "bare loop, bfloat16 autocast": pair(bare, autocast=True),
    "checkpointing, re-entrant": lambda: (bare(False, checkpointing=True), bare(True)),
    "checkpointing, not re-entrant": lambda: (bare(False, checkpointing=False), bare(True)),
    "a loss of one's own, 2 micro-batches": pair(own_loss_of_logits),
    "a loss of one's own, GradScaler": pair(own_loss_of_logits, scaler=True),
    "two forwards, one backward": pair(two_forwards),
    "accelerate, accumulate": pair(bare_accelerate),
    "accelerate, a loss of one's own": pair(bare_accelerate, own_loss=False),
    "Trainer, 4 x 2": pair(hf_trainer),
    "Trainer, label smoothing": pair(hf_trainer, label_smoothing_factor=0.1, accumulation=2, share=by_steps),
    "Trainer, compute_loss_func": pair(hf_trainer, compute_loss_func=mean_of_logits, share=by_steps),
    "Trainer, T5": pair(
        hf_trainer,
        architecture="t5",
        share=lambda t, i, n: 1.0 if n is None else (i["labels"] != -100).sum() / n,
    ),
    "Trainer, checkpointing": lambda: (
        hf_trainer(False, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
        hf_trainer(True),
    ),
    "Trainer, 8 x 1 = 4 x 2": lambda: (hf_trainer(False, batch=1, accumulation=8), hf_trainer(False)),
    "Trainer, 1 x 8 = 4 x 2": lambda: (hf_trainer(False, batch=8, accumulation=1), hf_trainer(False)),
    "SFTTrainer, 4 x 2": pair(sft),
    "SFTTrainer, padding-free packing": pair(sft, packing=True, max_length=24),
    "DPOTrainer, 2 x 2": pair(dpo),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        reset_accelerate()
        print(f"{name:40s} {deviation(*case()):.1e}", flush=True)
