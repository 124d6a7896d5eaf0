"""The summary says which model types the sites table does not have, and which the installed version lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from bem_peft.sites.models import language_model_types

TABLE = Path(__file__).with_name("sites_table.json")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    ran = [r for r in reports if "test_sites_of_the_installed_version" in r.nodeid]
    if not ran:
        return
    known, have = json.loads(TABLE.read_text()).keys(), language_model_types()
    changed = sorted(r.nodeid.partition("[")[2].rstrip("]") for r in ran if r.failed)
    lines = {"new": sorted(set(have) - known), "gone": sorted(known - set(have)), "changed": changed}
    terminalreporter.section(f"sites of transformers {transformers.__version__}")
    for what, types in lines.items():
        terminalreporter.line(f"{what}: {', '.join(types) or '-'}")
