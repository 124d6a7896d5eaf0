"""`bem-peft budget` and `bem-peft match`: a folder's config is enough, and the exit code says whether it is met."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from transformers import LlamaConfig

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
)
from bem_peft.tuners.adapter_spec import adapter_text, parse_adapter
from bem_peft_cli.main import main
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
        ("lora:q=3", "'q': write field=value with a field of LoraConfig"),
        ("lora:r", "'r': write field=value"),
        ("lora:target_modules=[q_proj", "'target_modules=[q_proj': "),
        ("composite:methods=[{method: krnecker}]", "there is no method 'krnecker'; did you mean 'kronecker'"),
        ("kronecker:u_rank=-1", "`u_rank` = -1: must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(folder: str, config: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", folder, config, "--anchor", "lora:r=2"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("lora:r=4,target_modules=[q_proj,v_proj]", LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
        ("lora:r=4,target_modules=q_proj+v_proj", LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
        ("lora:r=4,target_modules=o_proj", LoraConfig(r=4, target_modules=["o_proj"])),
        ("lora:target_modules=all-linear", LoraConfig(target_modules="all-linear")),
        (r"lora:target_modules=.*\.(q|v)_proj", LoraConfig(target_modules=r".*\.(q|v)_proj")),
        ("lora:target_modules='.*,{1,2}'", LoraConfig(target_modules=".*,{1,2}")),
        ("lora:rank_pattern={o_proj: 4},use_rslora=true", LoraConfig(rank_pattern={"o_proj": 4}, use_rslora=True)),
        ("kronecker:u_dim=none,scaling=1e-1", KroneckerConfig(scaling=0.1)),
        (
            "composite:methods=[{method: head_gating, total_rank: 12}, {method: film}]",
            CompositeConfig([HeadGroupGatingConfig(total_rank=12), ResidualFiLMConfig()]),
        ),
        ("adalora:total_step=9,init_r=4", AdaLoraConfig(total_step=9, init_r=4)),
        ('lora:exclude_modules="none"', LoraConfig(exclude_modules="none")),
        ("rank_mask:layers_to_transform=[0,1]", DynamicRankMaskConfig(layers_to_transform=[0, 1])),
    ],
)
def test_a_line_takes_what_python_takes_and_is_its_own_inverse(text: str, config: PeftConfig) -> None:
    found = parse_adapter(text)
    assert type(found) is type(config)
    assert found.to_dict() == config.to_dict()
    assert parse_adapter(adapter_text(found)).to_dict() == config.to_dict()


@pytest.mark.parametrize("method", ["kronecker", "composite"])
def test_the_output_of_match_is_the_input_of_budget(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)  # SmolLM2's shapes
    anchor = "lora:r=8,target_modules=[o_proj,down_proj]"
    assert main(["match", str(tmp_path), method, "--anchor", anchor]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    (spec,) = shlex.split(line.removeprefix("config: "))
    assert main(["budget", str(tmp_path), spec, "--anchor", anchor]) == 0
    assert capsys.readouterr().out.count("PASS") == 2


def test_values_to_choose_from_and_what_cannot_be_counted(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    free = ["--free", "u_dim=8,16", "u_rank=[2,4]", "v_rank"]
    assert (
        main(["match", folder, "kronecker:u_rank=2,v_rank=2", "--anchor", "lora:r=2", *free, "--tolerance", "1"]) == 0
    )
    found = parse_adapter(shlex.split(capsys.readouterr().out.splitlines()[-1])[1])
    assert isinstance(found, KroneckerConfig)
    assert found.u_dim in (8, 16)
    assert found.u_rank in (2, 4)
    for command, options in (
        ("match", ["--free", "u_dim=a"]),
        ("match", ["--match", "memory"]),
        ("budget", ["--quantities", "latency"]),
    ):
        with pytest.raises(SystemExit):
            main([command, folder, "kronecker", "--anchor", "lora:r=2", *options])
