"""I7: a run that was killed, and killed again while it saved, ends as the one that never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bem_peft import PTTrainer, PTTrainingConfig, last_complete_checkpoint
from tests.contract.methods import METHODS, adapted
from tests.training.equalities import collate, rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", [*METHODS, "composite --plain"])
def test_killed_and_resumed_equals_never_stopped(method: str, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    name, _, option = method.partition(" ")
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.kill_and_resume", name, str(seed), str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    run = subprocess.run(
        [*command, *filter(None, [option])], cwd=ROOT, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True,
        text=True, stdin=subprocess.DEVNULL, timeout=280,
    )  # fmt: skip
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, f"seed {seed}: {run.stdout[-2000:]}{run.stderr[-3000:]}"
    result = json.loads(line.removeprefix("RESULT"))
    assert result["differs"] == [], f"seed {seed}: {result}"
    assert result["tensors"] >= 6
    if "film" in method or "composite" in method:
        assert result["emergencies"] > 0, "the emergency brake did not pull, so its state was not tested"


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "absent") is None
    for step, state in (
        (2, '{"global_step": 2}'),
        (10, '{"global_step": 10}'),
        (12, '{"global_step": 1'),
        (14, None),
        (16, '{"global_step": 10}'),
    ):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_resuming_without_a_complete_checkpoint_is_refused(tmp_path: Path) -> None:
    arguments = PTTrainingConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    trainer = PTTrainer(adapted("film", "llama").train(), arguments, train_dataset=rows(), data_collator=collate)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
