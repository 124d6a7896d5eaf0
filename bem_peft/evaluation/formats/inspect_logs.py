"""Logs of inspect_ai, .eval (a ZIP of JSON, most often zstd) and .json, one folder a seed.

A metric is called by its scorer, "TASK/scorer" where a folder holds several tasks, and "scorer.key" for each number of
a scorer that gives a mapping. C, P, I and N count 1, 0.5, 0 and 0, as inspect_ai's own `value_to_float` has it; epochs
of a sample are averaged. inspect_ai does not say which direction is better: more is. A sample that ended in an error,
or that a
scorer gave no value, has no score: it is left out of every system, and the report says how many.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bem_peft.evaluation.formats.seeds import seed_folders
from bem_peft.evaluation.results import SystemResult, system_of_scores
from bem_peft.evaluation.scores import Scores
from bem_peft.json_text import read_json

LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
ZSTANDARD = 93  # PKWARE's number of the compression; Python's zipfile knows it from 3.14 on
Log = tuple[Path, dict[str, Any], list[dict[str, Any]]]  # file, header, samples


def is_inspect_log(document: Any) -> bool:
    """Whether a JSON document is a log of inspect_ai."""
    return isinstance(document, dict) and {"eval", "version", "status"} <= set(document)


def is_inspect_folder(folder: Path) -> bool:
    """By its files' names, .eval, or by the first .json."""
    if any(folder.rglob("*.eval")):
        return True
    first = next((path for path in sorted(folder.rglob("*.json")) if path.name != "logs.json"), None)
    return first is not None and is_inspect_log(read_json(first))


def read_inspect(path: Path) -> SystemResult:
    """The system of a folder, or of one log; its name is the folder's, or the file's without its ending.

    Raises:
        ValueError: two logs of one task for a seed, a log of an older or broken form, or samples that differ by seed.
    """
    by_seed = seed_folders(path) if path.is_dir() else {0: path}
    logs = {seed: list(_logs(part)) for seed, part in by_seed.items()}
    tasks = {header["eval"]["task"] for found in logs.values() for _, header, _ in found}
    values: dict[str, dict[tuple[int, str], list[float]]] = {}
    contents: dict[str, str] = {}
    missing: set[str] = set()
    warnings, provenance = [], []
    for seed, found in logs.items():
        seen: dict[str, Path] = {}
        for file, header, samples in found:
            task = str(header["eval"]["task"])
            if task in seen:
                raise ValueError(f"{seen[task]} and {file}: two logs of {task!r} for seed {seed}; keep one.")
            seen[task] = file
            if header["status"] != "success":
                warnings.append(f"{file.name} ended with {header['status']!r}")
            provenance.append(_provenance(header, seed))
            prefix = f"{task}/" if len(tasks) > 1 else ""
            for sample in samples:
                missing |= _add(values, contents, seed, prefix, sample, file)
    if not values:
        raise ValueError(f"{path}: no scored sample of inspect_ai{': ' if warnings else ''}{'; '.join(warnings)}.")
    if missing:
        warnings.append(f"{len(missing)} sample(s) ended in an error or got no score and are left out")
    scores = {metric: _scores(path.stem, metric, found, contents, missing) for metric, found in values.items()}
    return system_of_scores(
        path.stem, "inspect_ai", scores, warnings=warnings, provenance=provenance, left_out=frozenset(missing)
    )


def _scores(
    system: str, metric: str, found: dict[tuple[int, str], list[float]], contents: dict[str, str], missing: set[str]
) -> Scores:
    records = [
        {"seed": seed, "id": item, "value": float(np.mean(values)), "sha256": contents[item]}
        for (seed, item), values in found.items() if item not in missing
    ]  # fmt: skip
    return Scores.from_records(records, system=system, metric=metric)


def _add(
    values: dict[str, dict[tuple[int, str], list[float]]], contents: dict[str, str], seed: int, prefix: str,
    sample: dict[str, Any], file: Path,
) -> set[str]:  # fmt: skip
    """Add a sample's scores; returns its id where one is missing."""
    try:
        item = f"{prefix}{sample['id']}"
        content = json.dumps([sample["input"], sample["target"]], sort_keys=True)
        scores = sample.get("scores") or {}
        numbers = {
            f"{prefix}{name}": number for scorer, score in scores.items()
            for name, number in _numbers(scorer, score["value"]).items()
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: sample {sample!r:.60} is none of inspect_ai: {error!r}.") from error
    contents[item] = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    if sample.get("error") is not None or not numbers or any(not math.isfinite(n) for n in numbers.values()):
        return {item}
    for name, number in numbers.items():
        values.setdefault(name, {}).setdefault((seed, item), []).append(number)
    return set()


def _numbers(scorer: str, value: Any) -> dict[str, float]:
    """Metric -> number of a scorer's value; NaN for what is none."""
    if isinstance(value, dict):
        return {f"{scorer}.{key}": number for key, part in value.items() for number in _numbers("", part).values()}
    if isinstance(value, list):
        return {f"{scorer}.{i}": number for i, part in enumerate(value) for number in _numbers("", part).values()}
    if isinstance(value, str):
        if value in LETTERS or value.lower() in WORDS:
            return {scorer: LETTERS.get(value, WORDS.get(value.lower(), math.nan))}
        try:
            return {scorer: float(value)}
        except ValueError:
            return {scorer: math.nan}
    return {scorer: float(value) if isinstance(value, int | float) else math.nan}


def _logs(path: Path) -> Iterator[Log]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".eval", ".json"))
    for file in files:
        if file.suffix == ".eval":
            yield file, *_read_eval(file)
        elif file.name != "logs.json":
            document = read_json(file)
            if not is_inspect_log(document):
                raise ValueError(f"{file}: no log of inspect_ai (it has no eval, version and status).")
            yield file, document, document.get("samples") or []


def _read_eval(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
            names = archive.namelist()
            if "header.json" not in names:
                raise ValueError(f"{file}: has no header.json: the evaluation did not end, or this is no log.")
            read = {name: _entry(archive, raw, name) for name in names if name.startswith(("header.json", "samples/"))}
            header = json.loads(read.pop("header.json"))
            if not is_inspect_log(header):
                raise ValueError(f"{file}: header.json is none of inspect_ai's.")
            return header, [json.loads(text) for name, text in sorted(read.items()) if name.endswith(".json")]
    except (zipfile.BadZipFile, json.JSONDecodeError, OSError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: no log of inspect_ai ({error}).") from error


def _entry(archive: zipfile.ZipFile, raw: Any, name: str) -> bytes:
    """An entry's bytes; zstd by pyarrow, which every Python has here."""
    info = archive.getinfo(name)
    if info.compress_type != ZSTANDARD:
        return archive.read(name)
    import pyarrow

    raw.seek(info.header_offset + 26)
    lengths = raw.read(4)  # of the name and of the extra field in the local header, which stands before the data
    raw.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
    packed = pyarrow.BufferReader(raw.read(info.compress_size))
    found: bytes = pyarrow.CompressedInputStream(packed, "zstd").read()
    if len(found) != info.file_size:
        raise ValueError(f"{archive.filename}: {name} is broken: {len(found)} of {info.file_size} bytes.")
    return found


def _provenance(header: dict[str, Any], seed: int) -> dict[str, Any]:
    about = header["eval"]
    packages = about.get("packages") or {}
    return {
        "seed": seed, "settings": {"task": about.get("task"), "model": about.get("model")},
        "versions": {str(name): str(version) for name, version in packages.items()},
    }  # fmt: skip
