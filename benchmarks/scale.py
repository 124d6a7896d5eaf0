"""What the adapters add where the model does not fit one machine: memory, traffic and steps under FSDP2 and ZeRO-3.

    python benchmarks/scale.py            the plan, on paper: 7B and 70B, 8 to 512 GPUs
    python benchmarks/scale.py --check    the plan's bytes beside those of two processes here, which train

Nothing of this ran on a GPU. FLOPs and activations are counted on shapes alone (`bem_peft.budget`), a block's as the
difference of two blocks and one; bytes are arithmetic:

    a process holds            2 P / N + 16 A / N + two blocks, gathered + activations
    it sends and gets a step   all parameters, gathered forward and backward, 2 (2 P + 4 A) (N - 1) / N,
                               and the sums of the adapters' gradients, 4 A (N - 1) / N

of P numbers of the base and A of the adapters on N GPUs. The base is in bfloat16 and frozen, the adapters are in
float32 with Adam's two states, a GPU takes one sequence of `--tokens`, every block is checkpointed. That is FSDP2 with
reshard_after_forward. ZeRO-3 in bfloat16 holds the same and moves the adapters in bfloat16, half of their part; it
gathers embeddings and head once, and of a first block without an adapter at W_O half. What both add beside (buffers,
prefetching) is theirs with any adapter. "step" is the larger of computing and sending, at `--tflops` and `--gigabytes`
a second that are achieved, not advertised: it says who waits for whom, and is no forecast. "none" is the base with one
trained number at each of LoRA's sites. Rows are added to benchmarks/results/scale.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from results_table import ResultsTable, add_output
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from bem_peft import DynamicRankMaskConfig, HeadGroupGatingConfig, KroneckerConfig, ResidualFiLMConfig, match_budget
from bem_peft.budget.flops import count_flops
from bem_peft.budget.memory import count_memory
from bem_peft.budget.parameters import count_parameters

SHAPES: dict[str, dict[str, int]] = {
    "7B": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "70B": {
        "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip
ANCHOR = LoraConfig(r=16, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
METHODS: dict[str, tuple[PeftConfig, list[str]]] = {  # and the sites of the LoRA that each is matched to
    "PT1": (HeadGroupGatingConfig(task_type="CAUSAL_LM"), ["o_proj"]),
    "PT2": (DynamicRankMaskConfig(task_type="CAUSAL_LM"), ["o_proj", "down_proj"]),
    "PT3": (KroneckerConfig(task_type="CAUSAL_LM"), ["down_proj"]),
    "PT4": (  # the brake acts around an optimizer step, which ZeRO refuses
        ResidualFiLMConfig(task_type="CAUSAL_LM", emergency_stabilization=False),
        ["o_proj", "down_proj"],
    ),
}
GIB = float(1 << 30)
COLUMNS = (
    "model", "gpus", "tokens", "adapter", "parameters", "state_gib", "gathered_gib", "activations_gib", "sent_gib",
    "compute_s", "send_s", "step_s", "of_step",
)  # fmt: skip


class Block(NamedTuple):
    """One block, and what stands around the blocks: parameters, FLOPs of a step, bytes that live at its peak."""

    base: int
    adapter: int
    flops: float
    recomputed: float
    activations: int
    rest: int
    rest_flops: float


def on_meta(shape: dict[str, int], blocks: int) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": blocks})).to(torch.bfloat16)


def blocks_of(shape: dict[str, int], config: PeftConfig | None, tokens: int) -> Block:
    """Counted on models of one block and of two. config: None, the base with one trained number."""
    counts = []
    for blocks in (1, 2):
        model = get_peft_model(on_meta(shape, blocks), config or ANCHOR)
        ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, "labels": ids}
        adapter = count_parameters(model).trainable
        flops, memory = count_flops(model, inputs), count_memory(model, inputs)
        own = 0 if config is None else 1
        counts.append(
            (
                sum(p.numel() for p in model.parameters()) - adapter, own * adapter,
                flops.base_forward + flops.base_backward + own * (flops.adapter_forward + flops.adapter_backward),
                flops.base_forward + own * flops.adapter_forward,
                (memory.peak_bytes if own else memory.base_peak_bytes) - memory.weights_bytes * own
                - (0 if own else memory.weights_bytes - 4 * adapter),
            )
        )  # fmt: skip
    one, two = counts
    base, adapter, flops, recomputed, activations = (b - a for a, b in zip(one, two, strict=True))
    return Block(base, adapter, flops, recomputed, activations, one[0] - base, one[2] - flops)


def rows_of(name: str, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    shape = SHAPES[name]
    layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    small = on_meta(shape, 2)
    configs: dict[str, PeftConfig | None] = {"none": None, "LoRA r=16": ANCHOR}
    for method, (config, sites) in METHODS.items():
        anchor = LoraConfig(r=16, target_modules=sites, task_type="CAUSAL_LM")
        configs[method] = match_budget(small, config, anchor).config
    found = {adapter: blocks_of(shape, config, options.tokens) for adapter, config in configs.items()}
    for gpus in options.gpus:
        base_step = 0.0
        for adapter, block in found.items():
            trained, frozen = layers * block.adapter, layers * block.base + block.rest
            state = (2 * frozen + 16 * trained) / gpus
            gathered = 2 * (2 * block.base + 4 * block.adapter)
            activations = layers * 2 * options.tokens * hidden + block.activations
            share = (gpus - 1) / gpus
            sent = (2 * (2 * frozen + 4 * trained) + 4 * trained) * share
            flops = layers * (block.flops + block.recomputed) + block.rest_flops
            compute, send = flops / (options.tflops * 1e12), sent / (options.gigabytes * 1e9)
            step = max(compute, send)
            base_step = base_step or step
            yield {
                "model": name, "gpus": gpus, "tokens": options.tokens, "adapter": adapter, "parameters": trained,
                "state_gib": f"{state / GIB:.3f}", "gathered_gib": f"{gathered / GIB:.3f}",
                "activations_gib": f"{activations / GIB:.3f}", "sent_gib": f"{sent / GIB:.3f}",
                "compute_s": f"{compute:.4f}", "send_s": f"{send:.4f}", "step_s": f"{step:.4f}",
                "of_step": f"{step / base_step - 1:+.4f}",
            }  # fmt: skip


# ---- the same bytes, of two processes that train


TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Bytes, whole, of what this process takes part in gathering and summing up, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.found[func._overloadpacket.__name__] += max(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def train_here(folder: Path, strategy: str, method: str) -> None:
    """A few steps of one of two processes; the last one's bytes, and what it holds."""
    from torch import distributed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16)
    model = get_peft_model(base, METHODS[method][0] if method in METHODS else ANCHOR)
    trained, frozen = (
        sum(p.numel() for p in model.parameters() if p.requires_grad is is_on) for is_on in (True, False)
    )
    run, held = (fsdp2 if strategy == "fsdp2" else zero3)(model)
    ids = torch.randint(0, 255, (1, 16))
    for _ in range(2):
        with Traffic() as traffic:
            run(ids)
    if distributed.get_rank() == 0:
        found = {"frozen": frozen, "trained": trained, "held": held(), **traffic.found}
        (folder / f"{strategy}-{method}.json").write_text(json.dumps(found))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def fsdp2(model: nn.Module) -> tuple[Callable[[torch.Tensor], None], Callable[[], int]]:
    """One step, and the bytes that this process holds."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo")
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()
    for block in model.base_model.model.model.layers:
        fully_shard(block, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def run(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def held() -> int:
        states = [s for of_one in optimizer.state.values() for s in of_one.values() if hasattr(s, "to_local")]
        return sum(
            t.to_local().numel() * t.element_size() for t in [*model.parameters(), *(p.grad for p in trained), *states]
        )

    return run, held


def zero3(model: nn.Module) -> tuple[Callable[[torch.Tensor], None], Callable[[], int]]:
    """As `fsdp2`, with nothing kept gathered; bytes held are the parameters' alone, as DeepSpeed hides its states."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    gathered = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size", "max_live_parameters")
    settings = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3, **{f"stage3_{name}": 0 for name in gathered}},
    }  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)

    def run(ids: torch.Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)

    return run, lambda: sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())


def check() -> None:
    """Print the plan's bytes and those that two processes here moved and held."""
    print("strategy", "adapter", "what", "planned", "here", sep="\t")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:
        for strategy in ("fsdp2", "zero3"):
            for method in ("LoRA r=16", *METHODS):
                done = [*command, __file__, "--train", folder, strategy, method]
                subprocess.run(done, check=True, env=environment, stdout=subprocess.DEVNULL)
                found = json.loads((Path(folder) / f"{strategy}-{method}.json").read_text())
                frozen, trained, wide = found["frozen"], found["trained"], 4 if strategy == "fsdp2" else 2
                around = 2 * TINY["vocab_size"] * TINY["hidden_size"] + TINY["hidden_size"]  # embeddings, norm, head
                once = 0 if strategy == "fsdp2" else 2 * around
                plan = {
                    "held": (2 * frozen + (16 if strategy == "fsdp2" else 2) * trained) // 2,
                    "_allgather_base_": 2 * (2 * frozen + wide * trained) - once,
                    "_reduce_scatter_base_": wide * trained,
                }
                for name, planned in plan.items():
                    print(strategy, method, name, planned, found[name], sep="\t", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--train", nargs=3, metavar=("FOLDER", "STRATEGY", "ADAPTER"), help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--tokens", type=int, default=4096, help="of the one sequence a GPU")
    parser.add_argument("--tflops", type=float, default=400.0, help="achieved by a GPU in bfloat16")
    parser.add_argument("--gigabytes", type=float, default=40.0, help="achieved by a GPU's network, a second")
    add_output(parser)
    options = parser.parse_args()
    if options.train:
        train_here(Path(options.train[0]), *options.train[1:])
    if options.check:
        check()
        return
    table = ResultsTable(options.out, "scale.csv", COLUMNS, device="counted on shapes")
    print(*COLUMNS, sep="\t")
    for name in options.models:
        rows = list(rows_of(name, options))
        for row in rows:
            print(*row.values(), sep="\t", flush=True)
        table.append(rows)


if __name__ == "__main__":
    main()
