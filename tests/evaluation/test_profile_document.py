"""Profiles as files, as costs of a comparison, and on the page; cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from bem_peft.evaluation.evaluator import ComprehensiveEvaluator
from bem_peft.evaluation.formats.read import read_results
from bem_peft.evaluation.profile_document import ProfileDocument
from bem_peft.evaluation.profiler import Profile, Workload
from bem_peft.evaluation.report.files import write_files
from bem_peft.evaluation.report.report import SCHEMA_FILE
from bem_peft_cli.main import main
from tests.evaluation.test_report import Page, write_run

PREFILL, DECODE = Workload("prefill", 1, 256), Workload("decode", 1, 272)


def profile(system: str, workload: Workload, p50: float, **changes: object) -> Profile:
    given = {
        "system": system, "workload": workload, "runs": 4, "p50_ms": p50, "p95_ms": p50 * 1.2, "p99_ms": p50 * 1.3,
        "p95_interval": None, "tokens_per_second": workload.tokens_a_run / p50 * 1e3, "peak_memory_bytes": 2**30,
        "ratio_to_base": (1.1, 1.0, 1.2), "ratio_to_anchor": (1.02, 1.01, 1.03), "noise": (0.99, 1.01),
        "verdict": "PASS", "times_ms": (p50 * 0.9, p50, p50, p50 * 1.2),
    } | changes  # fmt: skip
    return Profile(**given)  # type: ignore[arg-type]


def document() -> ProfileDocument:
    profiles = []
    for workload, base in ((PREFILL, 100.0), (DECODE, 10.0)):
        profiles += [
            profile("better", workload, base * 1.12),
            profile("anchor", workload, base * 1.1, ratio_to_anchor=None, verdict=None),
            profile("base", workload, base, ratio_to_base=None, verdict=None),
        ]
    source = {"hardware": {"processor": "made up"}, "settings": {"dtype": "torch.float32", "device": "cpu"}}
    return ProfileDocument("anchor", tuple(profiles), source, (256, 32))


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    document().write(tmp_path / "deep" / "profile.json")
    assert ProfileDocument.read(tmp_path / "deep" / "profile.json") == document()
    # 110 ms and 32 tokens of 11 ms: 462 ms a request
    assert document().requests_per_minute("anchor") == pytest.approx(60_000 / 462)
    text = document().to_text()
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["base", "anchor", "better"]
    assert "129.9" in text
    assert "256 tokens in and 32 out" in text
    (tmp_path / "x.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="no document of `bem-peft profile`"):
        ProfileDocument.read(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('{"version": 9}')
    with pytest.raises(ValueError, match="has version 9"):
        ProfileDocument.read(tmp_path / "y.json")


def test_what_is_inconclusive_has_its_reason_wherever_it_stands(tmp_path: Path) -> None:
    found = document()
    wide = {"verdict": "INCONCLUSIVE", "ratio_to_anchor": (1.04, 1.01, 1.07)}
    noisy = {"verdict": "INCONCLUSIVE", "noise": (0.8, 1.25)}
    profiles = (*found.profiles, profile("wide", DECODE, 11.0, **wide), profile("noisy", PREFILL, 99.0, **noisy))
    changed = ProfileDocument("anchor", profiles, found.provenance)
    reasons = (
        "wide, decode, is inconclusive: [1.010, 1.070] lies on both sides of the tolerance of 5%: more runs.",
        "noisy, prefill, is inconclusive: the anchor against itself reaches [0.800, 1.250], further than the tolerance",
    )
    systems = read_results([write_run(tmp_path, "anchor", 0.0), write_run(tmp_path, "better", -0.1)])
    write_files(
        ComprehensiveEvaluator(systems, "anchor", stands_on="slice_b", profiles=changed).report(), tmp_path / "out"
    )
    page = (tmp_path / "out/report.html").read_text()
    for text in (changed.to_text(), page):
        assert all(reason in text for reason in reasons)
    assert "inconclusive" not in found.how()


def test_times_are_costs_and_stand_on_the_page(tmp_path: Path) -> None:
    systems = read_results([write_run(tmp_path, "anchor", 0.0), write_run(tmp_path, "better", -0.1)])
    report = ComprehensiveEvaluator(systems, "anchor", stands_on="slice_b", profiles=document()).report()
    assert {o.name for o in report.objectives} >= {"nll", "prefill_ms", "decode_ms"}
    values = {point.name: point.values for point in report.pareto}
    assert (values["anchor"]["decode_ms"], values["better"]["prefill_ms"]) == pytest.approx((11.0, 112.0))
    write_files(report, tmp_path / "out")
    jsonschema.validate(json.loads((tmp_path / "out/report.json").read_text()), json.loads(SCHEMA_FILE.read_text()))
    text = (tmp_path / "out/report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.stack == []
    assert "<h2>Latency</h2>" in text
    assert sum("Times of" in str(attributes.get("aria-label")) for tag, attributes in page.tags if tag == "svg") == 2
    assert "| better | decode, 1 x 272 | 11.20 |" in (tmp_path / "out/report.md").read_text()
    strangers = read_results([write_run(tmp_path, "x", 0.0), write_run(tmp_path, "y", -0.1)])
    with pytest.raises(ValueError, match="of which none is compared here"):
        ComprehensiveEvaluator(strangers, "x", profiles=document())
    with pytest.raises(ValueError, match="`quality` = 'chrf'"):
        ComprehensiveEvaluator(systems, "anchor", quality="chrf")


def test_a_card_gets_the_results_and_keeps_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path, "anchor", 0.0)), str(write_run(tmp_path, "better", -0.1))]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    command = ["compare", *runs, "--anchor", "anchor", "--held-out", "--out", str(tmp_path / "out")]
    command += ["--card", f"better={adapter}", "--dataset", "Verses", "--dataset-id", "someone/verses"]
    assert main(command) == 2
    assert "no adapter_config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (adapter / "adapter_config.json").write_text("{}")
    head = "---\nlibrary_name: peft\nbase_model: some/base\nmodel-index:\n- name: mine\n  results:\n"
    other = (
        "  - task:\n      type: text-generation\n    dataset:\n      name: Other\n      type: other\n    metrics:\n"
        "    - type: bleu\n      value: 3.5\n"
    )
    (adapter / "README.md").write_text(f"{head}{other}---\n\n# Mine\n\nkept words\n")
    for _ in range(2):  # the second time replaces what the first wrote
        assert main(command) == 0
    card = ModelCard.load(adapter / "README.md")
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    values = {s.name: s.values for s in read_results(runs)}
    assert found == {("other", "bleu"): 3.5, ("someone/verses", "nll"): pytest.approx(values["better"]["nll"])}
    assert (card.data.model_name, card.data.base_model) == ("mine", "some/base")
    assert card.text.count("## Comparison of adapters") == 1
    assert "kept words" in card.text
    (entries,) = (adapter / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(entries.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("someone/verses", "nll")
    assert main([*command[:-4], "--dataset-id", "x/y"]) == 2
    assert "--card needs --dataset" in capsys.readouterr().err
    assert main([*command[:8], "--card", f"nobody={adapter}", "--dataset", "x"]) == 2
    assert "write SYSTEM=FOLDER" in capsys.readouterr().err
    shutil.rmtree(adapter / ".eval_results")
    (adapter / "README.md").unlink()
    assert main([*command[:-2]]) == 0
    assert ModelCard.load(adapter / "README.md").data.library_name == "peft"
    assert not (adapter / ".eval_results").exists()
