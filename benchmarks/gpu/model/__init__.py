"""Cycles of a kernel from its machine code. No GPU is needed; nothing here is a measurement, figures are *modelled*.

library --sass_files.py--> instructions --emulator.py--> what each warp of a block issues --pipeline.py--> cycles
shape, widths, tokens --problem.py, plan.cpp--> the parameters of the launch ----^              |
machines.py: clocks, latencies, pipes, bandwidth ------------------------------------------------'

python -m benchmarks.gpu.model --shape 8192x8192 --bits 4 --tokens 1
"""
