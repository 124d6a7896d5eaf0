"""help() of a config tells its fields, and a name that it does not have ends in an error that says what is meant."""

from __future__ import annotations

import dataclasses
import pydoc
import re

import pytest
from peft import PeftConfig

import bem_peft
from bem_peft.tuners.adapter_spec import AdapterSpecError, parse_adapter
from tests.contract.methods import CONFIGS

CLASSES = {name: type(make()) for name, make in CONFIGS.items()}
OF_PEFT = {field.name for field in dataclasses.fields(PeftConfig)} - {"task_type", "inference_mode"}


@pytest.mark.parametrize("name", CLASSES)
def test_help_tells_every_field_with_its_default(name: str) -> None:
    cls = CLASSES[name]
    text = pydoc.plain(pydoc.render_doc(cls)).partition("Args:")[2].partition("Method resolution order")[0]
    for field in dataclasses.fields(cls):
        if field.name in OF_PEFT or not field.init:
            continue
        entry = re.search(rf"^ [| ]*{field.name} \((.*?)(?=^ \|  {{5}}\w+ \(|\Z)", text, re.M | re.S)
        assert entry is not None, f"{field.name} is not told"
        assert "default" in entry[1].lower()
        if field.default is not dataclasses.MISSING and "Default: " in entry[1]:
            assert repr(field.default) in " ".join(entry[1].split())


@pytest.mark.parametrize("field", ["r", "lora_alpha", "lora_dropout", "rank", "alpha"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_field_of_lora_is_told_what_it_is_here(name: str, field: str) -> None:
    cls = CLASSES[name]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}': here it is ") as raised:
        cls(**{field: 8})
    named = re.findall(r"`(\w+)`", str(raised.value))
    assert set(named) <= {f.name for f in dataclasses.fields(cls)}, "the fields that it points to exist"


def test_a_misspelt_field_gets_the_nearest_and_an_unknown_one_the_help() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'u_ranks': did you mean 'u_rank'"):
        bem_peft.KroneckerConfig(u_ranks=3)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz': see help\(KroneckerConfig\)"):
        bem_peft.KroneckerConfig(zzz=3)


@pytest.mark.parametrize(
    ("text", "cls"),
    [
        ("pt1", "HeadGroupGatingConfig"), ("head_group_gating", "HeadGroupGatingConfig"),
        ("PT2", "DynamicRankMaskConfig"),
        ("dynamic_rank_mask:total_rank=8", "DynamicRankMaskConfig"), ("pt3:u_rank=2", "KroneckerConfig"),
        ("pt4", "ResidualFiLMConfig"), ("residual_film", "ResidualFiLMConfig"),
    ],
)  # fmt: skip
def test_the_methods_other_names_are_understood(text: str, cls: str) -> None:
    assert type(parse_adapter(text)).__name__ == cls


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kroneker", "did you mean 'kronecker'"), ("kronecker:r=8", "`u_rank` and `v_rank`"),
        ("lora:rank=8", "'rank': write field=value with a field of LoraConfig"),
    ],
)  # fmt: skip
def test_the_command_line_says_what_is_meant(text: str, message: str) -> None:
    with pytest.raises(AdapterSpecError, match=re.escape(message)):
        parse_adapter(text)
