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
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from peft import PeftConfig
from torch import nn

from bem_peft.budget.check import BudgetConstraints, BudgetValidator, adapted_copy, at_sites_of
from bem_peft.budget.match import match_budget
from bem_peft.budget.report import BudgetError
from bem_peft.budget.site_cost import MATCHED
from bem_peft.experiments.experiment import read_experiment
from bem_peft.experiments.sections import DTYPES, DataSection, EvaluationSection
from bem_peft.sites import find as sites
from bem_peft.sites import table as sites_table
from bem_peft.tuners.adapter_spec import AdapterSpecError, parse_adapter

_NOT_MET = 1
_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 where a budget is not met, or 2 after a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="bem-peft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sites", help="print where W_O and W_down stand in a model")
    command.add_argument("model", nargs="?", help="model type of transformers (llama), folder or hub id; config only")
    command.add_argument("--all", action="store_true", help="all causal and seq2seq language model types, as JSON")
    command.add_argument("--write", type=Path, metavar="FILE", help="with --all: write there, keeping `reviewed` marks")
    for name, text in (("budget", "print what an adapter costs"), ("match", "print the sizes that meet the anchor")):
        budget = commands.add_parser(name, help=text)
        budget.add_argument("model", help="model type of transformers, folder or hub id; config only, no weights")
        budget.add_argument("config", help="METHOD:field=value,... (kronecker:u_rank=8) or the folder of an adapter")
        budget.add_argument("--anchor", required=True, help="as CONFIG; without target_modules: at CONFIG's sites")
        budget.add_argument("--tolerance", type=float, default=0.05, help="ratio, 0.05 is 5 %% (default)")
        if name == "budget":
            budget.add_argument("--scope", choices=("adapter", "total"), default="adapter")
            budget.add_argument("--quantities", nargs="+", default=list(MATCHED), help="params flops memory stored")
        else:
            budget.add_argument("--free", nargs="+", help="fields to choose; default: the method's own sizes")
            budget.add_argument("--match", nargs="+", default=list(MATCHED), help="params flops (default: both)")
    for name, text in (("validate", "check an experiment"), ("run", "train and evaluate an experiment")):
        experiment = commands.add_parser(name, help=text)
        experiment.add_argument("file", type=Path, help="YAML; see experiments/")
        experiment.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="training.max_steps=10; may stand often"
        )
    evaluate = commands.add_parser("evaluate", help="score a saved adapter of any PEFT method item by item")
    evaluate.add_argument("adapter", help="folder or hub id")
    evaluate.add_argument("--data", required=True, help="jsonl, json, csv or parquet (.gz), or a dataset's hub id")
    evaluate.add_argument("--prompt", required=True, help="template with columns, as 'Archaic: {archaic}'")
    evaluate.add_argument("--completion", required=True, help="template of what is scored")
    evaluate.add_argument("--id", help="template of an item's name; default its number")
    evaluate.add_argument("--group", help="template of what items belong together")
    evaluate.add_argument("--name", required=True, help="of the system in reports")
    evaluate.add_argument("--seed", type=int, default=0, help="that the adapter was trained with (default 0)")
    evaluate.add_argument("--base", help="base model; default the one that the adapter names")
    evaluate.add_argument("--max-tokens", type=int, default=512)
    evaluate.add_argument("--items", type=int, help="only the first so many")
    evaluate.add_argument("--batch", type=int, default=8)
    evaluate.add_argument(
        "--metrics", nargs="+", default=["nll"], help="nll bleu chrf exact_match f1 rouge_l json_validity (default nll)"
    )
    evaluate.add_argument("--max-new-tokens", type=int, default=128, help="of generated answers (default 128)")
    evaluate.add_argument("--stop", help="text that ends an answer")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR")
    profile = commands.add_parser("profile", help="time adapters beside their base and the anchor, interleaved")
    profile.add_argument("results", nargs="+", type=Path, help="folders of `bem-peft run` or `bem-peft evaluate`")
    profile.add_argument("--anchor", required=True, help="name of the system that the others are measured against")
    profile.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, for `compare --profile`")
    profile.add_argument("--base", help="base model; default the one that the results name")
    profile.add_argument("--dtype", default="auto", choices=DTYPES)
    profile.add_argument("--device", help="default cuda or mps where there is one, else cpu")
    profile.add_argument("--prompt-tokens", type=int, default=256)
    profile.add_argument("--new-tokens", type=int, default=64)
    profile.add_argument("--batch", type=int, default=1)
    profile.add_argument("--kinds", nargs="+", default=["prefill", "decode"], help="prefill decode train_step")
    profile.add_argument("--rounds", type=int, default=50, help="each runs every system twice (default 50)")
    profile.add_argument("--tolerance", type=float, default=0.05, help="ratio, 0.05 is 5 %% (default)")
    compare = commands.add_parser("compare", help="write a report on results")
    compare.add_argument("results", nargs="+", help="folders of `bem-peft run`, or JSON of PEFT's method_comparison")
    compare.add_argument("--anchor", required=True, help="name of the system that the others are measured against")
    compare.add_argument("--out", type=Path, required=True, metavar="DIR")
    compare.add_argument("--held-out", action="store_true", help="the items are Slice-B: nothing was chosen on them")
    compare.add_argument(
        "--development", nargs="+", default=[], metavar="RESULTS", help="Slice-A, kept apart from them"
    )
    compare.add_argument(
        "--margin", action="append", default=[], metavar="METRIC=VALUE",
        help="how much worse counts as no worse, in the metric's units (default 0); may stand often",
    )  # fmt: skip
    compare.add_argument("--correction", choices=("by", "bh", "holm"), default="by")
    compare.add_argument("--title", default="Comparison of adapters")
    compare.add_argument("--quality", help="metric of the Pareto frontiers; default the first that all systems have")
    compare.add_argument("--profile", type=Path, metavar="FILE", help="times of `bem-peft profile`, as further costs")
    compare.add_argument(
        "--card", action="append", default=[], metavar="SYSTEM=FOLDER",
        help="write the results into the model card of that adapter's folder; may stand often",
    )  # fmt: skip
    compare.add_argument("--dataset", help="name of the data, for model cards")
    compare.add_argument("--dataset-id", help="hub id of the data, for model cards")
    arguments = parser.parse_args(argv)
    if arguments.command == "sites":
        if arguments.all == (arguments.model is not None):
            command.error("give either a model or --all")
        if arguments.write is not None and not arguments.all:
            command.error("--write goes with --all")
    try:
        return _COMMANDS[arguments.command](arguments)
    except BudgetError as error:
        print(f"bem-peft: {error}", file=sys.stderr)
        return _NOT_MET
    except (sites.SiteError, sites.ModelBuildError, AdapterSpecError, OSError, ValueError) as error:
        print(f"bem-peft: {error}", file=sys.stderr)
        return _USER_ERROR


def _sites(arguments: argparse.Namespace) -> int:
    if arguments.all:
        _print_all(arguments.write)
    else:
        print("\n".join(_text_lines(sites.find_sites(sites.build_meta(arguments.model)))))
    return 0


def _budget(arguments: argparse.Namespace) -> int:
    model, config, anchor = _model_and_configs(arguments)
    constraints = BudgetConstraints.from_anchor(
        model, anchor, quantities=arguments.quantities, tolerance_ratio=arguments.tolerance, scope=arguments.scope
    )
    with torch.device("meta"):
        adapted = adapted_copy(model, config)
    report = BudgetValidator(constraints).validate_all(adapted)
    print(report)
    return 0 if report.is_met else _NOT_MET


def _match(arguments: argparse.Namespace) -> int:
    model, config, anchor = _model_and_configs(arguments)
    match = match_budget(
        model, config, anchor, free=arguments.free, match=arguments.match, tolerance_ratio=arguments.tolerance
    )
    print(match)
    return 0 if match.is_met else _NOT_MET


def _validate(arguments: argparse.Namespace) -> int:
    experiment = read_experiment(arguments.file, arguments.set)
    print(
        f"{arguments.file} is sound: {experiment.name}, {type(experiment.adapter).__name__} on "
        f"{experiment.model.path}, seeds {', '.join(map(str, experiment.seeds))}"
    )
    return 0


def _run(arguments: argparse.Namespace) -> int:
    experiment = read_experiment(arguments.file, arguments.set)
    from bem_peft.experiments.run import run_experiment

    results = run_experiment(experiment)
    print(f"results: {experiment.output_dir}/seed-*/result.json ({len(results)})")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from bem_peft.experiments.run import evaluate_adapter

    data = DataSection(
        train="", prompt=arguments.prompt, completion=arguments.completion, eval=arguments.data, id=arguments.id,
        group=arguments.group, max_tokens=arguments.max_tokens, eval_items=arguments.items,
    )  # fmt: skip
    result = evaluate_adapter(
        arguments.adapter, data, arguments.out, name=arguments.name, seed=arguments.seed, base=arguments.base,
        batch=arguments.batch,
        evaluation=EvaluationSection(arguments.metrics, arguments.max_new_tokens, arguments.stop),
    )  # fmt: skip
    metrics = result["metrics"]
    others = "".join(f", {name} {metrics[name]:.4g}" for name in arguments.metrics if name != "nll")
    print(f"{arguments.name}: loss {metrics['loss']:.4f}{others} on {metrics['items']} items")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from bem_peft.experiments.profile import profile_results

    found = profile_results(
        arguments.results, arguments.anchor, base=arguments.base, dtype=arguments.dtype, device=arguments.device,
        prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens, batch=arguments.batch,
        kinds=arguments.kinds, rounds=arguments.rounds, tolerance_ratio=arguments.tolerance, progress=tqdm,
    )  # fmt: skip
    found.write(arguments.out)
    print(found.to_text())
    print(f"wrote {arguments.out}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from bem_peft.evaluation.evaluator import ComprehensiveEvaluator
    from bem_peft.evaluation.profile_document import ProfileDocument
    from bem_peft.evaluation.report.card import check_card, write_card
    from bem_peft.evaluation.report.files import write_files
    from bem_peft.evaluation.results import read_results
    from bem_peft.evaluation.slices import DEVELOPMENT, HELD_OUT

    systems = read_results(arguments.results)
    cards = [check_card(text, [s.name for s in systems], arguments.dataset) for text in arguments.card]
    report = ComprehensiveEvaluator(
        systems, arguments.anchor, margin=_margins(arguments.margin), correction=arguments.correction,
        stands_on=HELD_OUT if arguments.held_out else DEVELOPMENT, title=arguments.title,
        development=read_results(arguments.development) if arguments.development else (), quality=arguments.quality,
        profiles=None if arguments.profile is None else ProfileDocument.read(arguments.profile),
        progress=lambda names: tqdm(names, desc="comparing", disable=None),
    ).report()  # fmt: skip
    written = write_files(report, arguments.out)
    for system, folder in cards:
        written += write_card(report, system, folder, arguments.dataset, arguments.dataset_id)
    for promotion in report.promotions[:12]:
        print(f"{promotion.system}: {promotion.verdict}; {promotion.reasons[0]}")
    print("wrote " + ", ".join(map(str, written)))
    return 0


def _margins(given: Sequence[str]) -> dict[str, float]:
    """{"chrf": 0.5} of ["chrf=0.5"]. Raises ValueError for anything else."""
    found = {}
    for text in given:
        metric, _, value = text.partition("=")
        try:
            found[metric] = float(value)
        except ValueError:
            raise ValueError(f"--margin {text}: write METRIC=VALUE, as nll=0.02.") from None
    return found


def _model_and_configs(arguments: argparse.Namespace) -> tuple[nn.Module, PeftConfig, PeftConfig]:
    """The model on the meta device; the anchor stands at the sites of the config where it names none."""
    model = sites.build_meta(arguments.model)
    config, anchor = (parse_adapter(text) for text in (arguments.config, arguments.anchor))
    return model, config, at_sites_of(anchor, lambda: adapted_copy(model, config))


def _text_lines(table: sites.SiteTable) -> Iterable[str]:
    rows: dict[tuple[str, ...], int] = {}
    for site in table.sites:
        heads = "-" if site.num_heads is None else str(site.num_heads)
        shape = f"{site.in_features} -> {site.out_features}"
        key = (site.role, sites.name_pattern(site.name), site.mixer, shape, heads)
        rows[key] = rows.get(key, 0) + 1
    cells = [("role", "name", "mixer", "in -> out", "heads", "count"), *((*key, str(n)) for key, n in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield from ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    yield f"{len(table.sites)} sites in {table.blocks} blocks"
    for pattern, count in sites.pattern_counts(table.fused_experts).items():
        yield f"no site: {pattern} (x{count}) holds the W_down of all experts in one parameter"


def _print_all(path: Path | None) -> None:
    """Print the rows of all types, or merge them into the table at `path`, and say what is new, gone and changed."""
    known = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    version = transformers.__version__
    rows = dict(sites.site_table_rows())
    table, changes = sites_table.merged_table(known, rows, version)
    text = sites_table.table_text(table)
    if path is None:
        print(text, end="")
        return
    path.write_text(text, encoding="utf-8")
    unplaced = sum("error" in row for row in rows.values())
    print(f"wrote {len(rows)} model types of transformers {version} to {path}, {unplaced} of them without sites")
    for what, types in changes.items():
        print(f"{what}: {', '.join(types) or '-'}")


_COMMANDS = {
    "sites": _sites,
    "budget": _budget,
    "match": _match,
    "validate": _validate,
    "run": _run,
    "profile": _profile,
    "compare": _compare,
    "evaluate": _evaluate,
}


if __name__ == "__main__":
    sys.exit(main())
