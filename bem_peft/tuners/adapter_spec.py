"""A config in one line, for the command line:  METHOD:field=value,field=value

    lora:r=8        kronecker:u_rank=8,v_rank=4        lora:r=8,target_modules=[o_proj,down_proj]
    composite:methods=[{method: head_gating, total_rank: 12}, {method: kronecker, u_rank: 4}]

or a FOLDER with an adapter_config.json. METHOD is a PEFT type in any case; a method of bem_peft may leave out its
"bem_". Lists and mappings are YAML's; a list of names may also be written with `+`, o_proj+down_proj. A name alone is
one module; all-linear, and what has signs of a regular expression, is text to PEFT. `adapter_text` is the inverse.
pt1 to pt4 and the config classes' names (dynamic_rank_mask) are METHODs as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from bem_peft.tuners.base import registry
from bem_peft.tuners.base.adapter_config import default_of
from bem_peft.tuners.base.field_help import field_hint
from bem_peft.yaml_text import parse_yaml

# a comma that parts fields: outside of brackets and quotes
PIECE = re.compile(r"""(?P<open>[\[{(])|(?P<close>[\])}])|(?P<quoted>"(?:[^"\\]|\\.)*"|'[^']*')|(?P<comma>,)|.""", re.S)
REGULAR = re.compile(r"[\^$*?()|\[\]\\]")
ABOUT_THE_FILE = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")


class AdapterSpecError(ValueError):
    """The text names no config."""


def config_class(method: str) -> type[PeftConfig] | None:
    """The config class of METHOD; None: `method_names()` does not have it."""
    known, name = registry.config_classes(), method.lower()
    own = {known[own] for own in registry.own_methods()}
    others = {alias: cls for cls in own for alias in getattr(cls, "aliases", ())}
    return known.get(name) or known.get(f"bem_{name}") or others.get(name)


def own_method_names() -> tuple[str, ...]:
    """The methods of bem_peft, as METHOD is written."""
    return tuple(name.removeprefix("bem_") for name in registry.own_methods())


def method_names() -> str:
    """Every method that PEFT knows now, as METHOD is written, ours first."""
    own = own_method_names()
    others = sorted(set(registry.config_classes()) - set(registry.own_methods()))
    return f"{', '.join(own)}; of PEFT: {', '.join(others)}"


def unknown_method(method: str) -> str:
    """The end of a message on a method that there is not."""
    names = [name.removeprefix("bem_") for name in registry.config_classes()]
    near = difflib.get_close_matches(method.lower(), names, n=1)
    return f"did you mean {near[0]!r}? Methods: {method_names()}" if near else f"methods: {method_names()}"


def parse_adapter(text: str) -> PeftConfig:
    """The config that `text` describes.

    Raises:
        AdapterSpecError: an unknown method or field, a missing `=`, or values that the config refuses.
    """
    if (Path(text) / "adapter_config.json").is_file():
        return PeftConfig.from_pretrained(text)
    method, _, rest = text.partition(":")
    if config_class(method) is None:
        raise AdapterSpecError(f"{text!r}: no method and no folder of that name; {unknown_method(method)}.")
    values: dict[str, Any] = {"method": method}
    for part in _fields(rest):
        name, equals, value = part.partition("=")
        if not equals:
            raise AdapterSpecError(f"{part!r}: write field=value.")
        values[name.strip()] = _value(value.strip(), part)
    return config_of(values, text)


def adapter_text(config: PeftConfig) -> str:
    """The line that `parse_adapter` reads as `config`: its method and the fields that are not at their default."""
    values = _values(config)
    method = values.pop("method")
    fields = ",".join(f"{name}={_written(value)}" for name, value in values.items())
    return f"{method}:{fields}" if fields else method


def _values(config: PeftConfig) -> dict[str, Any]:
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    found: dict[str, Any] = {"method": kind.removeprefix("bem_")}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.init and field.name not in ABOUT_THE_FILE and value != default_of(config, field.name):
            found[field.name] = _jsonable(value)
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, PeftConfig):
        return _values(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return getattr(value, "value", value)  # of an enum


def _written(value: Any) -> str:
    is_plain = isinstance(value, str) and _fields(value) == [value] and _value(value.strip(), value) == value
    return str(value) if is_plain else json.dumps(value, ensure_ascii=False)


def _fields(text: str) -> list[str]:
    found, depth, start = [], 0, 0
    for piece in PIECE.finditer(text):
        depth += bool(piece["open"]) - bool(piece["close"])
        if piece["comma"] and depth == 0:
            found.append(text[start : piece.start()])
            start = piece.end()
    return [part for part in (*found, text[start:]) if part.strip()]


def config_of(values: Mapping[str, Any], text: str) -> PeftConfig:
    """The config of {method: kronecker, u_rank: 8, ...}; a composite's `methods` are such mappings too.

    Args:
        text: what the messages name, as the line that the values were read from.

    Raises:
        AdapterSpecError: an unknown method or field, or values that the config refuses.
    """
    fields = dict(values)
    method = str(fields.pop("method", None))
    cls = config_class(method)
    if cls is None:
        raise AdapterSpecError(f"{text!r}: there is no method {method!r}; {unknown_method(method)}.")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = [name for name in fields if name not in known]
    if unknown:
        hint = field_hint(cls, unknown[0])
        more = f"; {hint}" if hint else ""
        raise AdapterSpecError(f"{unknown[0]!r}: write field=value with a field of {cls.__name__}{more}.")
    targets = fields.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and not REGULAR.search(targets):
        fields["target_modules"] = [targets]
    if isinstance(fields.get("methods"), list):
        fields["methods"] = [config_of(part, text) if isinstance(part, dict) else part for part in fields["methods"]]
    try:
        return cls(**fields)
    except (ValueError, TypeError) as error:
        raise AdapterSpecError(f"{text!r}: {error}") from error


def _value(text: str, part: str) -> Any:
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return parse_yaml(text)
        except yaml.YAMLError as error:
            raise AdapterSpecError(f"{part!r}: {' '.join(str(error).split())}.") from None
    if "+" in text:
        return [_value(piece, part) for piece in text.split("+")]
    if text in ("true", "True", "false", "False"):
        return text.lower() == "true"
    if text in ("none", "None", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
