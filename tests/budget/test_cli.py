"""`bem-peft budget` and `bem-peft match`: a folder's config is enough, and the exit code says whether it is met."""

from __future__ import annotations

from pathlib import Path

import pytest

from bem_peft.cli.main import main
from tests.tiny_models import build


@pytest.fixture
def folder(tmp_path: Path) -> str:
    build("llama").config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_match_and_budget_agree(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", folder, "head_gating", "--anchor", "lora:r=6", "--tolerance", "0.2"]) == 0
    assert "HeadGroupGatingConfig(total_rank=" in capsys.readouterr().out
    assert main(["budget", folder, "lora:r=6,target_modules=o_proj", "--anchor", "lora:r=6"]) == 0
    assert capsys.readouterr().out.count("PASS") == 2
    assert main(["budget", folder, "kronecker:u_rank=4,v_rank=4", "--anchor", "lora:r=2"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("lorra", "'lorra': no method and no folder"),
        ("lora:q=3", "'q=3': write field=value with a field of LoraConfig"),
        ("kronecker:u_rank=-1", "`u_rank` = -1: must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(folder: str, config: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", folder, config, "--anchor", "lora:r=2"]) == 2
    assert message in capsys.readouterr().err
