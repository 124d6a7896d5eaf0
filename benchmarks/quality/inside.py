"""What trained adapters look like inside, for why a method gains or loses.

    python benchmarks/quality/study.py CHECKPOINT --ablations --systems pt4 --keep ADAPTERS
    python benchmarks/quality/inside.py CHECKPOINT ADAPTERS/verses/pt4-as_is/k+0-seed100 [...] [--print]

Of each adapter, on items of Slice-A, in float32 and the torch forms, a row for each quantity (results/inside.csv):

update, effective_rank         of each site: RMS(y' - y) / RMS(y) over the tokens, and exp of the entropy of y' - y's
                               singular values (tokens, out); the median over the sites of W_O and of W_down
gradient, weight, curvature    of each kind of parameter, over all sites: RMS of the gradient and of the weight, and the
                               largest eigenvalue of the loss's Hessian by power iteration
gates: spread, dead            PT1: standard deviation of a gate over tokens; share of gates whose mean is below .05
ranks: never, always           PT2: share of ranks that less than 1 % of the tokens keep, and more than 99 %
saturated                      share of what passes no gradient: values of PT2's tanh, PT4's units, beyond +-.95
bound_used                     PT4: sum of the absolute values in a row of gamma's and beta's map over its bound

Source: effective rank of Roy and Vetterli, The effective rank, EUSIPCO 2007.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from grid import GRID
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from results_table import ResultsTable
from study import DATA, HERE, RESULTS, write_slices
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from bem_peft.experiments.encoding import encode
from bem_peft.experiments.items import read_evaluation_items
from bem_peft.experiments.sections import DataSection
from bem_peft.kernels.backend import torch_forms
from bem_peft.kernels.film import bounded_rows, controller, token_norm
from bem_peft.tuners.base.layer import AdapterLinear
from bem_peft.tuners.pt1_head_gating import HeadGroupGatingAdapter
from bem_peft.tuners.pt2_rank_mask import DynamicRankMaskAdapter
from bem_peft.tuners.pt4_film import ResidualFiLMAdapter

ITEMS, STEPS, NEAR_ONE = 8, 12, 0.95
Row = tuple[str, str, float]  # where, quantity, value


def batch_of(task: str, checkpoint: str) -> dict[str, torch.Tensor]:
    """The first items of Slice-A that the experiments take."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        write_slices(task, Path(folder))
        path = f"{folder}/{task}-A.jsonl"
        asked = GRID["tasks"][task]
        data = DataSection(
            train=path, eval=path, prompt=asked["prompt"], completion=asked["completion"], id="{id}", max_tokens=256
        )
        items = read_evaluation_items(data)[:ITEMS]
    encoded = [encode(item, tokenizer, False)[0] for item in items]
    return dict(DataCollatorForSeq2Seq(tokenizer, padding=True)(encoded))


def kind_of(site: str) -> str:
    return site.rpartition(".")[2]


def site_rows(model: PeftModel, batch: dict[str, torch.Tensor]) -> Iterator[Row]:
    """What each site does to the tokens, as medians over the sites of a kind."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    real = batch["attention_mask"].bool()

    def look(name: str, layer: BaseTunerLayer, x: torch.Tensor, new: torch.Tensor) -> None:
        x, y, new = x[real], layer.base_layer(x)[real], new[real]
        values = dict(update_values(y, new))
        if isinstance(layer, AdapterLinear):
            values |= gate_values(layer, x, y)
        for quantity, value in values.items():
            found[kind_of(name), quantity].append(value)

    handles = [
        layer.register_forward_hook(lambda layer, args, new, name=name: look(name, layer, args[0], new))
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    for (kind, quantity), values in sorted(found.items()):
        yield kind, quantity, statistics.median(values)


def update_values(y: torch.Tensor, new: torch.Tensor) -> Iterator[tuple[str, float]]:
    update = new - y
    yield "update", float(update.norm() / y.norm())
    values = torch.linalg.svdvals(update)
    if values[0] > 0:
        share = values[values > 1e-6 * values[0]] / values.sum()
        yield "effective_rank", float((-(share * share.log()).sum()).exp())


def gate_values(layer: AdapterLinear, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Of the first adapter at a site, for the rows x (N, in) and the base's y (N, out)."""
    adapter = next(layer.adapters_named("default"))
    if isinstance(adapter, HeadGroupGatingAdapter):
        gates = adapter.gate_values(x)
        return {"spread": float(gates.std(0).mean()), "dead": share_of(gates.mean(0) < 0.05)}
    if isinstance(adapter, DynamicRankMaskAdapter):
        values = adapter.gate_values(x)  # 0, or 1 + tanh
        use = (values != 0).float().mean(0)
        far = ((values - 1.0).abs() > NEAR_ONE)[values != 0]
        return {"never": share_of(use < 0.01), "always": share_of(use > 0.99), "saturated": share_of(far)}
    if isinstance(adapter, ResidualFiLMAdapter) and not adapter.is_static:
        weights = adapter.derive(x.dtype)
        norm = token_norm(y) if adapter.is_relative else None
        units = controller(y, *adapter.projection(x, *weights[:2]), norm)
        found = {"saturated": share_of(units.abs() > NEAR_ONE)}
        for name, bound in (("gamma", adapter.clamp_range), ("beta", adapter.max_beta)):
            if bound:
                rows = bounded_rows(getattr(adapter, name), adapter.scaling, bound, x.dtype)
                found[f"{name}_bound_used"] = float(rows.abs().sum(-1).mean() / bound)
        return found
    return {}


def share_of(which: torch.Tensor) -> float:
    return float(which.float().mean())


def parameter_rows(model: PeftModel, batch: dict[str, torch.Tensor]) -> Iterator[Row]:
    """Gradient, weight and curvature of each kind of parameter."""
    groups: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter_kind(name)].append(parameter)
    every = [parameter for group in groups.values() for parameter in group]
    with torch.enable_grad():
        loss = model.train()(**batch).loss
        gradients = torch.autograd.grad(loss, every, create_graph=True, materialize_grads=True)
    gradient_of = dict(zip(map(id, every), gradients, strict=True))
    for kind, group in groups.items():
        gradient = [gradient_of[id(parameter)] for parameter in group]
        yield kind, "gradient", root_mean_square(gradient)
        yield kind, "weight", root_mean_square(group)
        yield kind, "curvature", largest_eigenvalue(gradient, group)


def parameter_kind(name: str) -> str:
    """o_proj.lora_A.default.weight, o_proj.bem_film.default.gamma: o_proj lora_A, o_proj gamma."""
    parts = [part for part in name.split(".") if part not in ("default", "weight")]
    site = next(part for part in reversed(parts) if part.endswith("_proj"))
    return f"{site} {parts[-1]}"


def root_mean_square(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).square().mean().sqrt())


def largest_eigenvalue(gradient: Sequence[torch.Tensor], group: Sequence[torch.Tensor], steps: int = STEPS) -> float:
    """Of the block of the Hessian, largest in absolute value, by power iteration on products with it."""
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(parameter.shape, generator=generator) for parameter in group]
    value = 0.0
    for _ in range(steps):
        length = sum(float(part.square().sum()) for part in vector) ** 0.5
        if not length:
            return 0.0
        vector = [part / length for part in vector]
        product = torch.autograd.grad(gradient, group, vector, retain_graph=True, materialize_grads=True)
        value = sum(float((a * b).sum()) for a, b in zip(vector, product, strict=True))
        vector = list(product)
    return value


def look_into(model: PeftModel, batch: dict[str, torch.Tensor]) -> Iterator[Row]:
    """All rows of an adapter; only the torch forms can be differentiated twice."""
    with torch_forms():
        yield from site_rows(model, batch)
        yield from parameter_rows(model, batch)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("adapters", nargs="+", type=Path, help="folders of study.py --keep: .../TASK/SYSTEM/kK-seedS")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    depends_on = [":(glob)benchmarks/quality/*.py", str(HERE / "grid.yaml"), str(DATA)]
    columns = ("task", "system", "run", "at", "quantity", "value")
    table = ResultsTable(None if options.print else RESULTS, "inside.csv", columns, depends_on=depends_on)
    for adapter in options.adapters:
        about = dict(zip(columns, adapter.resolve().parts[-3:], strict=False))
        base = AutoModelForCausalLM.from_pretrained(
            options.checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
        model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
        rows = [
            {**about, "at": at, "quantity": quantity, "value": f"{value:.3g}"}
            for at, quantity, value in look_into(model, batch_of(about["task"], options.checkpoint))
        ]
        for row in rows:
            print(*row.values(), flush=True)
        table.append(rows)


if __name__ == "__main__":
    main()
