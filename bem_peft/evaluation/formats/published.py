"""JSON of PEFT's method_comparison: one seed's values a run, no item scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bem_peft.evaluation.results import SystemResult


def read_published(path: Path, run: Any) -> SystemResult:
    """The run that the JSON of `path` holds. Raises ValueError where it is no such run, or did not end well."""
    try:
        info, train = run["run_info"], run["train_info"]
        last = train["metrics"][-1]
        accuracy = float(last["test accuracy"])
        values = {
            "accuracy": accuracy,
            "parameters": float(train["num_trainable_params"]),
            "file_bytes": float(train["file_size"]),
            "memory_bytes": float(train["accelerator_memory_max"]),
            "seconds": float(train["train_time"]),
        }
        seed = int(info["train_config"]["seed"])
        method = str((info["peft_config"] or {}).get("peft_type", "full fine-tuning"))
        name = str(info["experiment_name"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of PEFT's method_comparison: {error!r}.") from error
    if train["status"] != "success":
        raise ValueError(f"{path}: the run ended with {train['status']!r}.")
    warning = f"one seed ({seed}) and no item scores were published: no interval, no verdict"
    return SystemResult(
        name, method, values, seeds=(seed,), warnings=(warning,),
        provenance=[{"versions": run["meta_info"]["package_info"], "hardware": run["meta_info"]["system_info"]}],
    )  # fmt: skip
