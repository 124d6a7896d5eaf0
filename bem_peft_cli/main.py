"""Command line of bem_peft.

bem-peft sites MODEL_OR_TYPE          where W_O and W_down stand in a model
bem-peft budget MODEL CONFIG          what an adapter costs, against an anchor
bem-peft match MODEL CONFIG           the sizes that cost what the anchor costs
bem-peft validate FILE                all that is wrong with an experiment, before anything is loaded
bem-peft run FILE                     train and evaluate an experiment, one adapter a seed
bem-peft push FOLDER USER/NAME        a run's adapter, results and report to the Hub
bem-peft evaluate ADAPTER             score a saved adapter item by item, for `compare`
bem-peft profile RESULTS...           time adapters beside their base and the anchor, interleaved
bem-peft compare RESULTS...           a report: paired differences, Pareto frontiers, budgets, verdicts
bem-peft trl SCRIPT                   TRL's sft, dpo, grpo, kto or reward, its LoRA replaced by a config of --adapter
bem-peft kernels                      what computes the methods here; with --build the C++ operators, proved right
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from bem_peft_cli import budget, experiment, kernels, results, sites, trl_scripts
from bem_peft_cli.budget import NOT_MET

_USER_ERROR = 2
_INTERRUPTED = 130  # as a shell says of Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 where a budget is not met, 2 after a message on stderr, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 gets an escape instead of a traceback
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="bem-peft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (sites, budget, experiment, results, trl_scripts, kernels):
        group.add_commands(commands)
    arguments, more = parser.parse_known_args(argv)
    if more and not getattr(arguments, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    arguments.more = more
    try:
        return _run(arguments)
    except BrokenPipeError:  # who reads has closed, as `| head` does; nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _USER_ERROR
    except KeyboardInterrupt:
        print("bem-peft: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    """The command, and what its errors are to the user. Loads the package, which takes seconds and is said; a file that
    is not there is told before."""
    files = [getattr(arguments, name, None) for name in ("file", "experiment", "profile")]
    missing = [file for file in files if isinstance(file, Path) and _is_missing(file)]
    if missing:
        print(f"bem-peft: {missing[0]}: there is no such file, seen from {Path.cwd()}", file=sys.stderr)
        return _USER_ERROR
    if "bem_peft" not in sys.modules:
        print(f"bem-peft {arguments.command}: loading torch, transformers and PEFT", file=sys.stderr, flush=True)
        # what other packages say of themselves while they are imported, which nobody at a command line can mend
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    from safetensors import SafetensorError

    from bem_peft.budget.report import BudgetError

    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except BudgetError as error:
        print(f"bem-peft: {error}", file=sys.stderr)
        return NOT_MET
    except BrokenPipeError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        print(f"bem-peft: {error}", file=sys.stderr)
        return _USER_ERROR


def _is_missing(file: Path) -> bool:
    """Whether nothing is there; what cannot be looked at is the command's to tell."""
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    sys.exit(main())
