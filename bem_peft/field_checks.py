"""Checks of config fields: each raises an error that names the field, its value, the rule and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence


def field_error(field: str, value: object, rule: str, change: str = "") -> ValueError:
    text = f"`{field}` = {value!r}: {rule}"
    return ValueError(f"{text}; {change}." if change else f"{text}.")


def check_int(config: object, field: str, minimum: int = 1, maximum: int | None = None) -> None:
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{field}` = {value!r}: must be an int, not {type(value).__name__}.")
    if value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise field_error(field, value, f"must be at least {minimum}{upper}")


def check_number(
    config: object, field: str, minimum: float = -math.inf, maximum: float = math.inf, exclusive: bool = False
) -> None:
    """`exclusive`: the minimum itself is not allowed."""
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{field}` = {value!r}: must be a number, not {type(value).__name__}.")
    if not math.isfinite(value) or value < minimum or value > maximum or (exclusive and value == minimum):
        bracket = "(" if exclusive or minimum == -math.inf else "["
        closing = ")" if maximum == math.inf else "]"
        raise field_error(field, value, f"must be a finite number in {bracket}{minimum}, {maximum}{closing}")


def check_optional_number(config: object, field: str, minimum: float, exclusive: bool = False) -> None:
    if getattr(config, field) is not None:
        check_number(config, field, minimum, exclusive=exclusive)


def check_share(config: object, field: str) -> None:
    """A number in [0, 1)."""
    check_number(config, field, 0.0, 1.0)
    if getattr(config, field) == 1.0:
        raise field_error(field, getattr(config, field), "must be below 1")


def check_bool(config: object, field: str) -> None:
    value = getattr(config, field)
    if not isinstance(value, bool):
        raise TypeError(f"`{field}` = {value!r}: must be True or False, not {type(value).__name__}.")


def check_choice(config: object, field: str, choices: Sequence[str]) -> None:
    value = getattr(config, field)
    if value not in choices:
        raise field_error(field, value, f"must be one of {', '.join(map(repr, choices))}")
