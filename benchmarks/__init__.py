"""Benchmarks: `python benchmarks/layers/gemm.py`, `benchmarks/run_gpu.sh`. README.md says how to read their numbers."""
