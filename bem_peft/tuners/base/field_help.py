"""What a config says of its fields: the arguments in its `help`, and an error for a name that it does not have."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

WIDTH = 110
FOR_FILES = {field.name for field in dataclasses.fields(PeftConfig)}  # of which two are for a user to set
OF_PEFT = {
    "task_type": "'CAUSAL_LM' or 'SEQ_2_SEQ_LM': which of PEFT's model classes wraps the model.",
    "inference_mode": "As PEFT saves it: the adapter is loaded without gradients.",
}


def field_hint(cls: type, name: str) -> str:
    """What `cls` has in place of `name`, as the end of a message; "" where nothing is near."""
    neighbours: Mapping[str, str] = getattr(cls, "neighbours", {})
    if name in neighbours:
        return f"here it is {neighbours[name]}"
    near = difflib.get_close_matches(name, [field.name for field in dataclasses.fields(cls) if field.init], n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def unknown_field(cls: type, name: str) -> TypeError:
    """In Python's words, which PEFT looks for where a file of a newer release has a field more."""
    hint = field_hint(cls, name) or f"see help({cls.__name__})"
    return TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument '{name}': {hint}")


def with_arguments(cls: type) -> None:
    """Append what the fields are to `cls.__doc__`, from the help that they carry (`python -OO` has no docstrings)."""
    if cls.__doc__ is None or "\nArgs:" in cls.__doc__:
        return
    lines = [textwrap.dedent("    " + cls.__doc__.rstrip()), "", "Args:"]
    own = inspect.get_annotations(cls)
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in own):  # the method's own first
        text = field.metadata.get("help") if field.name not in FOR_FILES else OF_PEFT.get(field.name)
        if field.init and text:
            said = "" if "default" in text else f" Default: {_default(field)}."
            lines += textwrap.wrap(
                f"{field.name} ({_type(field.type)}): {text.strip()}{said}", WIDTH, initial_indent="    ",
                subsequent_indent="        ",
            )  # fmt: skip
    cls.__doc__ = "\n".join(lines)


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return repr(field.default)
