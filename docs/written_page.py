"""The end of a script that makes a file of the documentation: write it with --write, else say where it is stale."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def write_or_check(page: Path, text: str, stale: str, about: str | None) -> None:
    """Exits with 1 where `page` is not `text` and is not to be written, after `stale`, what to say of it then.

    about: the script's docstring.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    is_writing = parser.parse_args().write
    is_stale = not page.exists() or page.read_text(encoding="utf-8") != text
    if is_writing:
        page.write_text(text, encoding="utf-8")
    elif is_stale:
        print(page, stale)
    sys.exit(is_stale and not is_writing)
