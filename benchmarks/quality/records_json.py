"""Scores of the task `records`: is a prediction JSON, does it keep to the schema, and which fields are right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from splits import DATA, read_items


@cache
def schema() -> dict[str, frozenset[str]]:
    """kind -> its fields, of the training items: what a record may hold beside `kind`."""
    found: dict[str, set[str]] = {}
    for item in read_items(DATA / "records.jsonl.gz"):
        found.setdefault(item["kind"], set()).update(json.loads(item["json"]).keys() - {"kind"})
    return {kind: frozenset(fields) for kind, fields in found.items()}


def parsed(text: str) -> Any:
    """The document, or None where it is none: RFC 8259, and no key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def keeps_to_schema(document: Any) -> bool:
    """An object of a known kind whose fields are the kind's, each a text or a list of two or more texts."""
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        return False
    fields = schema().get(document["kind"])
    return fields is not None and all(
        name == "kind" or (name in fields and (isinstance(value, str) or is_list_of_texts(value)))
        for name, value in document.items()
    )


def is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def leaves(document: Any) -> Counter[tuple[str, str]]:
    """(field, text), each as often as it stands; of what is no object, none."""
    if not isinstance(document, dict):
        return Counter()
    return Counter(
        (name, json.dumps(part, ensure_ascii=False))
        for name, value in document.items()
        for part in (value if isinstance(value, list) else [value])
    )


def field_f1(document: Any, reference: Any) -> float:
    """F1 of the fields with their texts."""
    found, expected = leaves(document), leaves(reference)
    total = found.total() + expected.total()
    return 2.0 * (found & expected).total() / total if total else 1.0


def record_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """metric -> a value a prediction: json_validity, schema_validity, exact_match (the same document), field_f1."""
    rows = [(parsed(p), json.loads(r)) for p, r in zip(predictions, references, strict=True)]
    return {
        "json_validity": [float(document is not None) for document, _ in rows],
        "schema_validity": [float(keeps_to_schema(document)) for document, _ in rows],
        "exact_match": [float(document == reference) for document, reference in rows],
        "field_f1": [field_f1(document, reference) for document, reference in rows],
    }
