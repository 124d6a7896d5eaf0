"""bem-peft evaluate, profile and compare: results of adapters, made and compared."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOO_LONG = ("error", "drop")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate`, `profile` and `compare`."""
    _add_evaluate(commands)
    _add_profile(commands)
    _add_compare(commands)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("evaluate", help="score a saved adapter of any PEFT method item by item")
    command.add_argument(
        "adapter", nargs="?", help="folder or hub id; or a folder of `bem-peft run`, whose seeds are scored one by one"
    )
    command.add_argument(
        "--base-only", action="store_true", help="score the base model without an adapter, as a system of its own"
    )
    command.add_argument(
        "--experiment", type=Path, metavar="FILE",
        help="take data, metrics and precision from it, as its runs do, in place of the options below",
    )  # fmt: skip
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes to the experiment")
    command.add_argument("--data", help="jsonl, json, csv or parquet (.gz), or a dataset's hub id")
    command.add_argument(
        "--prompt", type=unescaped,
        help="template with columns, as 'Archaic: {archaic}\\n'; escapes as in YAML's double quotes",
    )  # fmt: skip
    command.add_argument("--completion", type=unescaped, help="template of what is scored, likewise")
    command.add_argument("--chat", action="store_true", default=None, help="ask in the model's chat template")
    command.add_argument("--messages", metavar="COLUMN", help="of conversations; their last answers are scored")
    command.add_argument("--id", help="template of an item's name; default its number")
    command.add_argument("--group", help="template of what items belong together")
    command.add_argument("--group-pattern", help="regular expression; its first group is taken from --group")
    command.add_argument("--name", help="of the system in reports; default the experiment's, or base")
    command.add_argument(
        "--seed", type=int, action="append", default=[],
        help="that the adapter was trained with (default 0; of a run's folder all that are there); may stand often "
        "with a run's folder, or with --base-only, once a seed of adapters",
    )  # fmt: skip
    command.add_argument("--base", help="base model; default the one that the adapter names")
    command.add_argument(
        "--dtype", choices=DTYPES, help="of the base; default that of the adapter's own run, else auto"
    )
    command.add_argument("--max-tokens", type=int, help="default 512")
    command.add_argument(
        "--too-long", choices=TOO_LONG, help="an item of more tokens is an error (default), or is left out"
    )
    command.add_argument("--items", type=int, help="only so many, the same ones by whatever road")
    command.add_argument("--batch", type=int, help="items that are scored at once (default 8)")
    command.add_argument(
        "--metrics", nargs="+", help="nll bleu chrf exact_match f1 rouge_l json_validity (default nll)"
    )
    command.add_argument("--max-new-tokens", type=int, help="of generated answers (default 128)")
    command.add_argument("--stop", type=unescaped, help="text that ends an answer, with escapes")
    command.add_argument("--retain", metavar="FILE", help="text that was not trained on: what has been forgotten")
    command.add_argument("--retain-text", type=unescaped, help="template of it (default {text})")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.set_defaults(run=_evaluate)


def _add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("profile", help="time adapters beside their base and the anchor, interleaved")
    command.add_argument("results", nargs="+", type=Path, help="folders of `bem-peft run` or `bem-peft evaluate`")
    command.add_argument("--anchor", required=True, help="name of the system that the others are measured against")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, for `compare --profile`")
    command.add_argument("--base", help="base model; default the one that the results name")
    command.add_argument("--dtype", choices=DTYPES, help="of the base; default that in which the results were scored")
    command.add_argument("--device", help="default cuda or mps where there is one, else cpu")
    command.add_argument("--prompt-tokens", type=int, default=256)
    command.add_argument("--new-tokens", type=int, default=64)
    command.add_argument("--batch", type=int, default=1)
    command.add_argument("--kinds", nargs="+", default=["prefill", "decode"], help="prefill decode train_step")
    command.add_argument("--rounds", type=int, default=50, help="each runs every system twice (default 50)")
    command.add_argument("--tolerance", type=float, default=0.05, help="ratio, 0.05 is 5 %% (default)")
    command.set_defaults(run=_profile)


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("compare", help="write a report on results")
    command.add_argument(
        "results", nargs="+",
        help="folders of `bem-peft run`, lm-evaluation-harness or inspect_ai, tables of scores (CSV, TSV, Parquet), or "
        "JSON of PEFT's method_comparison",
    )  # fmt: skip
    command.add_argument("--anchor", required=True, help="name of the system that the others are measured against")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--held-out", action="store_true", help="the items are Slice-B: nothing was chosen on them")
    command.add_argument(
        "--development", nargs="+", default=[], metavar="RESULTS", help="Slice-A, kept apart from them"
    )
    command.add_argument(
        "--margin", action="append", default=[], metavar="METRIC=VALUE",
        help="how much worse counts as no worse, in the metric's units (default 0); may stand often",
    )  # fmt: skip
    command.add_argument("--correction", choices=("by", "bh", "holm"), default="by")
    command.add_argument("--title", default="Comparison of adapters")
    command.add_argument("--quality", help="metric of the Pareto frontiers; default the first that all systems have")
    command.add_argument("--profile", type=Path, metavar="FILE", help="times of `bem-peft profile`, as further costs")
    command.add_argument(
        "--card", action="append", default=[], metavar="SYSTEM=FOLDER",
        help="write the results into the model card of that adapter's folder; may stand often",
    )  # fmt: skip
    command.add_argument("--dataset", help="name of the data, for model cards")
    command.add_argument("--dataset-id", help="hub id of the data, for model cards")
    command.set_defaults(run=_compare)


ESCAPE = re.compile(r"\\(?:(?P<code>x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|(?P<sign>.)|$)", re.S)
SIGNS = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "/": "/", "0": "\0"}


def unescaped(text: str) -> str:
    """A text of the command line with escapes as in YAML's double quotes: \\n, \\t, \\\\, \\u00e9.

    Raises:
        argparse.ArgumentTypeError: an escape that is none.
    """

    def sign(found: re.Match[str]) -> str:
        if found["code"]:
            return chr(int(found["code"][1:], 16))
        if found["sign"] in SIGNS:
            return SIGNS[found["sign"]]
        raise argparse.ArgumentTypeError(f"{found.group()!r} in {text!r} is no escape: write \\\\ for a backslash")

    return ESCAPE.sub(sign, text)


# option of `evaluate` -> field of the experiment's section
OF_DATA = {
    "data": "eval", "prompt": "prompt", "completion": "completion", "chat": "chat", "messages": "messages", "id": "id",
    "group": "group", "group_pattern": "group_pattern", "max_tokens": "max_tokens", "items": "eval_items",
    "too_long": "too_long",
}  # fmt: skip
OF_EVALUATION = {name: name for name in ("metrics", "max_new_tokens", "stop", "retain", "retain_text")}


def _evaluate(arguments: argparse.Namespace) -> int:
    from bem_peft.experiments.evaluate import adapters_of_run, evaluate_adapter, evaluate_base, refuse_done

    if arguments.base_only == (arguments.adapter is not None):
        raise ValueError("give an adapter, or --base-only for the base model without one.")
    seeds, of_run = arguments.seed or [0], adapters_of_run(arguments.adapter)
    if len(set(seeds)) != len(seeds) or (len(seeds) > 1 and not (arguments.base_only or of_run)):
        raise ValueError(
            f"--seed {', '.join(map(str, seeds))}: an adapter has one; with --base-only or a run's folder give each "
            "once."
        )
    lacking = [seed for seed in arguments.seed if of_run and seed not in of_run]
    if lacking:
        raise ValueError(f"--seed {lacking[0]}: {arguments.adapter} has {', '.join(map(str, of_run))}.")
    adapters = {seed: of_run[seed] for seed in arguments.seed or of_run} if of_run else {seeds[0]: arguments.adapter}
    given = _of_experiment(arguments) if arguments.experiment is not None else _of_options(arguments)
    if arguments.base_only:
        if given["base"] is None:
            raise ValueError("--base-only: give the model by --base, or --experiment FILE.")
        _print_scores(evaluate_base(folder=arguments.out, seeds=seeds, **given), given, "")
        return 0
    refuse_done(arguments.out, adapters)
    for seed, adapter in adapters.items():
        result = evaluate_adapter(adapter, folder=arguments.out, seed=seed, **given)
        _print_scores(result, given, f", seed {seed}" if of_run else "")
    return 0


def _print_scores(result: dict[str, Any], given: dict[str, Any], which: str) -> None:
    metrics = result["metrics"]
    shown = [name for name in (*given["evaluation"].metrics, "forgetting") if name != "nll" and name in metrics]
    others = "".join(f", {name} {metrics[name]:.4g}" for name in shown)
    print(f"{result['name']}{which}: loss {metrics['loss']:.4f}{others} on {metrics['items']} items", flush=True)


def _of_experiment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What an experiment's file says of an evaluation, with the options that may stand beside it."""
    from bem_peft.experiments.experiment import read_experiment

    beside = [name for name in (*OF_DATA, *OF_EVALUATION) if getattr(arguments, name) is not None]
    if beside:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in beside)
        raise ValueError(f"{names}: stands in the experiment's file; change it there, or by --set.")
    found = read_experiment(arguments.experiment, arguments.set)
    return {
        "data": found.data, "evaluation": found.evaluation,
        "name": arguments.name or ("base" if arguments.base_only else found.name),
        "base": arguments.base or found.model.path, "dtype": arguments.dtype or found.model.dtype,
        "revision": None if arguments.base else found.model.revision,
        "attn_implementation": found.model.attn_implementation,
        "batch": found.training.get("per_device_eval_batch_size", 8) if arguments.batch is None else arguments.batch,
    }  # fmt: skip


def _of_options(arguments: argparse.Namespace) -> dict[str, Any]:
    from bem_peft.experiments.sections import DataSection, EvaluationSection

    missing = [name for name in ("data", "name") if getattr(arguments, name) is None]
    if missing:
        raise ValueError(f"--{missing[0]}: is missing; give it, or --experiment FILE.")
    if arguments.set:
        raise ValueError("--set: changes an experiment; give --experiment FILE.")

    def fields(names: Mapping[str, str]) -> dict[str, Any]:
        values = {field: getattr(arguments, option) for option, field in names.items()}
        return {field: value for field, value in values.items() if value is not None}

    return {
        "data": DataSection(train="", **fields(OF_DATA)), "evaluation": EvaluationSection(**fields(OF_EVALUATION)),
        "name": arguments.name, "base": arguments.base, "dtype": arguments.dtype,
        "batch": 8 if arguments.batch is None else arguments.batch,
    }  # fmt: skip


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
    from bem_peft.evaluation.formats.read import read_results
    from bem_peft.evaluation.profile_document import ProfileDocument
    from bem_peft.evaluation.report.card import check_card, write_card
    from bem_peft.evaluation.report.files import write_files
    from bem_peft.evaluation.report.text import main_line
    from bem_peft.evaluation.slices import DEVELOPMENT, HELD_OUT
    from bem_peft.whole_file import prove_writable

    systems = read_results(arguments.results)
    cards = [check_card(text, [s.name for s in systems], arguments.dataset) for text in arguments.card]
    prove_writable(arguments.out)
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
        line = main_line(report, promotion.system)
        if line is not None:
            print(f"{line}; above 0 is better than {report.anchor}")
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
