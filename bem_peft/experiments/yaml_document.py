"""The YAML of an experiment as a mapping, with the changes of a command line in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from bem_peft.experiments.fields import Problems
from bem_peft.yaml_text import parse_yaml


def changed_document(text: str, changes: Sequence[str], problems: Problems) -> Any:
    """The mapping that the YAML `text` holds, with the "key=value" of `changes`; None with `problems` filled."""
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        problems.append(f"no YAML: {error}")
        return None
    if not isinstance(document, dict):
        problems.append("must be a mapping with the keys name, model, adapter, data, output_dir, ...")
        return None
    for change in changes:
        _change(document, change, problems)
    return document


def _change(document: dict[str, Any], change: str, problems: Problems) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        problems.append(f"--set {change}: write key=value, with dots between the levels of the key")
        return
    *parents, last = key.split(".")
    place: Any = document
    for name in parents:
        place = place.setdefault(name, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        problems.append(f"--set {change}: {'.'.join(parents)} is no mapping")
        return
    try:
        place[last] = parse_yaml(text)
    except yaml.YAMLError:
        problems.append(f"--set {change}: the value is no YAML")
