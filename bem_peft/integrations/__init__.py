"""Plugins for trainers of others, each loaded by the trainer that it is written for; see docs/recipes/front_ends.md."""
