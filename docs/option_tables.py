"""The tables of docs/reference/command_line.md, from the parsers of `bem-peft`.

python docs/option_tables.py            # says whether the page is not what it gives, and exits with 1
python docs/option_tables.py --write
"""

from __future__ import annotations

import argparse
from pathlib import Path

from written_page import write_or_check

from bem_peft_cli import budget, experiment, results, sites, trl_scripts

PAGE = Path(__file__).parent / "reference/command_line.md"
START, END = "<!-- written by docs/option_tables.py -->", "<!-- end of docs/option_tables.py -->"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser."""
    commands = argparse.ArgumentParser(prog="bem-peft").add_subparsers()
    for group in (sites, budget, experiment, results, trl_scripts):
        group.add_commands(commands)
    return dict(commands.choices)


def option_table(parser: argparse.ArgumentParser) -> str:
    lines = ["| argument | what it is |", "| --- | --- |"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = action.option_strings[0] if action.option_strings else action.metavar or action.dest.upper()
        takes = action.option_strings and action.nargs != 0
        value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper())
        text = f"{name} {value}{' ...' if action.nargs == '+' else ''}" if takes else name
        told = (action.help or "") % {"default": action.default} if action.help else ""
        default = action.default not in (None, False, argparse.SUPPRESS, []) and "default" not in told
        shown = " ".join(action.default) if isinstance(action.default, (list, tuple)) else action.default
        told += "; needed" if takes and action.required else ""
        told += f"{'; ' if told else ''}default {shown}" if default else ""
        lines.append(f"| `{text}` | {told.strip('; ')} |")
    return "\n".join(lines)


def written() -> str:
    """The page with its tables as they ought to be. Raises ValueError where it has no place for them."""
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{PAGE} has no place for its tables: put {START} and {END} where they belong.")
    parts = [f"## `bem-peft {name}`\n\n{option_table(parser)}" for name, parser in parsers().items()]
    return f"{before}{START}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"


def main() -> None:
    stale = "has other options than the command line: python docs/option_tables.py --write"
    write_or_check(PAGE, written(), stale, __doc__)


if __name__ == "__main__":
    main()
