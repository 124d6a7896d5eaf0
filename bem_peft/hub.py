"""Push an adapter, or what `bem-peft run` left of it, to the Hub with the card that tells how to load it.

`PeftModel.push_to_hub` works too, but transformers writes its blank card over PEFT's in a new repository, for every
PEFT method; who finds the adapter then does not learn that it needs `import bem_peft`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard
from peft import PeftModel

from bem_peft.json_text import read_json

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
REPORT = ("report.html", "report.json", "report.md")
# what a Trainer writes beside an adapter that is pickled, or no part of it
LEFT_OUT = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.pkl", "checkpoint-*")


def push_to_hub(
    model: PeftModel,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    license: str | None = None,
) -> CommitInfo:
    """Create `repository` ("user/name") if it is not there, and push what `save_pretrained` writes.

    Args:
        license: of the adapter, for the card ("apache-2.0"; the Hub lists its names).

    Raises:
        TypeError: `model` is no PeftModel.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; nothing is committed.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"push_to_hub takes a PeftModel, not {type(model).__name__}.")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if license is not None:
            _write_card(Path(folder) / CARD, {"license": license})
        return _upload(folder, repository, private, token, revision, commit_message)


def _upload(
    folder: str | Path, repository: str, private: bool | None, token: str | None, revision: str | None, message: str
) -> CommitInfo:
    """What `folder` holds, into `repository`, which is created where it is not there."""
    api = HfApi(token=token)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    pushed: CommitInfo = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
    return pushed


def push_run(
    folder: str | Path,
    repository: str,
    *,
    seed: int | None = None,
    report: str | Path | None = None,
    base: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter and results",
) -> CommitInfo:
    """Push one seed's adapter of an experiment, the results of all its seeds and, with `report`, the report.

    The repository then holds the adapter at its root, so that PEFT loads it, results/seed-N/result.json and
    report/report.html, .json and .md. Checkpoints, pickled files and the items' texts (items.jsonl) stay here.

    Args:
        folder: what `bem-peft run` wrote. report: what `bem-peft compare --out` wrote.
        seed: whose adapter; None: of the only one.
        base: the base model's id on the Hub, where the adapter was trained from a local folder.

    Raises:
        ValueError: no finished seed, several and `seed` does not say which, no report in `report`, or a base that is a
            local folder. Nothing is pushed then.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; nothing is committed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "repository"
        prepare_run(folder, repository, whole, seed=seed, report=report, base=base, license=license)
        return _upload(whole, repository, private, token, revision, commit_message)


def prepare_run(
    folder: str | Path,
    repository: str,
    target: str | Path,
    *,
    seed: int | None = None,
    report: str | Path | None = None,
    base: str | None = None,
    license: str | None = None,
) -> None:
    """Write what `push_run` would push into `target`, a folder that is not there yet; nothing is sent.

    Raises:
        ValueError: as `push_run`, or `target` is there. Nothing is written then.
    """
    whole = Path(target)
    if whole.exists():
        raise ValueError(f"{whole} is there already: choose another folder.")
    results = {int(path.parent.name[5:]): path for path in sorted(Path(folder).glob("seed-*/result.json"))}
    if not results or (seed is None and len(results) > 1) or (seed is not None and seed not in results):
        raise ValueError(f"`seed` = {seed}: {folder} has the finished seeds {sorted(results) or 'none'}; name one.")
    adapter = results[next(iter(results)) if seed is None else seed].with_name("adapter")
    missing = [name for name in (CONFIG, WEIGHTS) if not (adapter / name).is_file()]
    if missing:
        raise ValueError(f"{adapter} lacks {', '.join(missing)}: no adapter to push.")
    known = base or str(read_json(adapter / CONFIG).get("base_model_name_or_path"))
    if Path(known).is_dir():
        raise ValueError(f"the base is {known}, a folder of this machine: give `base`, its id on the Hub.")
    if report is not None and not (Path(report) / "report.json").is_file():
        raise ValueError(f"`report` = {report}: no report.json there; `bem-peft compare ... --out DIR` writes it.")
    shutil.copytree(adapter, whole, ignore=LEFT_OUT)
    given = {"license": license, "base_model": base}
    _write_card(whole / CARD, {name: value for name, value in given.items() if value is not None})
    for number, path in results.items():
        (whole / "results" / f"seed-{number}").mkdir(parents=True)
        shutil.copy(path, whole / "results" / f"seed-{number}")
    if report is not None:
        (whole / "report").mkdir()
        for file in (Path(report) / name for name in REPORT if (Path(report) / name).is_file()):
            shutil.copy(file, whole / "report")
    if base is not None:
        _name_base(whole, base)
    _tell_of_results(whole / CARD, repository, len(results), report is not None)


def _name_base(folder: Path, base: str) -> None:
    """Put the base's id in the place of where it lay, in the config, the card, the results and the report."""
    config = read_json(folder / CONFIG)
    before, config["base_model_name_or_path"] = config["base_model_name_or_path"], base
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in folder.rglob("*") if before else ():
        if file.suffix in (".md", ".json", ".html") and file.name != CONFIG:
            file.write_text(file.read_text(encoding="utf-8").replace(str(before), base), encoding="utf-8")


def _tell_of_results(card: Path, repository: str, seeds: int, has_report: bool) -> None:
    """The repository's own name, and what lies beside the adapter."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8").replace("PATH_OR_ID_OF_THIS_ADAPTER", repository)
    lines = [f"- `results/`: what was measured, and with which settings, for {seeds} seed{'s' if seeds > 1 else ''}"]
    lines += ["- `report/`: the comparison with other adapters"] if has_report else []
    card.write_text(f"{text.rstrip()}\n\n## Beside the adapter\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _write_card(path: Path, metadata: Mapping[str, str]) -> None:
    """Set fields of the card's metadata, where there is a card."""
    if path.is_file() and metadata:
        card = ModelCard.load(path)
        for name, value in metadata.items():
            setattr(card.data, name, value)
        card.save(path)
