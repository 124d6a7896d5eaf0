"""The tables of config fields in docs/methods, from the fields' own help.

python docs/field_tables.py            # says which pages are not what it gives, and exits with 1
python docs/field_tables.py --write
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path

from peft.config import PeftConfig

from bem_peft.tuners.base.adapter_config import AdapterConfig
from bem_peft.tuners.composite import CompositeConfig
from bem_peft.tuners.methods import METHODS

PAGES = Path(__file__).parent / "methods"
START, END = "<!-- written by docs/field_tables.py -->", "<!-- end of docs/field_tables.py -->"


def configs() -> dict[str, type[AdapterConfig]]:
    """Name of the page -> the config it is about: each method's, and the composite's."""
    found = [config for model in METHODS for config, _ in model.adapter_classes.values()]
    return {f"{config.__module__.rpartition('.')[2]}.md": config for config in (*found, CompositeConfig)}


def field_table(config: type[AdapterConfig]) -> str:
    """Name, type, default and help of each field: the method's own first, then those that methods share, none of PEFT's
    own."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    own = [name for name in inspect.get_annotations(config) if name in fields]
    of_peft = {f.name for f in dataclasses.fields(PeftConfig)}
    shared = [name for name in fields if name not in own and name not in of_peft]
    lines = ["| field | type | default | help |", "| --- | --- | --- | --- |"]
    for name in (*own, *shared):
        f = fields[name]
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        cells = (f"`{name}`", f"`{f.type}`", f"`{default!r}`", str(f.metadata["help"]))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def written(page: Path, config: type[AdapterConfig]) -> str:
    """The page with its table as it ought to be. Raises ValueError where the page has no place for it."""
    text = page.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{page} has no place for its table of fields: put {START} and {END} where it belongs.")
    return f"{before}{START}\n\n{field_table(config)}\n\n{END}{after}"


def stale(folder: Path = PAGES) -> list[Path]:
    """The pages whose table is not that of their config. Raises FileNotFoundError where a method has no page."""
    pages = [(folder / name, config) for name, config in configs().items()]
    return [page for page, config in pages if page.read_text(encoding="utf-8") != written(page, config)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    is_writing = parser.parse_args().write
    pages = stale()
    for page in pages:
        if is_writing:
            page.write_text(written(page, configs()[page.name]), encoding="utf-8")
        print(
            page, "written" if is_writing else "has other fields than its config: python docs/field_tables.py --write"
        )
    sys.exit(bool(pages) and not is_writing)


if __name__ == "__main__":
    main()
