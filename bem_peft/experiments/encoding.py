"""Items as tokens, and which of them are too long to be scored whole.

    causal           <prompt> <completion> <EOS>       labels on the completion and EOS
    encoder-decoder  <prompt EOS> -> <completion EOS>  as its tokenizer has it

What a tokenizer puts at the end of a prompt (EOS, SEP) is taken off in a causal model's: nothing stands between prompt
and completion. Nothing is cut: an item that does not fit is an error, or is left out whole, and counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from bem_peft.experiments.items import IGNORED, Encoded, Item

TOO_LONG = ("error", "drop")


@dataclass(frozen=True)
class EncodedItems:
    """The items that fit, their tokens, and the items that are left out."""

    items: list[Item]
    encoded: list[Encoded]
    left_out: list[Item]


def encode_items(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, is_seq2seq: bool, too_long: str,
    what: str,
) -> EncodedItems:  # fmt: skip
    """Every item that fits `max_tokens`. `what`: "training" or "evaluation", for messages.

    Raises:
        ValueError: an item without a completion, no item that fits, or with too_long="error" one that does not.
    """
    if not is_seq2seq and tokenizer.eos_token_id is None:
        warnings.warn("the tokenizer has no EOS: completions end without one.", stacklevel=2)
    fitting: list[Item] = []
    rows: list[Encoded] = []
    longest: list[tuple[int, Item]] = []
    for item in items:
        row, length = encode(item, tokenizer, is_seq2seq)
        if length > max_tokens:
            longest.append((length, item))
        else:
            fitting.append(item)
            rows.append(row)
    if (longest and too_long == "error") or not fitting:
        some = ", ".join(f"{item.id!r} ({length} tokens)" for length, item in longest[:3])
        raise ValueError(
            f"{len(longest)} of {len(items)} {what} items are longer than data.max_tokens = {max_tokens}, as {some}: "
            "raise max_tokens, or set data.too_long to 'drop' (--too-long drop) to leave them out of training and of "
            "every system."
        )
    return EncodedItems(fitting, rows, [item for _, item in longest])


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, is_seq2seq: bool) -> tuple[Encoded, int]:
    """(input_ids, attention_mask, labels; how many tokens must fit). Labels are -100 on a causal model's prompt.

    Raises:
        ValueError: a completion of no tokens.
    """
    if is_seq2seq:
        prompt = list(tokenizer(item.prompt)["input_ids"])
        labels = list(tokenizer(text_target=item.completion)["input_ids"])
        plain = labels
        found = {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": labels}
        length = max(len(prompt), len(labels))
    else:
        prompt = prompt_tokens(item.prompt, tokenizer)
        plain = list(tokenizer(item.completion, add_special_tokens=False)["input_ids"])
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*prompt, *plain, *end]
        labels = [IGNORED] * len(prompt) + [*plain, *end]
        found, length = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}, len(ids)
    if not plain:
        raise ValueError(
            f"item {item.id!r}: its completion {item.completion!r} has no tokens, so that there is no loss."
        )
    return found, length


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A causal model's prompt, with what its tokenizer puts before a text (BOS) and without what it puts after it."""
    whole = list(tokenizer(prompt)["input_ids"])
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[: start + len(plain)]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while whole and whole[-1] in ends:
        whole.pop()
    return whole
