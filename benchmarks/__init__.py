"""Benchmarks: `python benchmarks/gemm.py`, `benchmarks/run_gpu.sh`. README.md here says how to read their numbers."""
