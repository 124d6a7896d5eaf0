"""bem-peft budget and match: what an adapter costs against an anchor, and the sizes that cost what it does."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

NOT_MET = 1
COUNTED = ("params", "flops", "memory", "stored")  # what can be counted without running a model
MATCHED = ("params", "flops")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `budget` and `match`."""
    budget = commands.add_parser("budget", help="print what an adapter costs")
    match = commands.add_parser("match", help="print the sizes that meet the anchor")
    for command in (budget, match):
        command.add_argument("model", help="model type of transformers, folder or hub id; config only, no weights")
        command.add_argument("config", help="METHOD:field=value,... (kronecker:u_rank=8) or the folder of an adapter")
        command.add_argument("--anchor", required=True, help="as CONFIG; without target_modules: at CONFIG's sites")
        command.add_argument("--tolerance", type=float, default=0.05, help="ratio, 0.05 is 5 %% (default)")
    budget.add_argument("--scope", choices=("adapter", "total"), default="adapter")
    budget.add_argument(
        "--quantities", nargs="+", default=list(MATCHED), choices=COUNTED,
        help="params flops memory stored; latency is timed on real weights, by `profile`",
    )  # fmt: skip
    budget.set_defaults(run=_budget)
    match.add_argument(
        "--free", nargs="+", type=_free,
        help="fields to choose, or field=value,value,... to choose from; default: the method's own sizes",
    )  # fmt: skip
    match.add_argument(
        "--match", nargs="+", default=list(MATCHED), choices=MATCHED, help="params flops (default: both)"
    )
    match.set_defaults(run=_match)


def _free(text: str) -> tuple[str, Sequence[int] | None]:
    """("u_dim", [12, 24]) of "u_dim=12,24" or "u_dim=[12,24]"; ("u_rank", None) of "u_rank"."""
    name, equals, values = text.partition("=")
    if not equals:
        return name, None
    try:
        return name, [int(value) for value in values.strip("[]").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write field=value,value,... with whole numbers") from None


def _budget(arguments: argparse.Namespace) -> int:
    import torch

    from bem_peft.budget.check import BudgetConstraints, BudgetValidator
    from bem_peft.budget.copies import adapted_copy

    model, config, anchor = _model_and_configs(arguments)
    constraints = BudgetConstraints.from_anchor(
        model, anchor, quantities=arguments.quantities, tolerance_ratio=arguments.tolerance, scope=arguments.scope
    )
    with torch.device("meta"):
        adapted = adapted_copy(model, config)
    report = BudgetValidator(constraints).validate_all(adapted)
    print(report)
    return 0 if report.is_met else NOT_MET


def _match(arguments: argparse.Namespace) -> int:
    from bem_peft.budget.match import match_budget
    from bem_peft.tuners.adapter_spec import adapter_text

    model, config, anchor = _model_and_configs(arguments)
    free = None if arguments.free is None else dict(arguments.free)
    match = match_budget(model, config, anchor, free=free, match=arguments.match, tolerance_ratio=arguments.tolerance)
    print(match)
    if match.learning_rate is not None:
        print(f"learning rate {match.learning_rate_source}")
    print(f"config: {shlex.quote(adapter_text(match.config))}")
    return 0 if match.is_met else NOT_MET


def _model_and_configs(arguments: argparse.Namespace) -> tuple[nn.Module, PeftConfig, PeftConfig]:
    """The model on the meta device; the anchor stands at the sites of the config where it names none."""
    from bem_peft.budget.copies import adapted_copy, at_sites_of
    from bem_peft.sites.find import build_meta
    from bem_peft.tuners.adapter_spec import parse_adapter

    model = build_meta(arguments.model)
    config, anchor = (parse_adapter(text) for text in (arguments.config, arguments.anchor))
    return model, config, at_sites_of(anchor, lambda: adapted_copy(model, config))
