"""Files that lm-evaluation-harness 0.4.13 and inspect_ai 0.3.285 wrote themselves, read as they sum them up themselves.

foreign/: random adapters (PT3 and LoRA at down_proj, three seeds each) on SmolLM2-135M-Instruct answered
foreign/qa.jsonl. In that folder, with HF_HUB_OFFLINE=1 and `import bem_peft` before lm_eval:
    lm_eval --model hf --model_args pretrained=demo_run/SmolLM2-135M-Instruct,peft=adapters/pt3-0,dtype=float32
    --device cpu
        --tasks local_mc,local_gen --include_path . --log_samples --output_path lm_eval/pt3/seed-0 --batch_size 8
    inspect eval local_qa.py --model hf/local -M model_path=merged/pt3-0 -M tokenizer_path=merged/pt3-0 -M device=cpu
        --max-tokens 8 --temperature 0.01 --log-dir inspect/pt3/seed-0 --log-format eval                  (seed-2: json)
Of lm_eval's results the description of the machine (`pretty_env_info`) was taken out.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bem_peft.evaluation.formats.inspect_logs import _read_eval
from bem_peft.evaluation.formats.read import read_results
from bem_peft_cli.main import main

FOREIGN = Path(__file__).parent / "foreign"
LM_EVAL, INSPECT = FOREIGN / "lm_eval", FOREIGN / "inspect"


@pytest.mark.parametrize("name", ["pt3", "lora"])
def test_samples_of_lm_eval_have_the_means_that_it_wrote(name: str) -> None:
    (system,) = read_results([LM_EVAL / name])
    assert (system.name, system.seeds) == (name, (0, 1, 2))
    assert set(system.scores) == {"local_mc/acc", "local_mc/acc_norm", "local_gen/exact_match"}
    for k, seed in enumerate(system.seeds):
        (path,) = (LM_EVAL / name / f"seed-{seed}").rglob("results_*.json")
        written = json.loads(path.read_text())
        for label, scores in system.scores.items():
            task, metric = label.split("/")
            assert scores.values[k].mean() == pytest.approx(written["results"][task][f"{metric},none"])
            assert scores.higher_is_better is written["higher_is_better"][task][metric]
            assert len(scores.items) == written["n-samples"][task]["effective"]
    assert system.provenance[0]["versions"]["lm_eval"] == "0.4.13"


@pytest.mark.parametrize("name", ["pt3", "lora"])
def test_logs_of_inspect_have_the_means_that_it_wrote(name: str) -> None:
    (system,) = read_results([INSPECT / name])
    assert (system.name, system.seeds) == (name, (0, 1, 2))
    assert set(system.scores) == {"includes", "match"}
    for k, seed in enumerate(system.seeds):
        (path,) = (INSPECT / name / f"seed-{seed}").iterdir()
        header = json.loads(path.read_text()) if path.suffix == ".json" else _read_eval(path)[0]
        for written in header["results"]["scores"]:
            expected = written["metrics"]["accuracy"]["value"]
            assert system.scores[written["name"]].values[k].mean() == pytest.approx(expected)
    assert system.left_out == frozenset()
    assert system.provenance[0]["versions"]["inspect_ai"] == "0.3.285"


@pytest.mark.parametrize("folder", [LM_EVAL, INSPECT], ids=["lm_eval", "inspect"])
def test_a_report_is_made_of_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", str(folder / "pt3"), str(folder / "lora"), "--anchor", "lora", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "pt3: NO VERDICT" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    systems = {s.name: s for s in read_results([folder / "pt3", folder / "lora"])}
    for found in report["comparisons"]["pt3"]:
        means = [np.mean(systems[name].scores[found["metric"]].values) for name in ("pt3", "lora")]
        assert found["comparison"]["estimate"] == pytest.approx(means[0] - means[1])
        assert (found["comparison"]["seeds"], found["comparison"]["items"]) == (3, 24)
    if folder == LM_EVAL:  # neither answers anything: nothing is said of it
        (left,) = report["unjudged"]["pt3"]
        assert (left["metric"], left["slice"]) == ("local_gen/exact_match", "all")


def test_two_runs_in_one_folder_and_a_missing_direction_are_refused(tmp_path: Path) -> None:
    shutil.copytree(LM_EVAL / "pt3", tmp_path / "pt3")
    (samples,) = (tmp_path / "pt3/seed-0").rglob("samples_local_mc_*.jsonl")
    later = samples.with_name(re.sub(r"_2026-\d\d-\d\dT", "_2027-01-01T", samples.name))
    shutil.copy(samples, later)
    with pytest.raises(ValueError, match="two runs of 'local_mc'"):
        read_results([tmp_path / "pt3"])
    samples.unlink()
    with pytest.raises(ValueError, match=r"there is no results_2027-.* beside it"):
        read_results([tmp_path / "pt3"])


def test_filters_and_metrics_that_are_no_number_are_told_apart(tmp_path: Path) -> None:
    shutil.copytree(LM_EVAL / "pt3", tmp_path / "pt3")
    for path in (tmp_path / "pt3").rglob("samples_local_mc_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().split("\n") if line]
        more = [{**line, "filter": "strict", "acc": 1 - line["acc"]} for line in lines]
        for line in [*lines, *more]:
            line["acc_norm"] = [-12.5, 3]
        path.write_text("\n".join(map(json.dumps, [*lines, *more])))
    (system,) = read_results([tmp_path / "pt3"])
    assert set(system.scores) == {"local_mc/acc", "local_mc/acc (strict)", "local_gen/exact_match"}
    total = system.scores["local_mc/acc"].values + system.scores["local_mc/acc (strict)"].values
    assert (total == 1).all()
    assert any("local_mc/acc_norm is no number an item and is left out" in text for text in system.warnings)


def test_a_sample_without_a_score_is_left_out_of_all_and_two_logs_are_refused(tmp_path: Path) -> None:
    for name in ("pt3", "lora"):
        shutil.copytree(INSPECT / name, tmp_path / name)
    (path,) = (tmp_path / "pt3/seed-2").iterdir()
    log = json.loads(path.read_text())
    log["samples"][3]["error"] = {"message": "out of memory", "traceback": "", "traceback_ansi": ""}
    log["samples"][4]["scores"] = None
    path.write_text(json.dumps(log))
    systems = read_results([tmp_path / "pt3", tmp_path / "lora"])
    gone = {str(log["samples"][i]["id"]) for i in (3, 4)}
    assert systems[0].left_out == gone
    assert any("2 sample(s) ended in an error" in text for text in systems[0].warnings)
    command = ["compare", str(tmp_path / "pt3"), str(tmp_path / "lora"), "--anchor", "lora", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["left_out"]) == gone
    assert report["comparisons"]["pt3"][0]["comparison"]["items"] == 22
    shutil.copy(path, path.with_name("again.json"))
    with pytest.raises(ValueError, match="two logs of 'local_qa' for seed 2"):
        read_results([tmp_path / "pt3"])


def test_a_broken_log_is_named(tmp_path: Path) -> None:
    (path,) = (INSPECT / "pt3/seed-0").iterdir()
    whole = path.read_bytes()
    broken = tmp_path / "a.eval"
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.startswith("samples/"))
        middle = archive.getinfo(name).header_offset + 300
    for content in (whole[: len(whole) // 2], b"", whole[:middle] + b"\0" * 200 + whole[middle + 200 :]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(broken))):
            read_results([broken])
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("_journal/start.json", "{}")
    with pytest.raises(ValueError, match=r"has no header\.json"):
        read_results([broken])
