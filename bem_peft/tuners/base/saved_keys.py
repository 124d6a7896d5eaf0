"""Whether a file holds the adapter that its config describes: PEFT takes what it finds, and leaves the rest."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from bem_peft.tuners.base.layer import AdapterLayer
from bem_peft.tuners.base.plan import some
from bem_peft.tuners.base.registry import own_methods


def check_saved_keys(model: nn.Module, adapter_name: str, keys: Iterable[str]) -> None:
    """Raise where the keys of a file, which hold no adapter name, are not those of the adapter in `model`.

    Raises:
        ValueError: a key is missing, or the model has no place for it.
    """
    expected: set[str] = set()
    prefixes = tuple(f"{method}_" for method in own_methods())
    buffers: set[str] = set()  # counts of a training run; a file of parameters alone does without
    obsolete: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            for container in module.adapter_layer_names:
                if adapter_name in getattr(module, container):
                    adapter = getattr(module, container)[adapter_name]
                    place = _without_wrappers(f"{name}.{container}.")
                    expected |= {place + key for key, _ in adapter.named_parameters()}
                    buffers |= {place + key for key, _ in adapter.named_buffers()}
                    obsolete |= {place + key for key in adapter.obsolete_keys}
    given = {_without_wrappers(key) for key in keys if any(part.startswith(prefixes) for part in key.split("."))}
    unexpected = sorted(key for key in given - expected - buffers if not key.startswith(tuple(obsolete)))
    missing = sorted(expected - given)
    if missing or unexpected:
        raise ValueError(
            f"the file does not hold the adapter {adapter_name!r} that the config describes: "
            + (f"missing {some(missing)}; " if missing else "")
            + (f"unexpected {some(unexpected)}; " if unexpected else "")
            + "load it with the config and the base model that it was saved with."
        )


def _without_wrappers(key: str) -> str:
    """A key of a module or file without what FSDP and PeftModel put before it."""
    return key.removeprefix("_fsdp_wrapped_module.").removeprefix("base_model.model.")
