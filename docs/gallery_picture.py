"""The picture of the README, docs/gallery/differences.svg, from the table of docs/gallery/README.md.

python docs/gallery_picture.py            # says whether the picture is not what it gives, and exits with 1
python docs/gallery_picture.py --write
"""

from __future__ import annotations

import re
from pathlib import Path

from written_page import write_or_check

GALLERY = Path(__file__).parent / "gallery"
PAGE, PICTURE = GALLERY / "README.md", GALLERY / "differences.svg"
METRICS = {"nll": ("loss on held-out verses", (-0.08, 0.04), 0.02), "forgetting": ("loss forgotten", (-1.4, 0.2), 0.2)}
SYSTEMS = {"pt3-kronecker": "PT3", "pt4-film": "PT4"}
WIDTH, LEFT, PANEL, GAP, TOP, ROW = 760, 56, 310, 60, 92, 40


def differences() -> dict[tuple[str, str], tuple[float, float, float]]:
    """(system, metric) -> difference over all items and its interval, as the page has them."""
    row = re.compile(r"\| (\S+) \| (\S+) \| all \| (\S+) \\\[(\S+), (\S+)\\\] \|")
    found = row.findall(PAGE.read_text(encoding="utf-8"))
    return {(system, metric): (float(mean), float(low), float(high)) for system, metric, mean, low, high in found}


def panel(metric: str, x: int, found: dict[tuple[str, str], tuple[float, float, float]]) -> list[str]:
    title, (start, end), step = METRICS[metric]
    bottom = TOP + ROW * len(SYSTEMS)

    def at(value: float) -> float:
        return round(x + PANEL * (value - start) / (end - start), 1)

    lines = [f'<text x="{x}" y="{TOP - 18}" class="head">{title}, nats a token</text>']
    ticks = [start + step * i for i in range(round((end - start) / step) + 1)]
    for tick in ticks[::2]:
        lines.append(f'<line x1="{at(tick)}" x2="{at(tick)}" y1="{TOP - 6}" y2="{bottom}" class="grid"/>')
        number = f"{tick:.{2 if step < 0.1 else 1}f}".replace("-0.00", "0.00")
        lines.append(f'<text x="{at(tick)}" y="{bottom + 18}" class="tick">{number}</text>')
    lines.append(f'<line x1="{at(0)}" x2="{at(0)}" y1="{TOP - 6}" y2="{bottom}" class="zero"/>')
    for i, system in enumerate(SYSTEMS):
        mean, low, high = found[system, metric]
        y = TOP + ROW * i + ROW // 2
        lines.append(f'<line x1="{at(low)}" x2="{at(high)}" y1="{y}" y2="{y}" class="interval"/>')
        lines.append(f'<circle cx="{at(mean)}" cy="{y}" r="5"/>')
        anchor = "end" if at(high) > x + PANEL - 90 else "start"
        label = at(low) if anchor == "end" else at(high)
        shift = -10 if anchor == "end" else 10
        lines.append(f'<text x="{label + shift}" y="{y + 4}" text-anchor="{anchor}">{mean:+.3f}</text>')
    return lines


def picture() -> str:
    found = differences()
    height = TOP + ROW * len(SYSTEMS) + 52
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
        "<title>Differences of PT3 and PT4 from LoRA at equal cost, with 95 % intervals</title>",
        "<style>text{font:13px system-ui,sans-serif;fill:#222}.head{font-weight:600}.tick{text-anchor:middle;fill:#555;"
        "font-size:12px}.grid{stroke:#e3e3e3}.zero{stroke:#222}.interval{stroke:#1b5e9e;stroke-width:3}"
        "circle{fill:#1b5e9e}.big{font-size:15px;font-weight:600}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff" stroke="#d0d0d0"/>',
        '<text x="16" y="28" class="big">PT3 and PT4 against LoRA r=8 at equal cost: 0 is LoRA, right is better</text>',
        '<text x="16" y="48">SmolLM2-135M, 40 steps, three seeds, 95 % intervals over seeds and items; none is promoted'
        "</text>",
    ]
    for i, name in enumerate(SYSTEMS.values()):
        lines.append(f'<text x="16" y="{TOP + ROW * i + ROW // 2 + 4}" class="head">{name}</text>')
    for i, metric in enumerate(METRICS):
        lines += panel(metric, LEFT + i * (PANEL + GAP), found)
    lines.append(f'<text x="16" y="{height - 10}" class="tick" style="text-anchor:start">docs/gallery/README.md</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    stale = "is not what the page says: python docs/gallery_picture.py --write"
    write_or_check(PICTURE, picture(), stale, __doc__)


if __name__ == "__main__":
    main()
