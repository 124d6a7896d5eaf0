"""Budgets: what an adapter costs, whether that is within an anchor's cost, and the sizes that make it so."""
