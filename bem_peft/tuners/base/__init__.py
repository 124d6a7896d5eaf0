"""What the methods share: the contract of an adapter, its config, layer and model, and which form computes."""
