"""Times of systems on one machine as a file, and as costs of a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bem_peft.budget.latency import why_inconclusive
from bem_peft.evaluation.profiler import BASE, Profile, Workload, requests_per_minute
from bem_peft.evaluation.report.markdown_table import markdown_table, plain
from bem_peft.evaluation.results import SystemResult
from bem_peft.json_text import read_json
from bem_peft.whole_file import write_whole

VERSION = 1
TOLERANCE_BEFORE = 0.05  # of a document that does not say it
COLUMNS = (
    "system", "workload", "p50 ms", "p95 ms", "p99 ms", "tokens/s", "to base", "to anchor", "verdict", "requests/min",
    "peak MiB",
)  # fmt: skip


@dataclass(frozen=True)
class ProfileDocument:
    """What `bem-peft profile` measured. The profiles name their systems; `anchor` is one of them, and the base is
    "base". provenance: machine, versions, settings. request: (prompt tokens, new tokens) of requests a minute, or None.
    """

    anchor: str
    profiles: tuple[Profile, ...]
    provenance: dict[str, Any]
    request: tuple[int, int] | None = None

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(profile.system for profile in self.profiles))

    @property
    def workloads(self) -> list[Workload]:
        return list(dict.fromkeys(profile.workload for profile in self.profiles))

    def at(self, workload: Workload) -> list[Profile]:
        """Every system's profile at one workload."""
        return [profile for profile in self.profiles if profile.workload == workload]

    def requests_per_minute(self, system: str) -> float | None:
        """Of one prompt and its answer; None where prefill and decoding were not both measured."""
        found = {p.workload.kind: p for p in self.profiles if p.system == system}
        if self.request is None or not {"prefill", "decode"} <= set(found):
            return None
        return requests_per_minute(found["prefill"], found["decode"], self.request[1])

    def with_times(self, systems: Sequence[SystemResult]) -> list[SystemResult]:
        """The systems with their median times among their values, where one was measured.

        Raises:
            ValueError: none of the systems was.
        """
        known = {s.name for s in systems}
        if not known & set(self.systems):
            raise ValueError(
                f"the profiles are of {', '.join(self.systems)}, of which none is compared here ({', '.join(known)})."
            )
        found = []
        for system in systems:
            times: dict[str, float] = {}
            for profile in self.profiles:
                if profile.system == system.name:
                    times.setdefault(f"{profile.workload.kind}_ms", profile.p50_ms)
            found.append(replace(system, values={**system.values, **times}))
        return found

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of a table, one row a workload and system; `COLUMNS` names them."""
        found: list[tuple[str, ...]] = []
        for workload in self.workloads:
            for p in base_first(self.at(workload), self.anchor):
                served = self.requests_per_minute(p.system)
                found.append(
                    (
                        p.system, f"{workload.kind}, {workload.batch} x {workload.tokens}", f"{p.p50_ms:.2f}",
                        f"{p.p95_ms:.2f}", f"{p.p99_ms:.2f}", f"{p.tokens_per_second:,.0f}",
                        _ratio(p.ratio_to_base), _ratio(p.ratio_to_anchor), p.verdict or "-",
                        "-" if served is None else f"{served:,.1f}",
                        f"{p.peak_memory_bytes / 2**20:,.1f}",
                    )
                )  # fmt: skip
        return found

    def to_markdown(self) -> str:
        lines = markdown_table(COLUMNS, self.rows(), (*range(2, 8), 9, 10))
        return "\n".join([*lines, "", plain(self.how())])

    def to_text(self) -> str:
        """The table for a terminal."""
        cells = [COLUMNS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, self.how()])

    def how(self) -> str:
        """What the numbers are, in a sentence or two; with the noise floor."""
        noises = [(w.kind, *self.at(w)[0].noise) for w in self.workloads]
        floors = dict.fromkeys(f"{kind} [{low:.3f}, {high:.3f}]" for kind, low, high in noises)
        hardware = self.provenance.get("hardware", {})
        machine = ", ".join([*hardware.get("accelerators", []), str(hardware.get("processor", ""))])
        settings = self.provenance.get("settings", {})
        tolerance = float(settings.get("tolerance_ratio", TOLERANCE_BEFORE))
        open_ones = "".join(
            f" {p.system}, {p.workload.kind}, is inconclusive: "
            f"{why_inconclusive(*p.ratio_to_anchor[1:], *p.noise, tolerance)}."
            for p in self.profiles if p.verdict == "INCONCLUSIVE" and p.ratio_to_anchor is not None
        )  # fmt: skip
        request = "" if self.request is None else (
            f" A request is {self.request[0]:,} tokens in and {self.request[1]:,} out, by the medians."
        )  # fmt: skip
        return (
            f"Every system in turn and back again, {self.profiles[0].runs} runs each; ratios are geometric means with "
            "90 % intervals, and PASS is surely no slower than the anchor by more than the tolerance. Noise floor "
            f"(anchor against itself): {', '.join(floors)}.{open_ones}{request} "
            f"{settings.get('dtype', '')} on {settings.get('device', '')} ({machine})."
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION, "anchor": self.anchor, "request": None if self.request is None else list(self.request),
            "provenance": self.provenance, "profiles": [profile.to_dict() for profile in self.profiles],
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> ProfileDocument:
        """Read a document of `write`. Raises ValueError where it is none, or of another version."""
        try:
            given = read_json(path)
            if given["version"] != VERSION:
                raise ValueError(f"{path} has version {given['version']}, this release reads {VERSION}.")
            profiles = tuple(_profile(entry) for entry in given["profiles"])
            request = None if given["request"] is None else (int(given["request"][0]), int(given["request"][1]))
            return cls(str(given["anchor"]), profiles, dict(given["provenance"]), request)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is no document of `bem-peft profile`: {error!r}.") from error


def _profile(entry: dict[str, Any]) -> Profile:
    pairs = ("p95_interval", "ratio_to_base", "ratio_to_anchor", "noise", "times_ms")
    tuples = {name: None if entry[name] is None else tuple(entry[name]) for name in pairs}
    return Profile(**{**entry, **tuples, "workload": Workload(**entry["workload"])})


def base_first(profiles: Sequence[Profile], anchor: str) -> list[Profile]:
    """The base, the anchor, then the others as they come."""
    return sorted(profiles, key=lambda p: (p.system != BASE, p.system != anchor))


def _ratio(found: tuple[float, float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"
