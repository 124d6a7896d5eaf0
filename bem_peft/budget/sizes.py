"""The sizes of a config that a budget search may change, and the values that the config accepts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from peft import PeftConfig

# what PEFT calls the size of its own methods
PEFT_SIZES = {"LORA": ("r",), "LOKR": ("r",), "LOHA": ("r",), "ADALORA": ("init_r",), "VERA": ("r",)}


def _free_names(config: PeftConfig, free: Iterable[str] | None) -> tuple[str, ...]:
    if free is None:
        own = getattr(config, "size_fields", None) or PEFT_SIZES.get(str(getattr(config.peft_type, "value", "")))
        if own is None:
            raise ValueError(f"`free`: {type(config).__name__} names no sizes of its own; give the fields to search.")
        return tuple(own)
    names = tuple(free)
    own = getattr(config, "size_fields", None) or ()
    unknown = [name for name in names if name not in own and not hasattr(config, name)]
    if unknown or not names:
        raise ValueError(f"`free` = {list(names)}: {type(config).__name__} has no field {unknown}.")
    return names


def sizes_of(config: PeftConfig, free: Sequence[str] | Mapping[str, Sequence[int] | None] | None, limit: int) -> Sizes:
    """The sizes that `match_budget` searches. Raises ValueError where `free` names no field."""
    choices = {name: sorted(values) for name, values in free.items() if values} if isinstance(free, Mapping) else {}
    names = sorted(_free_names(config, free), key=lambda name: name not in choices)
    return Sizes(config, tuple(names), choices, limit)  # the given choices first: along them nothing needs to grow


@dataclass(frozen=True)
class Sizes:
    """The values of `names` in `config`: one of `choices`, or 1 to `limit`, where the config accepts them."""

    config: PeftConfig
    names: tuple[str, ...]
    choices: Mapping[str, Sequence[int]]
    limit: int
    _accepted: dict[Any, _Accepted] = field(default_factory=dict)

    def config_with(self, values: Sequence[int]) -> PeftConfig | None:
        """The config with these values of the first names, or None where it refuses them."""
        sizes = dict(zip(self.names, values, strict=False))
        change = getattr(self.config, "with_sizes", None)  # a config may have sizes that follow another one
        try:
            return replace(self.config, **sizes) if change is None else change(**sizes)
        except ValueError:
            return None

    def accepted(self, outer: tuple[int, ...]) -> _Accepted:
        """Values of the name after `outer` that the config accepts; of several methods' sizes, "0.r" and "1.r", each
        method's own decide."""
        name = self.names[len(outer)]
        whose = name.partition(".")[0] if "." in name else None
        key = name, tuple(v for n, v in zip(self.names, outer, strict=False) if whose in (None, n.partition(".")[0]))
        if key not in self._accepted:
            values = self.choices.get(name) or range(1, self.limit + 1)
            self._accepted[key] = _Accepted(v for v in values if self.config_with((*outer, v)) is not None)
        return self._accepted[key]

    def first(self, outer: tuple[int, ...]) -> tuple[int, ...]:
        """`outer` and the smallest accepted values of the other names; `outer` alone where there are none."""
        while len(outer) < len(self.names):
            value = self.accepted(outer).get(0)
            if value is None:
                break
            outer = (*outer, value)
        return outer

    def smallest(self) -> PeftConfig:
        """The config with the smallest sizes that it accepts."""
        values = self.first(())
        found = self.config_with(values)
        if found is None or len(values) < len(self.names):
            raise ValueError(
                f"{type(self.config).__name__} accepts no value of {self.names[len(values)]} up to {self.limit}."
            )
        return found


class _Accepted:
    """Values that are found as they are asked for: a config is made for each, and most lie far beyond the anchor."""

    def __init__(self, values: Iterator[int]) -> None:
        self._found: list[int] = []
        self._rest = values

    def get(self, i: int) -> int | None:
        """The value at `i`, or None where there are not so many."""
        self._found += islice(self._rest, max(0, i + 1 - len(self._found)))
        return self._found[i] if i < len(self._found) else None

    def __iter__(self) -> Iterator[int]:
        i = 0
        while (value := self.get(i)) is not None:
            yield value
            i += 1
