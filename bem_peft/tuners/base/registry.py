"""The one place that touches PEFT's private tables: new members of `PeftType` and their registration.

PEFT has no plugin point for a method that lives outside of it: `register_peft_method` refuses a name that is not
already a member of the `PeftType` enumeration. `extend_peft_type` adds the member the way a class body does.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import peft
from peft.utils import PeftType
from torch import nn

from bem_peft.upstream import require_supported


def extend_peft_type(name: str) -> PeftType:
    """The member `name` of `PeftType`, added if it is not there yet.

    Args:
        name: upper-case name of the method, e.g. "BEM_KRONECKER"; it is the saved `peft_type`.

    Raises:
        UpstreamError: peft or transformers is older than this package supports.
    """
    require_supported()
    if name not in PeftType.__members__:
        member = enum._proto_member(name)  # type: ignore[attr-defined]
        type.__setattr__(PeftType, name, member)
        member.__set_name__(PeftType, name)
    return PeftType[name]


_own: list[str] = []
# chooses the sizes of a config with a `budget`; set by the package, as counting stands above the tuners
choose_sizes: Callable[[nn.Module, Any], None] | None = None


def own_methods() -> tuple[str, ...]:
    """Lower-case names of the tuner types that this package has registered."""
    return tuple(_own)


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Make a tuner type known to PEFT; a second call, of a module that was loaded again, puts its classes in place.

    Args:
        name: lower-case name; the prefix of the saved keys is `name + "_"`.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    member = extend_peft_type(name.upper())
    if name not in _own:
        _own.append(name)
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:  # the module was reloaded: point PEFT to the new classes
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
        PEFT_TYPE_TO_PREFIX_MAPPING[member] = name + "_"
        return
    peft.utils.register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


def config_classes() -> dict[str, type]:
    """Lower-case PEFT type -> config class, of every method that PEFT knows now."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(kind.value).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
