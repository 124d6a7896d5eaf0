"""The table of all model types' sites: for each type the rows that versions of transformers gave.

{type: [{"transformers": [version, ...], "reviewed": true, **row}, ...]}; a row is `site_table_row`'s or {"error": why}.
`bem-peft sites --all --write FILE` adds the installed version to it; what was read by hand stays `reviewed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
Table = dict[str, list[Row]]
OUR_FIELDS = ("transformers", "reviewed")


def plain(row: Mapping[str, Any]) -> Row:
    """`row` without what says where it came from; of an error only that it is one, its words change with versions."""
    return {"error": ""} if "error" in row else {key: v for key, v in row.items() if key not in OUR_FIELDS}


def differences(table: Table, rows: Mapping[str, Row]) -> dict[str, list[str]]:
    """Types of `rows` that are new, types that are gone, and types whose row no version in the table gave."""
    changed = [name for name, row in rows.items() if name in table and plain(row) not in map(plain, table[name])]
    return {
        "new": sorted(rows.keys() - table.keys()),
        "gone": sorted(table.keys() - rows.keys()),
        "changed": sorted(changed),
    }


def merged_table(table: Table, rows: Mapping[str, Row], version: str) -> tuple[Table, dict[str, list[str]]]:
    """`table` with `rows` as what `version` gives, and the differences to it before."""
    merged: Table = {}
    for name in sorted({*table, *rows}):
        variants: list[Row] = []
        for row in table.get(name, []):
            others = [seen for seen in row["transformers"] if seen != version]
            if others:
                variants.append({**row, "transformers": others})
        if name in rows:
            same = next((row for row in variants if plain(row) == plain(rows[name])), None)
            if same is None:
                before = [row for row in table.get(name, []) if plain(row) == plain(rows[name])]
                reviewed = {"reviewed": True} if any(row.get("reviewed") for row in before) else {}
                variants.append({"transformers": [version], **reviewed, **rows[name]})
            else:
                same["transformers"] = sorted([*same["transformers"], version], key=_numbers)
        if variants:
            merged[name] = sorted(variants, key=lambda row: _numbers(row["transformers"][0]))
    return merged, differences(table, rows)


def table_text(table: Table) -> str:
    """JSON with one row a line, so that a change shows as one."""
    lines = []
    for name, variants in table.items():
        rows = ",\n    ".join(json.dumps(row) for row in variants)
        lines.append(f"  {json.dumps(name)}: [\n    {rows}]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in version.split(".")]
