"""Command line: `bem-peft sites MODEL_OR_TYPE` and `bem-peft sites --all [--write FILE]`."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers

from bem_peft.tuners import sites

_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after a message on stderr."""
    parser = argparse.ArgumentParser(prog="bem-peft", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sites", help="print where W_O and W_down stand in a model")
    command.add_argument("model", nargs="?", help="model type of transformers (llama), folder or hub id; config only")
    command.add_argument("--all", action="store_true", help="all causal and seq2seq language model types, as JSON")
    command.add_argument("--write", type=Path, metavar="FILE", help="with --all: write there, keeping `reviewed` marks")
    arguments = parser.parse_args(argv)
    if arguments.all == (arguments.model is not None):
        command.error("give either a model or --all")
    if arguments.write is not None and not arguments.all:
        command.error("--write goes with --all")
    try:
        if arguments.all:
            _print_all(arguments.write)
        else:
            print("\n".join(_text_lines(sites.find_sites(sites.build_meta(arguments.model)))))
    except (sites.SiteError, sites.ModelBuildError, OSError, json.JSONDecodeError) as error:
        print(f"bem-peft: {error}", file=sys.stderr)
        return _USER_ERROR
    return 0


def _text_lines(table: sites.SiteTable) -> Iterable[str]:
    rows: dict[tuple[str, ...], int] = {}
    for site in table.sites:
        heads = "-" if site.num_heads is None else str(site.num_heads)
        shape = f"{site.in_features} -> {site.out_features}"
        key = (site.role, sites.name_pattern(site.name), site.mixer, shape, heads)
        rows[key] = rows.get(key, 0) + 1
    cells = [("role", "name", "mixer", "in -> out", "heads", "count"), *((*key, str(n)) for key, n in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield from ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    yield f"{len(table.sites)} sites in {table.blocks} blocks"
    for pattern, count in sites.pattern_counts(table.fused_experts).items():
        yield f"no site: {pattern} (x{count}) holds the W_down of all experts in one parameter"


def _print_all(path: Path | None) -> None:
    """Writes {"transformers": version, "models": {type: row}}; a row that did not change keeps its `reviewed`."""
    known = json.loads(path.read_text())["models"] if path is not None and path.exists() else {}
    rows: dict[str, dict[str, object]] = {}
    for model_type, row in sites.site_table_rows():
        before = known.get(model_type, {})
        if before.get("reviewed") and {**row, "reviewed": True} == before:
            row["reviewed"] = True
        rows[model_type] = row
    lines = ",\n".join(f"  {json.dumps(model_type)}: {json.dumps(row)}" for model_type, row in rows.items())
    text = f'{{"transformers": {json.dumps(transformers.__version__)}, "models": {{\n{lines}\n}}}}\n'
    if path is None:
        print(text, end="")
    else:
        path.write_text(text)
        unplaced = sum("error" in row for row in rows.values())
        print(f"wrote {len(rows)} model types to {path}, {unplaced} of them without sites")


if __name__ == "__main__":
    sys.exit(main())
