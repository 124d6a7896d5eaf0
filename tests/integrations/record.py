"""The interfaces that bem_peft/integrations is written against, as they are installed here.

python tests/integrations/record.py axolotl|swift            # writes tests/integrations/<package>.json

In an environment that has the package; `make test` has neither, and holds the plugins to what is written.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import sys
from pathlib import Path
from typing import Any

# package -> distribution, and what the plugin takes of it: methods of classes, defaults of dataclasses
TAKEN: dict[str, tuple[str, dict[str, list[str]], list[str]]] = {
    "axolotl": (
        "axolotl",
        {"axolotl.integrations.base:BasePlugin": ["get_input_args", "get_adapter_capabilities", "load_adapter"]},
        ["axolotl.integrations.base:AdapterCapabilities"],
    ),
    "swift": (
        "ms-swift",
        {"swift.tuner_plugin:PeftTuner": ["prepare_model", "save_pretrained", "from_pretrained"]},
        ["swift.arguments.tuner_args:TunerArguments"],
    ),
}


def parameters(function: Any) -> list[list[Any]]:
    """[name, default] of each parameter; without a default the name alone."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        star = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        default = [] if parameter.default is parameter.empty else [parameter.default]
        found.append([star + parameter.name, *default])
    return found


def defaults(cls: type) -> dict[str, Any]:
    """Field -> [default], [] where it has none."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        found[field.name] = [] if made is dataclasses.MISSING else [made]
    return found


def load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def record(package: str) -> dict[str, Any]:
    """What is installed, in the form of the file."""
    distribution, classes, data = TAKEN[package]
    return {
        "version": importlib.metadata.version(distribution),
        "methods": {
            place: {
                name: {"kind": type(inspect.getattr_static(load(place), name)).__name__,
                       "parameters": parameters(getattr(load(place), name))}
                for name in names
            }
            for place, names in classes.items()
        },
        "dataclasses": {place: defaults(load(place)) for place in data},
    }  # fmt: skip


if __name__ == "__main__":
    file = Path(__file__).parent / f"{sys.argv[1]}.json"
    file.write_text(json.dumps(record(sys.argv[1]), indent=1) + "\n", encoding="utf-8")
