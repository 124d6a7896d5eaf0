"""The newest rows of overhead.py's table as Markdown: all with intervals and limits, or the extract of docs/speed.md.

python benchmarks/overhead_table.py benchmarks/results/overhead_smollm2.csv [--short] > table.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from results_table import newest, sources

KEY = ("model", "blocks", "dtype", "mode", "phase", "variant")
SHORT = [
    ("prefill 256", "float32"), ("prefill 256", "bfloat16"),
    ("decode batch 1", "float32"), ("decode batch 1", "bfloat16"),
    ("training step 2 x 128", "float32"), ("training step 2 x 128", "bfloat16"), ("memory batch 2", "float32"),
]  # fmt: skip
ORDER = ["LoRA W_O", "PT1", "LoRA W_down", "PT3", "LoRA W_O+W_down", "PT2", "PT4"]


def rank(variant: str) -> tuple[int, str]:
    """Each method after the LoRA at its sites, the others last."""
    if variant.startswith("LoRA"):
        return ORDER.index(variant), variant
    return (ORDER.index(variant[:3]), variant) if variant[:3] in ORDER else (len(ORDER), variant)


def percent(value: str) -> str:
    return f"{100 * float(value):+.1f}"


def whole_table(rows: list[dict[str, str]]) -> str:
    lines = [
        "Overhead over the base in %, median [95 % interval of the median]; limit: what FLOPs (prefill, training),",
        "bytes read (decode) or bytes that must be kept (memory) dictate; parameters of the adapter. Measured on",
        f"{sources(rows)}.",
    ]
    sections = list(dict.fromkeys((r["model"], r["blocks"], r["mode"], r["phase"]) for r in rows))
    for section in sections:
        mine = [r for r in rows if (r["model"], r["blocks"], r["mode"], r["phase"]) == section]
        dtypes = list(dict.fromkeys(r["dtype"] for r in mine))
        bases = {r["dtype"]: r["base"] for r in mine}
        lines += ["", f"### {section[0]}, {section[1]} blocks, {section[2]}, {section[3]}", ""]
        heads = [f"{dtype}, base {bases[dtype]} | limit" for dtype in dtypes]
        lines.append(f"| variant | parameters | {' | '.join(heads)} |")
        lines.append("| --- | ---: |" + " ---: |" * (2 * len(dtypes)))
        for variant in sorted({r["variant"] for r in mine}, key=rank):
            found = {r["dtype"]: r for r in mine if r["variant"] == variant}
            cells = []
            for dtype in dtypes:
                r = found.get(dtype)
                if r is None:
                    cells.append("- | -")
                    continue
                interval = "" if r["low"] == r["high"] else f" [{percent(r['low'])}, {percent(r['high'])}]"
                cells.append(f"{percent(r['overhead'])}{interval} | {100 * float(r['limit']):.2f}")
            size = int(next(iter(found.values()))["parameters"])
            lines.append(f"| {variant} | {size:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(rows: list[dict[str, str]]) -> str:
    found = {(r["variant"], r["phase"], r["dtype"]): r for r in rows}
    lines = [
        "| % over the base (limit) | prefill 256, fp32 | bf16 | decode, fp32 | bf16 | training step, fp32 | bf16 "
        "| memory, fp32 |",
        "| --- |" + " ---: |" * len(SHORT),
    ]
    for variant in sorted({r["variant"] for r in rows}, key=rank):
        cells = []
        for phase, dtype in SHORT:
            r = found.get((variant, phase, dtype))
            cells.append("-" if r is None else f"{percent(r['overhead'])} ({100 * float(r['limit']):.1f})")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    rows = newest(args.csv, KEY)
    print(short_table(rows) if args.short else whole_table(rows))


if __name__ == "__main__":
    main()
