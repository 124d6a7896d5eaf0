"""bem-peft evaluate, profile and compare: results of adapters, made and compared."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from bem_peft.experiments.encoding import TOO_LONG
from bem_peft.experiments.sections import DTYPES, DataSection, EvaluationSection


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate`, `profile` and `compare`."""
    _add_evaluate(commands)
    _add_profile(commands)
    _add_compare(commands)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("evaluate", help="score a saved adapter of any PEFT method item by item")
    command.add_argument("adapter", help="folder or hub id")
    command.add_argument("--data", required=True, help="jsonl, json, csv or parquet (.gz), or a dataset's hub id")
    command.add_argument(
        "--prompt", required=True, type=unescaped,
        help="template with columns, as 'Archaic: {archaic}\\n'; escapes as in YAML's double quotes",
    )  # fmt: skip
    command.add_argument("--completion", required=True, type=unescaped, help="template of what is scored, likewise")
    command.add_argument("--id", help="template of an item's name; default its number")
    command.add_argument("--group", help="template of what items belong together")
    command.add_argument("--group-pattern", help="regular expression; its first group is taken from --group")
    command.add_argument("--name", required=True, help="of the system in reports")
    command.add_argument("--seed", type=int, default=0, help="that the adapter was trained with (default 0)")
    command.add_argument("--base", help="base model; default the one that the adapter names")
    command.add_argument(
        "--dtype", choices=DTYPES, help="of the base; default that of the adapter's own run, else auto"
    )
    command.add_argument("--max-tokens", type=int, default=512)
    command.add_argument(
        "--too-long", default="error", choices=TOO_LONG, help="an item of more tokens is an error, or is left out"
    )
    command.add_argument("--items", type=int, help="only the first so many")
    command.add_argument("--batch", type=int, default=8)
    command.add_argument(
        "--metrics", nargs="+", default=["nll"], help="nll bleu chrf exact_match f1 rouge_l json_validity (default nll)"
    )
    command.add_argument("--max-new-tokens", type=int, default=128, help="of generated answers (default 128)")
    command.add_argument("--stop", type=unescaped, help="text that ends an answer, with escapes")
    command.add_argument("--retain", metavar="FILE", help="text that was not trained on: what has been forgotten")
    command.add_argument("--retain-text", default="{text}", type=unescaped, help="template of it (default {text})")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.set_defaults(run=_evaluate)


def _add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("profile", help="time adapters beside their base and the anchor, interleaved")
    command.add_argument("results", nargs="+", type=Path, help="folders of `bem-peft run` or `bem-peft evaluate`")
    command.add_argument("--anchor", required=True, help="name of the system that the others are measured against")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, for `compare --profile`")
    command.add_argument("--base", help="base model; default the one that the results name")
    command.add_argument("--dtype", default="auto", choices=DTYPES)
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
    command.add_argument("results", nargs="+", help="folders of `bem-peft run`, or JSON of PEFT's method_comparison")
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


def _evaluate(arguments: argparse.Namespace) -> int:
    from bem_peft.experiments.run import evaluate_adapter

    data = DataSection(
        train="", prompt=arguments.prompt, completion=arguments.completion, eval=arguments.data, id=arguments.id,
        group=arguments.group, group_pattern=arguments.group_pattern, max_tokens=arguments.max_tokens,
        eval_items=arguments.items, too_long=arguments.too_long,
    )  # fmt: skip
    result = evaluate_adapter(
        arguments.adapter, data, arguments.out, name=arguments.name, seed=arguments.seed, base=arguments.base,
        batch=arguments.batch, dtype=arguments.dtype,
        evaluation=EvaluationSection(
            arguments.metrics, arguments.max_new_tokens, arguments.stop, arguments.retain, arguments.retain_text
        ),
    )  # fmt: skip
    metrics = result["metrics"]
    shown = [name for name in (*arguments.metrics, "forgetting") if name != "nll" and name in metrics]
    others = "".join(f", {name} {metrics[name]:.4g}" for name in shown)
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
    from bem_peft.evaluation.formats.read import read_results
    from bem_peft.evaluation.profile_document import ProfileDocument
    from bem_peft.evaluation.report.card import check_card, write_card
    from bem_peft.evaluation.report.files import write_files
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
