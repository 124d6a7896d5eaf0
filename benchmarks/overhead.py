"""What each adapter adds to the base model's time and memory, unmerged, beside the arithmetic limit.

    python benchmarks/overhead.py [--model FOLDER | llama-3.2-1b | llama-3-8b] [--blocks N] [--rounds 20]
                                  [--dtype float32 bfloat16] [--modes eager compile] [--phases prefill256 decode1 ...]

Each round runs every variant once, in an order that changes from round to round; a cell is the median over rounds of
time / base's time of the same round, minus one, with the 95 % interval of the median (order statistics). The base of a
training step has one trained number at each site of the adapter, since a frozen base has no backward pass. Memory is
the peak of a training step by live storages. "(cpp)" is our methods with BEM_PEFT_KERNELS=cpp. Run it alone on the
machine. Nothing is reported if the kernels' tests are red or a fresh adapter does not give the base's logits. Rows are
added to benchmarks/results/NAME.csv, and NAME.svg is drawn of the newest ones.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from adapters import SHAPES, VARIANTS, Phase, Variant, adapted_models, base_model, trainable, where
from overhead_table import KEY
from peft import IA3Config, get_peft_model
from results_table import ResultsTable, add_output, newest, sources
from scipy import stats

from bem_peft import count_memory, use_kernels

PHASES = {
    "prefill256": Phase("prefill", 1, 256), "prefill1024": Phase("prefill", 1, 1024), "decode1": Phase("decode", 1, 64),
    "decode8": Phase("decode", 8, 64), "train": Phase("train", 2, 128), "memory": Phase("memory", 2, 128),
}  # fmt: skip
COLUMNS = (
    "model", "blocks", "dtype", "mode", "phase", "base", "variant", "parameters", "overhead", "low", "high", "limit",
    "lora_overhead", "rounds", "versions",
)  # fmt: skip


def interleave(
    runs: dict[str, Callable[[], float]], rounds: int, report: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """seconds[variant][round]; one untimed round first, after which `report` is told how long it will take."""
    began = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, rng = list(runs), random.Random(0)
    for i in range(rounds + 1):
        rng.shuffle(order)
        for name in order:
            use_kernels(VARIANTS[name].kernels if name in VARIANTS else "torch")
            value = runs[name]()
            if i:
                seconds[name].append(value)
        if report is not None and i == 0:
            report(f"  {rounds} rounds of {len(runs)} models, {rounds * (time.perf_counter() - began):.0f} s")
    use_kernels("torch")
    return seconds


def others_busy() -> Callable[[], float]:
    """Call it, run something, and call what it returned: the share of the processors that other processes used."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return lambda: float("nan")

    def busy() -> tuple[float, float]:
        user, nice, system, idle, wait, *rest = (int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:8])
        ticks = os.sysconf("SC_CLK_TCK")
        return (user + nice + system + sum(rest)) / ticks, (user + nice + system + sum(rest) + idle + wait) / ticks

    used, whole, own = *busy(), time.process_time()

    def share() -> float:
        now, all_now = busy()
        return max(0.0, now - used - (time.process_time() - own)) / max(1e-9, all_now - whole)

    return share


def overhead(mine: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median of the ratio in the same round, minus one, and the median's 95 % interval."""
    ratios = [a / b - 1.0 for a, b in zip(mine, base, strict=True)]
    found = stats.quantile_test(ratios, q=0.0, p=0.5).confidence_interval(0.95)
    return statistics.median(ratios), float(found.low), float(found.high)


def one_number(base: Any, sites: tuple[str, ...]) -> Any:
    """The base with one trained number at each of the sites: what a training step costs without an adapter. A backward
    pass ends at the first site, so that an adapter at W_down alone has another base than one at both."""
    from adapters import share_weights

    model = get_peft_model(share_weights(base), IA3Config(target_modules=list(sites), feedforward_modules=[]))
    for module in model.modules():
        for name, parameter in list(getattr(module, "ia3_l", {}).items()):
            module.ia3_l[name] = torch.nn.Parameter(parameter.detach()[:1, :1].to(base.dtype).clone())
    return model


def memory_limit(model: Any, variant: Variant, base: Any, phase: Phase) -> int:
    """Bytes that a training step must hold beside the base's: float32 weights and gradients, and what their gradients
    are made of and the base does not keep: the input of W_down (attention keeps that of W_O), and for FiLM y."""
    kept = base.config.intermediate_size * ("down_proj" in variant.sites)
    if "FiLM" in variant.name:
        kept += base.config.hidden_size * len(variant.sites)
    tokens = phase.batch * phase.tokens * base.config.num_hidden_layers
    return trainable(model) * 8 + kept * tokens * base.dtype.itemsize


def measure(
    args: argparse.Namespace, dtype: str, mode: str, phase: Phase, report: Callable[[str], None]
) -> list[dict[str, object]]:
    base = base_model(args.model, getattr(torch, dtype), args.blocks)
    is_training = phase.kind in ("train", "memory")
    names = list(VARIANTS)
    if mode == "compile":
        names = [
            n for n in names if VARIANTS[n].is_plain_lora or (VARIANTS[n].is_ours and VARIANTS[n].kernels == "torch")
        ]
    if args.only:
        names = [n for n in names if any(n.startswith(part) for part in args.only)]
        names = list(dict.fromkeys([*(VARIANTS[n].anchor for n in names), *names]))
    report(f"{dtype}, {mode}, {phase}: building {len(names)} models")
    models = adapted_models(base, names, is_training=is_training)
    base_of = dict.fromkeys(models, "base")
    if is_training:
        del models["base"]
        for name in names:
            base_of[name] = f"base {where(VARIANTS[name].sites)}"
            models.setdefault(base_of[name], one_number(base, VARIANTS[name].sites))
    if phase.kind == "memory":
        inputs = {"input_ids": phase.ids, "labels": phase.ids, "use_cache": False}
        found = {}
        for name in names:
            use_kernels(VARIANTS[name].kernels)
            found[name] = count_memory(models[name].train(), inputs)
        use_kernels("torch")
        cells = {name: (count.peak_bytes / count.base_peak_bytes - 1.0,) * 3 for name, count in found.items()}
        base_peak = next(iter(found.values())).base_peak_bytes
        limit = {name: memory_limit(models[name], VARIANTS[name], base, phase) / base_peak for name in names}
        shown = f"{base_peak / 2**20:.1f} MiB"
    else:
        called = dict(models)
        if mode == "compile":
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64  # counted a code object, which all models share
            called = {n: torch.compile(m, fullgraph=True, dynamic=phase.kind == "decode") for n, m in models.items()}
        runs = {name: phase.runner(model, called[name]) for name, model in models.items()}
        for name, run in runs.items():
            if mode == "compile":
                report(f"  compiling {name}")
                run()
        others = others_busy()
        seconds = interleave(runs, args.rounds, report)
        report(f"\nother processes used {others():.1%} of the processors meanwhile")
        cells = {name: overhead(seconds[name], seconds[base_of[name]]) for name in names}
        limit = {name: phase.limit(models[name]) for name in names}
        shown = f"{statistics.median(seconds[base_of[names[-1]]]) * 1e3:.2f} ms"
    report(f"\n{dtype}, {mode}, {phase}: base {shown}")
    rows: list[dict[str, object]] = []
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}"
    for name in names:
        middle, low, high = cells[name]
        anchor = cells[VARIANTS[name].anchor][0] if VARIANTS[name].anchor in cells else None
        beside = "" if anchor is None or VARIANTS[name].is_plain_lora else f"   LoRA there {anchor:+.1%}"
        interval = f"{middle:+7.1%} [{low:+.1%}, {high:+.1%}]"
        report(f"  {name:24s} {interval}  limit {limit[name]:+.2%}  {trainable(models[name]):9,d}{beside}")
        blocks = base.config.num_hidden_layers
        numbers = [f"{value:.4f}" for value in (middle, low, high, limit[name])]
        values = (
            Path(args.model).name, blocks, dtype, mode, phase, shown, name, trainable(models[name]), *numbers,
            "" if anchor is None else f"{anchor:.4f}", "" if phase.kind == "memory" else args.rounds, versions,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def svg_pyplot() -> Any:
    """matplotlib's pyplot, set to draw the same file for the same figures."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SystemExit('the plot needs matplotlib: pip install -e ".[benchmarks]"') from error

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bem_peft"
    from matplotlib import pyplot

    return pyplot


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """One panel a phase: overhead with its interval, and the limit as a bar behind it."""
    pyplot = svg_pyplot()
    panels = list(dict.fromkeys((row["dtype"], row["mode"], row["phase"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels) + 2, 0.28 * len(names) + 1.4), sharey=True, squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title("\n".join(panel), fontsize=9)
        for row in rows:
            if (row["dtype"], row["mode"], row["phase"]) != panel:
                continue
            at = len(names) - names.index(row["variant"])
            middle, low, high, limit = (100 * float(row[name]) for name in ("overhead", "low", "high", "limit"))
            ours = row["variant"].startswith("PT")
            axis.barh(at, limit, color="#d5d8dc")
            axis.plot([low, high], [at, at], color="#1d4f91" if ours else "#a3251b")
            axis.plot([middle], [at], "o", markersize=4, color="#1d4f91" if ours else "#a3251b")
        axis.axvline(0, color="#5a6068", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=10.0)  # linear up to 10 %, where most of them lie
        axis.set_xticks([-5, 0, 5, 10, 30, 100, 300], ["-5", "0", "5", "10", "30", "100", "300"])
        axis.set_xlabel("% over the base", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0][0].set_yticks([len(names) - i for i in range(len(names))], names)
    figure.suptitle(sources(rows), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def parity_is_green() -> None:
    tests = Path(__file__).parents[1] / "tests" / "kernels"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(tests)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the kernels' tests are red, so nothing is timed:\n{done.stdout[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo_run/SmolLM2-135M-Instruct", help=f"folder, or {', '.join(SHAPES)}")
    parser.add_argument("--blocks", type=int, help="the first so many of a checkpoint; of a shape, default 2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compile"])
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--only", nargs="+", help="starts of variant names; each keeps the LoRA beside it")
    parser.add_argument("--skip-parity", action="store_true", help="the kernels' tests have just passed")
    parser.add_argument("--name", default="overhead", help="of the table and the plot")
    add_output(parser)
    args = parser.parse_args()
    if args.rounds < 20:
        parser.error("--rounds must be at least 20, for an interval")
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.disable_progress_bar()
    table = ResultsTable(args.out, f"{args.name}.csv", COLUMNS)
    if table.path is not None:
        svg_pyplot()  # what is missing is told before an hour of work
    if not args.skip_parity:
        parity_is_green()
    for dtype in args.dtype:
        for mode in args.modes:
            for phase in args.phases:
                table.append(measure(args, dtype, mode, PHASES[phase], lambda text: print(text, flush=True)))
    if table.path is not None:
        plot(newest(table.path, KEY), table.path.with_suffix(".svg"))
        print(f"\nwritten to {table.path} and {table.path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
