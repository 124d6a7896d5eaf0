"""Where a result comes from: versions, code, hardware, and the settings that were in force."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bem_peft.kernels import backend

PACKAGES = (
    "bem_peft",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "trl",
    "deepspeed",
)


def provenance(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A JSON-able record; `settings_sha256` is the same for the same settings, whatever the order of their keys."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "settings": json.loads(text),
        "settings_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "versions": {"python": platform.python_version(), **_versions()},
        "git": git_state(Path.cwd()),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "kernels": backend.form(
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        ),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of the repository that `folder` stands in, and whether files differ from it; None: no repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "is_dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def hardware() -> dict[str, Any]:
    """Processor, memory in bytes, and accelerators."""
    found: dict[str, Any] = {"processor": _processor(), "logical_cpus": os.cpu_count(), "system": platform.platform()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found["accelerators"].append("mps")
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
