"""Command line of bem_peft.

bem-peft sites MODEL_OR_TYPE          where W_O and W_down stand in a model
bem-peft budget MODEL CONFIG          what an adapter costs, against an anchor
bem-peft match MODEL CONFIG           the sizes that cost what the anchor costs
bem-peft validate FILE                all that is wrong with an experiment, before anything is loaded
bem-peft run FILE                     train and evaluate an experiment, one adapter a seed
bem-peft evaluate ADAPTER             score a saved adapter item by item, for `compare`
bem-peft profile RESULTS...           time adapters beside their base and the anchor, interleaved
bem-peft compare RESULTS...           a report: paired differences, Pareto frontiers, budgets, verdicts
"""

import argparse
import sys
from collections.abc import Sequence

from bem_peft.budget.report import BudgetError
from bem_peft.cli import budget, experiment, results, sites
from bem_peft.cli.budget import NOT_MET

_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 where a budget is not met, or 2 after a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="bem-peft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (sites, budget, experiment, results):
        group.add_commands(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except BudgetError as error:
        print(f"bem-peft: {error}", file=sys.stderr)
        return NOT_MET
    except (OSError, ValueError) as error:
        print(f"bem-peft: {error}", file=sys.stderr)
        return _USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
