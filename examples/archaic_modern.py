"""The demo's task: archaic English (King James Version) to modern English (World English Bible).

Prompt `Archaic: ...\\nModern:`, answer ` ...` and the end of text; the loss is on the answer alone. Verses are split by
chapter, so that no chapter is in two parts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

DATA = Path(__file__).with_name("data") / "archaic_modern.jsonl.gz"
MAX_TOKENS = 192


@dataclass(frozen=True)
class Verse:
    ref: str
    archaic: str
    modern: str

    @property
    def prompt(self) -> str:
        return f"Archaic: {self.archaic}\nModern:"

    @property
    def sha256(self) -> str:
        """Of the content."""
        return hashlib.sha256(f"{self.archaic}\0{self.modern}".encode()).hexdigest()


def read_verses(path: Path = DATA) -> list[Verse]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [Verse(**json.loads(line)) for line in file]


def _bucket(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_verses(verses: list[Verse]) -> tuple[list[Verse], list[Verse]]:
    """(training, held out): one chapter in ten is held out. Both in an order that does not depend on the file's."""
    training, held_out = [], []
    for verse in sorted(verses, key=lambda v: _bucket(v.ref)):
        chapter = verse.ref.rpartition(":")[0]
        (held_out if _bucket(chapter) < 0.1 else training).append(verse)
    return training, held_out


def tokenize(verses: list[Verse], tokenizer: Any) -> Dataset:
    """Columns input_ids, attention_mask, labels; labels are -100 on the prompt."""

    def encode(verse: Verse) -> dict[str, list[int]]:
        prompt = tokenizer(verse.prompt)["input_ids"]
        answer = [*tokenizer(f" {verse.modern}")["input_ids"], tokenizer.eos_token_id]
        ids = (prompt + answer)[:MAX_TOKENS]
        labels = ([-100] * len(prompt) + answer)[:MAX_TOKENS]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    return Dataset.from_list([encode(verse) for verse in verses])
