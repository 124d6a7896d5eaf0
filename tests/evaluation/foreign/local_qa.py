"""The task of inspect_ai whose logs lie in inspect/; see test_foreign_files.py."""

import json
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate


@task
def local_qa() -> Task:
    rows = [json.loads(line) for line in (Path(__file__).parent / "qa.jsonl").read_text().splitlines()]
    samples = [
        Sample(input=row["question"] + "? Answer with one word.", target=row["text"], id=f"q{i}")
        for i, row in enumerate(rows)
    ]
    return Task(dataset=samples, solver=generate(), scorer=[includes(), match()])
