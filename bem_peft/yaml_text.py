"""YAML 1.2's scalars by PyYAML's safe loader."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2: yes and 1:30 and dates are text, 1e-3 is a number, 012 is
    none.

    A key that stands twice is an error, and so is a number with a leading zero, which is 10 in YAML 1.1 and 12 in 1.2.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits.startswith("0") and digits[1] not in "xo":
            raise yaml.constructor.ConstructorError(
                None, None, f"{text} could be octal or decimal: write {int(text)}, or 0o{digits.lstrip('0') or 0}",
                node.start_mark,
            )  # fmt: skip
        try:
            return int(text, 0)
        except ValueError:
            raise yaml.constructor.ConstructorError(None, None, f"{text} is no number", node.start_mark) from None


for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+0123456789."),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), [*first, ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)


def parse_yaml(text: str) -> Any:
    """The document of `text`. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (RecursionError, ValueError, TypeError) as error:
        raise yaml.YAMLError(f"cannot be read ({error})") from error
