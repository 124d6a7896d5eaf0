"""Tables in Markdown. Names come from strangers' files: whatever they hold, a cell stays a cell, and text stays
text."""

from __future__ import annotations

import re
from collections.abc import Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")


def plain(text: str) -> str:
    """`text` on one line, with everything escaped that Markdown or HTML would read as markup."""
    line = " ".join(re.split(r"[\s\x00-\x1f\x7f\x85\u2028\u2029]+", text)).strip()
    return SPECIAL.sub(r"\\\1", line).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> list[str]:
    """The lines of a table; `numeric` columns are set to the right."""
    rule = ["---:" if i in numeric else "---" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (map(plain, head), rule, *(map(plain, row) for row in rows))]
