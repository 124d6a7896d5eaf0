"""Results of whatever tool: what a path holds is told by its files, and each format has a file of its own beside
this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bem_peft.evaluation.formats.inspect_logs import is_inspect_folder, is_inspect_log, read_inspect
from bem_peft.evaluation.formats.lm_eval import is_lm_eval_folder, read_lm_eval
from bem_peft.evaluation.formats.plain_table import is_plain_table, read_plain_table
from bem_peft.evaluation.formats.published import read_published
from bem_peft.evaluation.formats.run_folder import is_run_folder, read_run
from bem_peft.evaluation.results import SystemResult
from bem_peft.json_text import read_json

FORMATS = (
    "a folder with seed-*/result.json (of `bem-peft run` or `evaluate`), with samples_*.jsonl of lm-evaluation-harness "
    "or with logs of inspect_ai (one folder a seed), JSON of PEFT's method_comparison, or a table of scores (.csv, "
    ".tsv, .parquet)"
)


def read_results(paths: Sequence[str | Path]) -> list[SystemResult]:
    """The systems of folders and files.

    Raises:
        ValueError: a path that holds no results, or two systems of one name.
    """
    systems = [system for given in map(Path, paths) for system in _read(given)]
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two systems are called {twice[0]!r}: give each experiment a `name` of its own.")
    return systems


def _read(path: Path) -> list[SystemResult]:
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder, seen from {Path.cwd()}.")
    if is_run_folder(path.resolve().parent) and (path / "result.json").is_file():
        raise ValueError(f"{path}: is one seed of a run; give {path.resolve().parent}.")
    if path.is_dir():
        if is_run_folder(path):
            return [read_run(path)]
        if is_lm_eval_folder(path):
            return [read_lm_eval(path)]
        if is_inspect_folder(path):
            return [read_inspect(path)]
        published = sorted(path.glob("*.json"))
        if published:
            return [read_published(file, read_json(file)) for file in published]
    elif is_plain_table(path):
        return read_plain_table(path)
    elif path.is_file() and path.suffix == ".eval":
        return [read_inspect(path)]
    elif path.is_file() and path.suffix == ".json":
        document = read_json(path)
        return [read_inspect(path) if is_inspect_log(document) else read_published(path, document)]
    raise ValueError(f"{path}: holds no results. What is read: {FORMATS}.")
