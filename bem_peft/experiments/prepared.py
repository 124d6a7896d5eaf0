"""The data of an experiment as tokens, made and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from bem_peft.experiments.encoding import EncodedItems, encode_items
from bem_peft.experiments.items import Item
from bem_peft.experiments.retained import RetainedTexts, encode_texts, read_texts
from bem_peft.experiments.sections import DataSection, EvaluationSection
from bem_peft.experiments.seed_folder import fingerprint


@dataclass(frozen=True)
class PreparedData:
    """training: None where a saved adapter is scored. retained: None where nothing was asked for."""

    tokenizer: PreTrainedTokenizerBase
    training: EncodedItems | None
    evaluation: EncodedItems
    retained: RetainedTexts | None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each part, with what is left out of it."""
        parts = {"training_items": self.training, "evaluation_items": self.evaluation}
        found = {name: fingerprint([*p.items, *p.left_out]) for name, p in parts.items() if p is not None}
        if self.retained is not None:
            found["retained_texts"] = fingerprint(self.retained.texts)
        return found

    @property
    def too_long(self) -> dict[str, int]:
        """How many items are left out."""
        training = [] if self.training is None else self.training.left_out
        return {"training": len(training), "evaluation": len(self.evaluation.left_out)}


def prepare(
    data: DataSection, evaluation: EvaluationSection, tokenizer: PreTrainedTokenizerBase, is_seq2seq: bool, *,
    training_items: Sequence[Item] | None, evaluation_items: Sequence[Item],
) -> PreparedData:  # fmt: skip
    """Everything that is trained on and scored.

    Raises:
        ValueError: an item without a loss or too long, or texts to retain that cannot be read or scored.
    """

    def encoded(items: Sequence[Item], what: str) -> EncodedItems:
        return encode_items(
            items, tokenizer, max_tokens=data.max_tokens, is_seq2seq=is_seq2seq, too_long=data.too_long, what=what
        )

    retained = None
    if evaluation.retain is not None:
        texts = read_texts(evaluation)
        retained = encode_texts(texts, tokenizer, max_tokens=data.max_tokens, is_seq2seq=is_seq2seq)
    training = None if training_items is None else encoded(training_items, "training")
    return PreparedData(tokenizer, training, encoded(evaluation_items, "evaluation"), retained)
