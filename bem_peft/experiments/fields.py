"""Mappings into dataclasses, with every problem noted instead of the first one raised."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union

from bem_peft.tuners.base.field_help import field_hint


class Problems(list[str]):
    """What is wrong, in words, in the order it was found."""


def fill(cls: type, values: Mapping[str, Any], where: str, problems: Problems) -> Any:
    """`cls(**values)`, with every unknown or missing key and every wrong type noted.

    So that the rest is checked too, what is wrong has its default there, or None where it has none.
    """
    right = check_keys(cls, values, where, problems)
    given = {name: value for name, value in values.items() if name in right}
    for field in dataclasses.fields(cls):
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and field.name not in values:
            problems.append(f"{_at(where, field.name)}: is missing")
        if is_required:
            given.setdefault(field.name, None)
    return cls(**given)


def without_followers(found: Iterable[str], wrong: Iterable[str], where: str) -> list[str]:
    """`found` without what only follows from the fields of `where` that are `wrong`, which is noted already."""
    marks = [mark for name in wrong for mark in (f"{where}.{name}:", f"{where}.{name},", f"`{name}`")]
    return [problem for problem in found if not any(mark in problem for mark in marks)]


def check_keys(cls: type, values: Mapping[str, Any], where: str, problems: Problems) -> set[str]:
    """Note unknown keys and wrong types; returns the keys that are right."""
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    right = set()
    for name, value in values.items():
        if name not in fields:
            hint = field_hint(cls, str(name))
            problems.append(f"{_at(where, str(name))}: unknown key{'; ' + hint if hint else ''}")
        elif not fits(value, hints[name]):
            is_template = isinstance(value, dict) and any(value) and not any(value.values()) and fits("", hints[name])
            quotes = "; text with braces needs quotes" if is_template else ""
            what = f"must be {describe(hints[name])}, not {_kind(value)}{quotes}"
            problems.append(f"{_at(where, name)} = {value!r}: {what}")
        else:
            right.add(name)
    return right


def build_config(cls: type, values: Mapping[str, Any], where: str, problems: Problems) -> Any:
    """`cls(**values)` for a config that checks itself, or None.

    A config raises at its first error; the field that is to blame is taken out and the rest tried again, so that every
    error is noted.
    """
    before = len(problems)
    right = check_keys(cls, values, where, problems)
    config = blamed(cls, {name: value for name, value in values.items() if name in right}, where, problems)
    return config if len(problems) == before else None


def blamed(make: Callable[..., Any], values: Mapping[str, Any], where: str, problems: Problems) -> Any:
    """`make(**values)`, or None where it raises; each field that is to blame is noted."""
    before, rest = len(problems), dict(values)
    while True:
        config, error = _try(make, rest)
        if error is None:
            return config if len(problems) == before else None
        culprit = _culprit(make, rest, error)
        if culprit is None:
            problems.append(f"{where}: {error}")
            return None
        says = error if f"`{culprit}`" in error else f"{culprit} = {rest[culprit]!r}: {error}"
        problems.append(f"{where}: {says}")
        del rest[culprit]


def _try(make: Callable[..., Any], values: Mapping[str, Any]) -> tuple[Any, str | None]:
    try:
        return make(**values), None
    except (ValueError, TypeError) as error:
        return None, str(error)


def _culprit(make: Callable[..., Any], values: Mapping[str, Any], error: str) -> str | None:
    """The field that the error names, else one without which it does not come."""
    named = [name for name in re.findall(r"`(\w+)`", error) if name in values]
    if named:
        return named[0]
    for name in values:
        if _try(make, {key: value for key, value in values.items() if key != name})[1] != error:
            return name
    return None


def fits(value: object, hint: object) -> bool:
    """Whether a YAML value can stand for a type; types that this does not know pass, and the config itself judges."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in arguments
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value if arguments)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str)
    return not isinstance(hint, type) or not dataclasses.is_dataclass(hint) or isinstance(value, dict)


PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a mapping": "mappings"}
KINDS: Mapping[type, str] = {
    str: "text", type(None): "null", dict: "a mapping", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip


def describe(hint: object) -> str:
    """A type in a user's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in arguments))
    names: dict[object, str] = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if hint in names:
        return names[hint]
    if origin in (list, set, tuple):
        return f"a list of {PLURALS.get(describe(arguments[0]), describe(arguments[0]))}" if arguments else "a list"
    if origin is dict or hint is dict:
        return "a mapping"
    return getattr(hint, "__name__", str(hint))


def _kind(value: object) -> str:
    """What a value is, in a user's words."""
    if isinstance(value, list):
        kinds = dict.fromkeys(_kind(item) for item in value)
        return f"a list of {' and '.join(PLURALS.get(kind, kind) for kind in kinds)}" if kinds else "an empty list"
    return KINDS.get(type(value), type(value).__name__)


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
