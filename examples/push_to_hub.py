"""Push an adapter to the Hub, and load it from there in one line.

huggingface-cli login
python examples/push_to_hub.py USER/NAME --adapter runs/causal/adapter [--private]
"""

from __future__ import annotations

import argparse

import torch
from peft import AutoPeftModelForCausalLM

import bem_peft  # registers the adapter types; who loads the adapter needs this line too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository")
    parser.add_argument("--adapter", required=True, help="folder that save_pretrained wrote")
    parser.add_argument("--private", action="store_true")
    options = parser.parse_args()
    model = AutoPeftModelForCausalLM.from_pretrained(options.adapter)
    bem_peft.push_to_hub(model, options.repository, private=options.private)

    loaded = AutoPeftModelForCausalLM.from_pretrained(options.repository).eval()
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        is_same = torch.equal(model.eval()(ids).logits, loaded(ids).logits)
    print(f"pushed to {options.repository} and loaded again: logits {'the same' if is_same else 'DIFFER'}")


if __name__ == "__main__":
    main()
