"""A task of the study from a dataset of the Hub, for users with a network.

    python benchmarks/quality/hub.py openai/gsm8k gsm8k --config main --split train --group question \
        --prompt "Question: {question}\\nAnswer:" --completion " {answer}"

Writes data/NAME.jsonl.gz, split by content as the others are, and prints the lines that grid.yaml then needs under
`tasks`. Nothing of it is committed with the study: look at the dataset's licence first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from grid import GRID
from splits import Sizes, assign_slices, write_items


def items_from(records: Iterable[Mapping[str, Any]], group: str, limit: int) -> list[dict[str, Any]]:
    """The first `limit` records as items: `id` by their content, `group` from that column."""
    items = []
    for record, _ in zip(records, range(limit), strict=False):
        name = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]
        items.append({**record, "id": name, "group": str(record[group])})
    return list({item["id"]: item for item in items}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="hub id")
    parser.add_argument("name", help="of the task, and of its file in data/")
    parser.add_argument("--config", help="of the dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--group", required=True, help="column: what has the same value lies in one slice")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--completion", required=True)
    parser.add_argument("--metrics", nargs="+", default=["exact_match", "f1"])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    from datasets import load_dataset

    sizes = Sizes(**GRID["slices"])
    found = load_dataset(options.dataset, options.config, split=options.split, streaming=True)
    items = items_from(found, options.group, 20 * (sizes.train + sizes.a + sizes.b))
    write_items(options.name, assign_slices(items, sizes))
    task = {
        "prompt": options.prompt, "completion": options.completion, "metrics": options.metrics,
        "max_new_tokens": options.max_new_tokens, "generated": 90,
    }  # fmt: skip
    print(yaml.safe_dump({options.name: task}, sort_keys=False, allow_unicode=True))


if __name__ == "__main__":
    main()
