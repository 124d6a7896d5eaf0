"""bem-peft validate and run: an experiment, checked or trained and evaluated."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `validate` and `run`."""
    validate = commands.add_parser("validate", help="check an experiment")
    run = commands.add_parser("run", help="train and evaluate an experiment")
    for command in (validate, run):
        command.add_argument("file", type=Path, help="YAML; see experiments/")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="training.max_steps=10; may stand often"
        )
    validate.set_defaults(run=_validate)
    run.set_defaults(run=_run)


def _validate(arguments: argparse.Namespace) -> int:
    from bem_peft.experiments.experiment import read_experiment

    experiment = read_experiment(arguments.file, arguments.set)
    print(
        f"{arguments.file} is sound: {experiment.name}, {type(experiment.adapter).__name__} on "
        f"{experiment.model.path}, seeds {', '.join(map(str, experiment.seeds))}"
    )
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from bem_peft.experiments.experiment import read_experiment
    from bem_peft.experiments.run import run_experiment

    experiment = read_experiment(arguments.file, arguments.set)
    results = run_experiment(experiment)
    print(f"results: {experiment.output_dir}/seed-*/result.json ({len(results)})")
    return 0
