"""Save one tiny adapter of each kind with the bem_peft that is installed, for the releases after it to load.

    python -m tests.saved_files.make

writes tests/saved_files/VERSION/: `base.safetensors` (the model's weights and input ids, float64), and for each kind a
folder as `save_pretrained` leaves it with `logits.safetensors` (float64) beside it. Run before a release; never again
for one that is out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from bem_peft import (
    CompositeConfig,
    DynamicRankMaskConfig,
    HeadGroupGatingConfig,
    KroneckerConfig,
    ResidualFiLMConfig,
    __version__,
)
from tests.contract.methods import randomize
from tests.tiny_models import llama

KINDS: dict[str, Callable[[], Any]] = {
    "head_gating": lambda: HeadGroupGatingConfig(num_groups=2, rank_per_group=[1, 3]),
    "head_gating_scores": lambda: HeadGroupGatingConfig(
        num_groups=4, total_rank=4, attention_stats="exact", retrieval="scores", decorrelation_strength=0.1,
        decorrelation_anneal_steps=7,
    ),
    "rank_mask": lambda: DynamicRankMaskConfig(total_rank=4, active_rank=2, balance_strength=0.1),
    "rank_mask_task": lambda: DynamicRankMaskConfig(
        total_rank=3, active_rank=2, use_hadamard_path=False, value_gate=False, mask_scope="task"
    ),
    "kronecker": lambda: KroneckerConfig(u_rank=3, v_rank=2, rank_pattern={"layers.1.mlp.down_proj": {"u_rank": 2}}),
    "film": lambda: ResidualFiLMConfig(gamma_dim=3, beta_dim=2),
    "film_static": lambda: ResidualFiLMConfig(mode="static", beta_unit="absolute"),
    "composite": lambda: CompositeConfig(
        [
            HeadGroupGatingConfig(num_groups=2, rank_per_group=2),
            DynamicRankMaskConfig(total_rank=4, active_rank=2, sites=["mlp_down"]),
            KroneckerConfig(u_rank=2, v_rank=2),
            ResidualFiLMConfig(gamma_dim=2, beta_dim=1),
        ]
    ),
}  # fmt: skip


def base() -> torch.nn.Module:
    """A Llama of 16 channels."""
    return llama(vocab_size=32, hidden_size=16, intermediate_size=24).double().eval()


def main() -> None:
    folder = Path(__file__).parent / __version__
    torch.manual_seed(0)
    weights = base().state_dict()
    ids = torch.randint(3, 32, (2, 7))
    folder.mkdir()
    save_file({**weights, "input_ids": ids}, folder / "base.safetensors")
    for kind, config in KINDS.items():
        model = base()
        model.load_state_dict(weights)
        model = get_peft_model(model, config())
        randomize(model)
        model.save_pretrained(folder / kind)
        (folder / kind / "README.md").unlink(missing_ok=True)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        save_file({"logits": logits}, folder / kind / "logits.safetensors")


if __name__ == "__main__":
    main()
