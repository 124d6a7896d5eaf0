"""bem-peft sites: where W_O and W_down stand in a model, or in every model type of transformers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bem_peft.sites.find import SiteTable


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `sites`."""
    command = commands.add_parser("sites", help="print where W_O and W_down stand in a model")
    command.add_argument("model", nargs="?", help="model type of transformers (llama), folder or hub id; config only")
    command.add_argument("--all", action="store_true", help="all causal and seq2seq language model types, as JSON")
    command.add_argument("--write", type=Path, metavar="FILE", help="with --all: write there, keeping `reviewed` marks")
    command.set_defaults(run=partial(_sites, command))


def _sites(command: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.all == (arguments.model is not None):
        command.error("give either a model or --all")
    if arguments.write is not None and not arguments.all:
        command.error("--write goes with --all")
    if arguments.all:
        _print_all(arguments.write)
    else:
        from bem_peft.sites.find import build_meta, find_sites

        print("\n".join(_text_lines(find_sites(build_meta(arguments.model)))))
    return 0


def _text_lines(table: SiteTable) -> Iterable[str]:
    from bem_peft.sites.find import name_pattern, pattern_counts

    rows: dict[tuple[str, ...], int] = {}
    for site in table.sites:
        heads = "-" if site.num_heads is None else str(site.num_heads)
        shape = f"{site.in_features} -> {site.out_features}"
        key = (site.role, name_pattern(site.name), site.mixer, shape, heads)
        rows[key] = rows.get(key, 0) + 1
    for fused in table.experts:
        reached = "?" if fused.experts_per_token is None else fused.experts_per_token
        shape = f"{fused.in_features} -> {fused.out_features}"
        mixer = f"{fused.num_experts} experts, {reached} a token"
        key = (fused.role, f"{name_pattern(fused.name)} ({fused.parameter})", mixer, shape, "-")
        rows[key] = rows.get(key, 0) + 1
    cells = [("role", "name", "mixer", "in -> out", "heads", "count"), *((*key, str(n)) for key, n in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield from ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    yield f"{len(table.sites) + len(table.experts)} sites in {table.blocks} blocks"
    for pattern, count in pattern_counts(table.obstacles).items():
        reason = next(why for name, why in table.obstacles.items() if name_pattern(name) == pattern)
        yield f"no site: {pattern} (x{count}), W_down of all experts: {reason}"


def _print_all(path: Path | None) -> None:
    """Print the rows of all types, or merge them into the table at `path`, and say what is new, gone and changed."""
    import transformers

    from bem_peft.sites.find import site_table_rows
    from bem_peft.sites.table import merged_table, table_text

    known = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    version = transformers.__version__
    rows = dict(site_table_rows())
    table, changes = merged_table(known, rows, version)
    text = table_text(table)
    if path is None:
        print(text, end="")
        return
    path.write_text(text, encoding="utf-8")
    unplaced = sum("error" in row for row in rows.values())
    print(f"wrote {len(rows)} model types of transformers {version} to {path}, {unplaced} of them without sites")
    for what, types in changes.items():
        print(f"{what}: {', '.join(types) or '-'}")
