"""Where W_O and W_down are in a model; knows nothing of adapters."""
