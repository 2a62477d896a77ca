"""Hostile input, hostile tensors, faults: `python -m benchmarks.robustness`; docs/robustness.md has what came of it."""
