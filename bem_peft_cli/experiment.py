"""bem-peft validate, run and push: an experiment, checked, trained and evaluated, and shared."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `validate`, `run` and `push`."""
    validate = commands.add_parser("validate", help="check an experiment")
    run = commands.add_parser("run", help="train and evaluate an experiment")
    for command in (validate, run):
        command.add_argument("file", type=Path, help="YAML; see experiments/")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="training.max_steps=10; may stand often"
        )
    validate.set_defaults(run=_validate)
    run.set_defaults(run=_run)
    push = commands.add_parser("push", help="share a run and its report on the Hub")
    push.add_argument("folder", type=Path, help="what `bem-peft run` wrote")
    push.add_argument("repository", help="USER/NAME; created where it is not there")
    push.add_argument("--seed", type=int, help="whose adapter; default the only one's")
    push.add_argument("--report", type=Path, metavar="DIR", help="what `bem-peft compare --out` wrote")
    push.add_argument("--base", metavar="ID", help="of the base on the Hub, where it was loaded from a folder")
    push.add_argument("--license", metavar="NAME", help="of the adapter, for the card: apache-2.0, mit ...")
    push.add_argument("--private", action="store_true")
    push.add_argument("--dry-run", type=Path, metavar="DIR", help="write what would be pushed there, and send nothing")
    push.set_defaults(run=_push)


def _validate(arguments: argparse.Namespace) -> int:
    from bem_peft.experiments.experiment import read_experiment
    from bem_peft.experiments.items import read_items, trained_on
    from bem_peft.experiments.records import is_file_name
    from bem_peft.experiments.training_fields import rate_told

    experiment = read_experiment(arguments.file, arguments.set)
    if is_file_name(experiment.data.train) and is_file_name(experiment.data.eval or experiment.data.train):
        trained_on(*read_items(experiment.data))
    print(
        f"{arguments.file} is sound: {experiment.name}, {type(experiment.adapter).__name__} on "
        f"{experiment.model.path}, seeds {', '.join(map(str, experiment.seeds))}"
    )
    told = rate_told(experiment)
    if told is not None:
        print(told)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from bem_peft.experiments.experiment import read_experiment
    from bem_peft.experiments.run import run_experiment

    experiment = read_experiment(arguments.file, arguments.set)
    results = run_experiment(experiment)
    print(f"results: {experiment.output_dir}/seed-*/result.json ({len(results)})")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from bem_peft.hub import prepare_run, push_run

    if arguments.dry_run is not None:
        prepare_run(
            arguments.folder, arguments.repository, arguments.dry_run, seed=arguments.seed, report=arguments.report,
            base=arguments.base, license=arguments.license,
        )  # fmt: skip
        print(f"not pushed: {arguments.dry_run}")
        return 0
    pushed = push_run(
        arguments.folder, arguments.repository, seed=arguments.seed, report=arguments.report, base=arguments.base,
        license=arguments.license, private=arguments.private or None,
    )  # fmt: skip
    print(f"pushed: {pushed.commit_url}")
    return 0
