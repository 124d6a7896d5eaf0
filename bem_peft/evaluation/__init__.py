"""Comparisons of adapters that can be believed: paired over seeds and items, for any PEFT method."""
