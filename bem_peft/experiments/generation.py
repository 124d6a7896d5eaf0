"""Greedy answers to prompts, for the metrics that compare text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from bem_peft.experiments.encoding import tokens_of_prompt
from bem_peft.experiments.items import Progress, Prompt


class _Stop(StoppingCriteria):
    """A row is done when its answer contains `stop`. (generate's own `stop_strings` fails for some tokenizers.)"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, length: int) -> None:
        self.tokenizer, self.stop, self.length = tokenizer, stop, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.length :], skip_special_tokens=True)
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *,
    max_new_tokens: int, stop: str | None, batch: int, progress: Progress,
) -> list[str]:  # fmt: skip
    """The continuation of each prompt (the output of an encoder-decoder), up to `stop`, which is not part of it.

    Batches are of prompts of like length, padded on the left; the order is that of `prompts`. No special tokens.

    Raises:
        ValueError: a prompt of no tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    encoded = [tokens_of_prompt(prompt, tokenizer, is_seq2seq) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens: nothing can be generated from it.")
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
    texts = [""] * len(prompts)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for start in progress(range(0, len(order), batch)):
            rows = order[start : start + batch]
            inputs = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt").to(device)
            length = 1 if is_seq2seq else inputs["input_ids"].shape[1]
            criteria = [] if stop is None else [_Stop(tokenizer, stop, length)]
            out = model.generate(
                **inputs, stopping_criteria=StoppingCriteriaList(criteria), max_new_tokens=max_new_tokens,
                do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            new = out[:, length:]
            for i, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[i] = text if stop is None else text.split(stop)[0]
    finally:
        tokenizer.padding_side = side
    return texts
