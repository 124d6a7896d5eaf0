"""Looks at the built site in chromium: wide and narrow, in light and dark colours.

    python docs/check_site.py [--pictures FOLDER]        after `make docs`; exits with 1 where something is found

Found is: what axe-core calls serious or critical, a page wider than its window, an error on the console, and
anything that a page asks of another host.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

SITE = Path(__file__).parents[1] / "site"
PAGES = ("index", "start", "choosing", "methods/pt1_head_gating", "recipes/retrieval", "speed", "troubleshooting",
         "reference/methods", "gallery/index")  # fmt: skip
WINDOWS = ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


def looked_at(page: Any, address: str, picture: Path | None) -> list[str]:
    """What is wrong with one page in one window."""
    found: list[str] = []
    page.on("console", lambda message: found.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("request", lambda asked: found.append(f"asks {asked.url}") if "//127.0.0.1" not in asked.url else None)
    page.goto(address, wait_until="networkidle")
    for violation in Axe().run(page).response["violations"]:
        if violation["impact"] in ("serious", "critical"):
            targets = [node["target"] for node in violation["nodes"]][:3]
            found.append(f"axe {violation['id']} ({violation['impact']}): {targets}")
    width = page.evaluate("document.documentElement.scrollWidth")
    if width > page.viewport_size["width"]:
        found.append(f"{width} px wide")
    if picture is not None:
        page.screenshot(path=str(picture))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each page and window")
    pictures = parser.parse_args().pictures
    chromium = shutil.which("chromium")
    if chromium is None or not (SITE / "index.html").is_file():
        parser.error("needs chromium on PATH, and the site that `make docs` builds")
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    is_clean = True
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name in PAGES:
            for width, scheme in WINDOWS:
                context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
                picture = pictures and pictures / f"{name.replace('/', '-')}-{width}-{scheme}.png"
                address = f"http://127.0.0.1:{server.server_port}/{name}.html"
                found = looked_at(context.new_page(), address, picture)
                is_clean &= not found
                print(f"{name}, {width} px, {scheme}: {'; '.join(found) or 'nothing found'}", flush=True)
                context.close()
        browser.close()
    server.shutdown()
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
