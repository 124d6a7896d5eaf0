"""Items as tokens, and which of them are too long to be scored whole.

    causal           <prompt> <completion> <EOS>       labels on the completion and EOS
    conversation     as the chat template renders it   labels on what follows the prompt and the opening of the answer
    encoder-decoder  <prompt EOS> -> <completion EOS>  as its tokenizer has it

What a tokenizer puts at the end of a prompt (EOS, SEP) is taken off in a causal model's: nothing stands between prompt
and completion. Nothing is cut: an item that does not fit is an error, or is left out whole, and counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from bem_peft.experiments.items import IGNORED, Encoded, Item, Message, Prompt

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
        ValueError: an item without a prompt or a completion, no item that fits, or with too_long="error" one that does
            not; a conversation for a tokenizer without a chat template, or with one that cannot render it.
    """
    if any(not isinstance(item.prompt, str) for item in items):
        if is_seq2seq:
            raise ValueError("data.messages, data.chat: an encoder-decoder has no conversations; write a prompt.")
        if tokenizer.chat_template is None:
            raise ValueError(
                "data.messages, data.chat: the model's tokenizer has no chat template; take a model that was trained "
                "in conversations, or write a prompt."
            )
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
        ValueError: a completion of no tokens, or for a causal model a prompt of none.
    """
    prompt = tokens_of_prompt(item.prompt, tokenizer, is_seq2seq)
    if is_seq2seq:
        labels = list(tokenizer(text_target=item.completion)["input_ids"])
        plain = labels
        found = {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": labels}
        length = max(len(prompt), len(labels))
    else:
        if not prompt:
            raise ValueError(
                f"item {item.id!r}: its prompt {item.prompt!r} has no tokens, so that nothing predicts the first token "
                "of its completion: put some text into data.prompt."
            )
        plain = list(tokenizer(item.completion, add_special_tokens=False)["input_ids"])
        if isinstance(item.prompt, str):
            answer = [*plain, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        else:
            answer = _answer_tokens(item, prompt, tokenizer)
        ids = [*prompt, *answer]
        labels = [IGNORED] * len(prompt) + answer
        found, length = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}, len(ids)
    if not plain:
        raise ValueError(
            f"item {item.id!r}: its completion {item.completion!r} has no tokens, so that there is no loss."
        )
    return found, length


def tokens_of_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, is_seq2seq: bool) -> list[int]:
    """What the model reads before it answers."""
    if not isinstance(prompt, str):
        return _rendered(list(prompt), tokenizer, is_open=True)
    return list(tokenizer(prompt)["input_ids"]) if is_seq2seq else prompt_tokens(prompt, tokenizer)


def _answer_tokens(item: Item, prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template puts after the opened answer: its text, and what ends it."""
    messages = [*item.prompt, {"role": "assistant", "content": item.completion}]
    whole = _rendered(messages, tokenizer, is_open=False)
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            f"item {item.id!r}: the chat template renders the question otherwise when its answer follows, so that the "
            "model would be trained on another text than it is asked: take a template that does not."
        )
    return whole[len(prompt) :]


def _rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, is_open: bool) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the model's chat template refuses a conversation of the roles {roles}: {error}.") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
