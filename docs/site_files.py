"""A hook of mkdocs (mkdocs.yml): files of the repository that pages link to become part of the site.

A page is written for its place in the repository, so `../CHANGELOG.md` and `../benchmarks/results/growth.svg` lead
somewhere there. On the site such a file stands as `repository/<its path>`, Markdown as a page, all else as it is. A
page that would load something from another host ends the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\brel=[\"']?"
                    r"(?:stylesheet|preload|preconnect|icon)[\"']?[^>]*\bhref=[\"']?(?:https?:)?//")  # fmt: skip


def path_in_repository(page: str) -> PurePosixPath:
    """Of a page of the site."""
    path = PurePosixPath(page)
    return path.relative_to("repository") if path.parts[0] == "repository" else "docs" / path


def place_on_site(link: str, page: str) -> str | None:
    """The site's file that a link of the page means; None: the link is one that mkdocs itself knows or refuses."""
    target = os.path.normpath(path_in_repository(page).parent / link)
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"repository/{target}" if (ROOT / target).is_file() and not target.startswith("..") else None


def on_files(files: Files, config: Any) -> Files:
    waiting = [file.src_uri for file in files.documentation_pages()]
    known = {file.src_uri for file in files}
    while waiting:
        page = waiting.pop()
        for link in LINK.findall((ROOT / path_in_repository(page)).read_text(encoding="utf-8")):
            place = place_on_site(link, page)
            if place is None or place in known or not place.startswith("repository/"):
                continue
            known.add(place)
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path_in_repository(place))))
            if place.endswith(".md"):
                waiting.append(place)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    def moved(found: re.Match[str]) -> str:
        place = place_on_site(found[1], page.file.src_uri)
        return found[1] if place is None else os.path.relpath(place, PurePosixPath(page.file.src_uri).parent)

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    search = '<div class="md-search" data-md-component="search" role="dialog"'
    if search not in output:
        raise PluginError(f"{page.file.src_uri}: the theme's search dialog, which has no name, is not where it was")
    output = output.replace(search, f'{search} aria-label="Search"')
    found = LOADED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output
