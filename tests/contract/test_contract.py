"""The contract of SPEC section 0: invariants x methods x architectures x dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.contract import invariants
from tests.contract.methods import METHODS, VARIANTS
from tests.tiny_models import ARCHITECTURES, SEQ2SEQ

ENOUGH = ("rank_mask", "composite")
DTYPES = (torch.float32, torch.bfloat16)
CHECKS = (
    invariants.i1_fresh_is_base,
    invariants.i2_causal,
    invariants.i3_cached_decoding,
    invariants.i4_batch_equals_alone,
    invariants.i5_gradient_checkpointing,
    invariants.i5_accumulation_and_two_forwards,
    invariants.i11_dtypes,
    invariants.i12_only_sites_touched,
)
cases = pytest.mark.parametrize
name_of = {"ids": lambda value: str(value).removeprefix("torch.")}


@cases("dtype", DTYPES, **name_of)
@cases("architecture", tuple(ARCHITECTURES))
@cases("method", METHODS)
@cases("check", CHECKS, ids=lambda check: check.__name__)
def test_invariant_holds(check, method: str, architecture: str, dtype: torch.dtype) -> None:
    check(method, architecture, dtype)


@cases("variant", tuple(VARIANTS))
@cases("check", CHECKS, ids=lambda check: check.__name__)
def test_invariant_holds_for_variant(check, variant: str) -> None:
    check(variant, "llama", torch.float32)


@cases("dtype", DTYPES, **name_of)
@cases("architecture", tuple(ARCHITECTURES))
@cases("method", METHODS)
def test_i6_saved_and_loaded(method: str, architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    invariants.i6_saved_and_loaded(method, architecture, dtype, tmp_path)


@cases("variant", tuple(VARIANTS))
def test_i6_holds_for_variant(variant: str, tmp_path: Path) -> None:
    invariants.i6_saved_and_loaded(variant, "llama", torch.float32, tmp_path)


@cases("architecture", ("llama", "llama_mqa", "gpt2"))
@cases("method", (*METHODS, "head_gating_exact"))
def test_i3_static_cache(method: str, architecture: str) -> None:
    invariants.i3_static_cache(method, architecture, torch.float32)


@cases("architecture", tuple(ARCHITECTURES))
@cases("method", METHODS)
def test_i3_generate(method: str, architecture: str) -> None:
    invariants.i3_generate(method, architecture, torch.float32)


def test_i3_generate_with_exact_statistics() -> None:
    invariants.i3_generate("head_gating_exact", "llama", torch.float32)


@cases("dtype", DTYPES, **name_of)
@cases("architecture", tuple(ARCHITECTURES))
@cases("method", ("kronecker", "film_static", "rank_mask_task", "rank_mask_whole"))
def test_i8_merged_equals_unmerged(method: str, architecture: str, dtype: torch.dtype) -> None:
    invariants.i8_merged_equals_unmerged(method, architecture, dtype)


@cases("architecture", ("gpt2", "bart"))
def test_i8_static_film_merges_into_the_bias(architecture: str) -> None:
    invariants.i8_merged_equals_unmerged("film_static_beta", architecture, torch.float32)


# an encoder-decoder takes twenty seconds: with PT2, which chooses, and with all others in one
COMPILED = [(m, a) for m in METHODS for a in ("llama", "gpt2", "t5", "bart") if a not in SEQ2SEQ or m in ENOUGH]


@cases(("method", "architecture"), COMPILED)
def test_i10_compiles_whole(method: str, architecture: str) -> None:
    invariants.i10_compiles_whole(method, architecture, torch.float32)


@cases("method", ENOUGH)  # each method, and each of its modes: tests/kernels/test_compile.py
def test_i10_training_step_compiles_whole(method: str) -> None:
    invariants.i10_training_step_compiles_whole(method, "llama", torch.float32)


@cases("method", METHODS)
def test_i10_inductor_gives_the_same_numbers(method: str) -> None:
    invariants.i10_compiles_whole(method, "llama", torch.float32, backend="inductor")


@cases("method", METHODS)
def test_i11_float16_base(method: str) -> None:
    invariants.i11_dtypes(method, "llama", torch.float16)
