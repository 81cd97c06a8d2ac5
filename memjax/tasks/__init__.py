"""Synthetic recall tasks and evaluations: each a deterministic generator and a metric."""
