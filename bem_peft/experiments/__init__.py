"""Experiments that a YAML file describes: read, train, score, profile."""
