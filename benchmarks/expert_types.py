"""Every model type of transformers with fused experts: is W_down of its experts a site, and does a pass meet each one?

    python benchmarks/expert_types.py [--types mixtral ...]

The type's default config, no weights: a forward pass of eight tokens on shapes alone, with PT3 at every experts' site,
in the first of the products batched_mm, grouped_mm and eager that runs so. "met" counts the sites whose adapter was
called. Where no pass can run, `why` says what stopped it (a config that does not say how many experts a token reaches,
a loop over the experts that the values choose). Rows are added to benchmarks/results/expert_types.csv.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
import transformers
from peft import get_peft_model
from results_table import ResultsTable, add_output
from torch import nn

from bem_peft import KroneckerConfig, SiteError, find_sites
from bem_peft.budget.fake_run import FakeRun
from bem_peft.budget.flops import DECIDES_BY_VALUES
from bem_peft.sites.find import ModelBuildError, build_meta
from bem_peft.sites.models import language_model_types
from bem_peft.tuners.base.adapter import Adapter

COLUMNS = ("transformers", "type", "experts", "per_token", "sites", "met", "products", "why")


def sites_met(model: nn.Module, base: nn.Module, products: str) -> set[str]:
    """Names of the sites whose adapter is called in a pass on shapes."""
    set_products = getattr(base, "set_experts_implementation", None)
    if set_products is not None:
        set_products(products)
    met: set[str] = set()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    hooks = [a.register_forward_hook(lambda module, args, out: met.add(module.site_name)) for a in adapters]
    run = FakeRun(model.to(torch.bfloat16).eval())
    try:
        with torch.no_grad(), run.mode:
            run({"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    finally:
        for hook in hooks:
            hook.remove()
    return met


def row_of(model_type: str) -> dict[str, object] | None:
    """None for a type without fused experts, or one that cannot be built."""
    try:
        base = build_meta(model_type)
        table = find_sites(base)
    except (ModelBuildError, SiteError):
        return None
    if not table.fused_experts:
        return None
    first = table.experts[0] if table.experts else None
    placed = f"{len(table.experts)} of {len(table.fused_experts)}"
    row: dict[str, object] = {
        "transformers": transformers.__version__, "type": model_type, "experts": first.num_experts if first else "",
        "per_token": first.experts_per_token if first else "", "sites": placed, "met": 0, "products": "",
        "why": "; ".join(sorted(set(table.obstacles.values()))),
    }  # fmt: skip
    if first is None:
        return row
    with torch.device("meta"):
        model = get_peft_model(base, KroneckerConfig(u_rank=1, v_rank=1, init_method="random"))
    for products in ("batched_mm", "grouped_mm", "eager"):
        try:
            met = sites_met(model, base, products)
        except (TypeError, ValueError, RuntimeError, *DECIDES_BY_VALUES) as error:  # of the model's own code
            row["why"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        expected = {site.name for site in table.experts}
        return {**row, "met": len(met & expected), "products": products, "why": ""}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=None)
    add_output(parser)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    table = ResultsTable(args.out, "expert_types.csv", COLUMNS)
    rows = []
    for model_type in args.types or language_model_types():
        row = row_of(model_type)
        if row is not None:
            print(*row.values(), flush=True)
            rows.append(row)
    table.append(rows)


if __name__ == "__main__":
    main()
