"""What torch.compile takes of a model with an adapter, whole and block by block, and how fast the step is then.

    python benchmarks/compile_time.py [--model FOLDER] [--blocks 12] [--only PT2] [--rounds 20]

"whole": `torch.compile(model)`. "regional": `block.compile()` of each block, whose graph all of them share. Each runs
in a process of its own without a compiler's cache: seconds of the first training step (forward and backward, 2 x 128
tokens, no optimizer) less those of a later one, how many graphs were made, and the median milliseconds of a step with
its quartiles, beside an eager one of the same process, interleaved. Rows are added to
benchmarks/results/compile_time.csv. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from adapters import VARIANTS, adapted_models, base_model, share_weights
from overhead import one_number
from results_table import ResultsTable, add_output

NAMES = ("base", "LoRA W_O+W_down", "PT1 head gating", "PT2 rank mask", "PT3 Kronecker", "PT4 FiLM")
KINDS = ("whole", "regional")
COLUMNS = (
    "model", "blocks", "variant", "kind", "compile_s", "graphs", "step_ms", "quartile_1", "quartile_3", "eager_ms",
    "rounds",
)  # fmt: skip


def built(model: str, blocks: int, name: str) -> Any:
    base = base_model(model, torch.float32, blocks)
    if name == "base":  # with a number at each site of the widest adapter, so that a gradient flows
        return one_number(base, ("o_proj", "down_proj")).train()
    return adapted_models(base, [name], is_training=True)[name].train()


def step(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def measure(model: Any, kind: str, rounds: int) -> dict[str, float]:
    """Of one model, in a process that has compiled nothing yet."""
    from torch._dynamo.utils import counters

    eager = share_weights(model)
    ids = (torch.arange(256) % 1000 + 1).view(2, 128)
    if kind == "whole":
        model.compile(fullgraph=True, dynamic=False)
    else:
        for block in model.get_base_model().model.layers:
            block.compile(fullgraph=True, dynamic=False)
    first = step(model, ids)
    graphs = counters["stats"]["unique_graphs"]
    step(eager, ids)
    pairs = [(step(model, ids), step(eager, ids)) for _ in range(rounds)]
    assert counters["stats"]["unique_graphs"] == graphs, "a later step compiled again"
    compiled = [own * 1e3 for own, _ in pairs]
    low, middle, high = statistics.quantiles(compiled, n=4)
    return {
        "compile_s": first - middle / 1e3, "graphs": graphs, "step_ms": middle, "quartile_1": low, "quartile_3": high,
        "eager_ms": statistics.median(other for _, other in pairs) * 1e3,
    }  # fmt: skip


def in_a_process(arguments: argparse.Namespace, name: str, kind: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", arguments.model, "--blocks", str(arguments.blocks)]
    command += ["--rounds", str(arguments.rounds), "--child", name, kind]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo_run/SmolLM2-135M-Instruct")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="variants that begin so")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.child:
        name, kind = arguments.child
        print(json.dumps(measure(built(arguments.model, arguments.blocks, name), kind, arguments.rounds)))
        return
    assert set(NAMES) - {"base"} <= set(VARIANTS)
    table = ResultsTable(arguments.out, "compile_time.csv", COLUMNS)
    for name in (name for name in NAMES if name.startswith(tuple(arguments.only))):
        for kind in KINDS:
            found = in_a_process(arguments, name, kind)
            row = {
                "model": Path(arguments.model).name, "blocks": arguments.blocks, "variant": name, "kind": kind,
                "rounds": arguments.rounds, **{key: f"{value:.2f}" for key, value in found.items()},
                "graphs": int(found["graphs"]),
            }  # fmt: skip
            table.append([row])
            print(
                "{variant:18s} {kind:9s} compiled in {compile_s} s, {graphs} graphs; a step {step_ms} ms "
                "[{quartile_1}, {quartile_3}], eager {eager_ms} ms".format_map(row),
                flush=True,
            )


if __name__ == "__main__":
    main()
