"""The budget's callback in TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bem_peft import BudgetCallback, BudgetConstraints, BudgetError, KroneckerConfig
from tests.tiny_models import build

WORDS = ["in", "the", "beginning", "was", "word"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=["down_proj"]), KroneckerConfig(u_rank=4, v_rank=4)])
def test_sft_trainer_keeps_a_budget(config: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    budget = BudgetConstraints.from_anchor(build("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    arguments = SFTConfig(
        str(tmp_path), max_steps=2, save_steps=2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = SFTTrainer(
        model=build("llama"),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": [" ".join(WORDS)] * 8}),
        processing_class=tokenizer,
        peft_config=config,
    )
    BudgetCallback(budget).attach(trainer)
    if isinstance(config, LoraConfig):
        trainer.train()
        assert trainer.state.global_step == 2
        assert (tmp_path / "checkpoint-2" / "budget_report.json").is_file()
    else:
        with pytest.raises(BudgetError):
            trainer.train()
        assert trainer.state.global_step == 0
        assert not list(tmp_path.glob("checkpoint-*"))
