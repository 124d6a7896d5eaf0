"""Pieces of the report's page. What is given as plain text is escaped; only `Html` stands as it is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Html(str):
    """Markup that was made here, of texts that were escaped."""

    __slots__ = ()


def html(text: str) -> str:
    """`text` as markup: escaped, unless it is markup already."""
    return text if isinstance(text, Html) else escape(text, quote=True)


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), *,
    is_stacked: bool = False,
) -> Html:  # fmt: skip
    """A table whose first cell of each row names it; `numeric` columns are set to the right. is_stacked: on a narrow
    page the cells of a row stand below each other."""

    def kind(i: int) -> str:
        return ' class="n"' if i in numeric else ""

    heads = "".join(f'<th scope="col"{kind(i)}>{html(text)}</th>' for i, text in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{html(row[0])}</th>'
        + "".join(f"<td{kind(i)}>{html(text)}</td>" for i, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    kinds = "scroll stack" if is_stacked else "scroll"
    return Html(
        f'<div class="{kinds}" role="region" tabindex="0" aria-label="{html(caption)}"><table><caption>{html(caption)}'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def badge(text: str, kind: str) -> Html:
    return Html(f'<span class="verdict {kind}">{html(text)}</span>')


def bullets(texts: Sequence[str], tag: str = "ul") -> Html:
    return Html(f"<{tag}>" + "".join(f"<li>{html(text)}</li>" for text in texts) + f"</{tag}>")


def figure(label: str, plot: str, caption: str) -> Html:
    """An SVG that may be scrolled where the page is narrow, with what it shows in words."""
    return Html(
        f'<figure><div class="scroll" role="region" tabindex="0" aria-label="{html(label)}">{plot}</div>'
        f"<figcaption>{html(caption)}</figcaption></figure>"
    )
