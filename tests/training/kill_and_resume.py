"""A run that is killed twice and goes on, beside one that is not.

    python -m tests.training.kill_and_resume METHOD SEED FOLDER [--plain]      (--plain: transformers' own Trainer)

Every run is a process of its own, forked before torch has computed anything, and killed with SIGKILL: once after a
random step, once in the middle of a random file of a checkpoint. Prints what differs at the end, as JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState

import bem_peft
from bem_peft.training.checkpoints import is_complete, last_complete_checkpoint
from bem_peft.training.trainer import PTTrainer, PTTrainingConfig
from tests.tiny_models import build
from tests.training.equalities import collate, rows

STEPS, SAVE_STEPS, POISONED = 12, 3, 2
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def configs() -> dict[str, Any]:
    film = bem_peft.ResidualFiLMConfig(gamma_dim=3, beta_dim=2)
    gating = bem_peft.HeadGroupGatingConfig(
        decorrelation_strength=2.0, decorrelation_anneal_steps=8, gate_dropout=0.2, dropout=0.1, max_singular_value=0.05
    )
    kronecker = bem_peft.KroneckerConfig(u_rank=3, v_rank=2, dropout=0.2, orthogonality_strength=1.0, fro_budget=0.05)
    return {
        "head_gating": gating,
        "rank_mask": bem_peft.DynamicRankMaskConfig(total_rank=8, active_rank=4, dropout=0.1, balance_strength=1.0),
        "kronecker": kronecker,
        "film": film,
        "composite": bem_peft.CompositeConfig([gating, kronecker, film]),
    }


class Poison(TrainerCallback):
    """Makes a FiLM adapter's weights not finite before one step: the emergency brake must pull, once."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == POISONED:
            for name, parameter in kwargs["model"].named_parameters():
                if "layers.1.mlp" in name and name.endswith(".beta"):
                    parameter.data[0] = float("nan")


class KillAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def half_and_die(path: str | Path, whole: bytes) -> None:
    Path(path).write_bytes(whole[: len(whole) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(file: str, step: int) -> None:
    """Let this process die when it has written half of `file` of checkpoint-`step`."""
    import peft.peft_model
    from safetensors.torch import save

    def is_it(path: Any) -> bool:
        return Path(str(path)).parts[-2:] == (f"checkpoint-{step}", file)

    save_tensors, save_any, save_state = peft.peft_model.safe_save_file, torch.save, TrainerState.save_to_json

    def tensors(values: Any, path: Any, **kwargs: Any) -> None:
        if is_it(path):
            half_and_die(path, save(values))
        save_tensors(values, path, **kwargs)

    def anything(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if is_it(path):
            buffer = io.BytesIO()
            save_any(value, buffer)
            half_and_die(path, buffer.getvalue())
        save_any(value, path, *args, **kwargs)

    def state(self: TrainerState, path: str) -> None:
        if is_it(path):
            half_and_die(path, b'{"global_step": %d, "log_history": [' % self.global_step)
        save_state(self, path)

    peft.peft_model.safe_save_file = tensors
    torch.save = anything  # type: ignore[assignment]
    TrainerState.save_to_json = state  # type: ignore[method-assign]


def train(method: str, folder: Path, callbacks: list[Any], plain: bool = False) -> None:
    set_seed(0)
    model = get_peft_model(build("llama"), configs()[method])
    options = {
        "max_steps": STEPS, "save_steps": SAVE_STEPS, "per_device_train_batch_size": 2, "logging_steps": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-2, "lr_scheduler_type": "cosine", "warmup_steps": 3, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 4, "save_total_limit": 2,
    }  # fmt: skip
    run = Trainer if plain else PTTrainer
    arguments = TrainingArguments(str(folder), **options) if plain else PTTrainingConfig(str(folder), **options)
    last = last_complete_checkpoint(folder)
    trainer = run(
        model, arguments, train_dataset=rows(7), data_collator=collate, callbacks=[Poison(), *callbacks]
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=last if plain else last is not None)
    trainer.save_model(str(folder / "final"))
    torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    losses = [(log["step"], log["loss"], log["learning_rate"]) for log in trainer.state.log_history if "loss" in log]
    (folder / "losses.json").write_text(json.dumps(losses))


def in_a_process(work: Any) -> int:
    """Signal that ended the process, 0 if it ended by itself; its output goes to the log."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed; see its output")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same, bit for bit, at the end of two runs."""
    found = []
    first, second = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (one, other))
    found += [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other)]
    for key, values in states[0]["state"].items():
        other_values = states[1]["state"][key]
        found += [f"optimizer {key} {n}" for n in values.keys() | other_values.keys() if n not in other_values]
        for name, value in values.items():
            is_same = torch.equal(value, other_values[name]) if torch.is_tensor(value) else value == other_values[name]
            found += [] if is_same else [f"optimizer {key} {name}"]
    if states[0]["param_groups"] != states[1]["param_groups"]:
        found.append("optimizer groups")
    if (one / "losses.json").read_text() != (other / "losses.json").read_text():
        found.append("losses")
    return found


def main(method: str, seed: int, folder: Path, plain: bool = False) -> dict[str, Any]:
    chance = random.Random(seed)
    step = chance.randrange(SAVE_STEPS + 1, STEPS)
    save = min(STEPS, (step // SAVE_STEPS + 1) * SAVE_STEPS)  # the first checkpoint after the first resume
    file = chance.choice(FILES)
    never, killed = folder / "never_killed", folder / "killed"
    assert in_a_process(lambda: train(method, never, [], plain)) == 0
    assert in_a_process(lambda: train(method, killed, [KillAfter(step)], plain)) == signal.SIGKILL

    def killed_in_a_save() -> None:
        kill_in(file, save)
        train(method, killed, [], plain)

    assert in_a_process(killed_in_a_save) == signal.SIGKILL
    partial = killed / f"checkpoint-{save}"
    assert partial.is_dir()
    assert not is_complete(partial)
    assert in_a_process(lambda: train(method, killed, [], plain)) == 0
    weights = load_file(never / "final" / "adapter_model.safetensors")
    remembered = torch.load(never / "optimizer.pt", weights_only=True)["state"].values()
    emergencies = [values.get("bem_peft_emergencies", 0) for values in remembered]
    return {
        "killed_after_step": step,
        "killed_in": f"{partial.name}/{file}",
        "tensors": len(weights),
        "emergencies": sum(emergencies),
        "differs": differences(never, killed),
    }


if __name__ == "__main__":
    plain = "--plain" in sys.argv
    print("RESULT", json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), plain)))
