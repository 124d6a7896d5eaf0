"""A config in one line, for the command line:  METHOD:field=value,field=value

    lora:r=8        kronecker:u_rank=8,v_rank=4        lora:r=8,target_modules=o_proj+down_proj

or a FOLDER with an adapter_config.json. METHOD is a PEFT type in any case; a method of bem_peft may leave out its
"bem_". `+` parts the entries of a list.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peft import PeftConfig

from bem_peft.tuners.base import registry


class AdapterSpecError(ValueError):
    """The text names no config."""


def config_class(method: str) -> type[PeftConfig] | None:
    """The config class of METHOD; None: `method_names()` does not have it."""
    known = registry.config_classes()
    return known.get(method.lower()) or known.get(f"bem_{method.lower()}")


def method_names() -> str:
    """Every method that PEFT knows now, as METHOD is written."""
    return ", ".join(sorted(name.removeprefix("bem_") for name in registry.config_classes()))


def parse_adapter(text: str) -> PeftConfig:
    """The config that `text` describes.

    Raises:
        AdapterSpecError: an unknown method or field, a missing `=`, or values that the config refuses.
    """
    if (Path(text) / "adapter_config.json").is_file():
        return PeftConfig.from_pretrained(text)
    method, _, rest = text.partition(":")
    cls = config_class(method)
    if cls is None:
        raise AdapterSpecError(f"{text!r}: no method and no folder of that name; methods: {method_names()}.")
    fields = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in fields:
            raise AdapterSpecError(f"{part!r}: write field=value with a field of {cls.__name__}.")
        values[name] = _value(value)
    if isinstance(values.get("target_modules"), str):
        values["target_modules"] = [values["target_modules"]]
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise AdapterSpecError(f"{text!r}: {error}") from error


def _value(text: str) -> Any:
    if "+" in text:
        return [_value(part) for part in text.split("+")]
    if text in ("true", "True", "false", "False"):
        return text.lower() == "true"
    if text in ("none", "None"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
