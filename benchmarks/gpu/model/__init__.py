"""Cycles of a kernel from its machine code. No GPU is needed; nothing here is a measurement, figures are *modelled*.

    library                --( sass_files.py )-->          instructions     --( emulator.py )-->  what each warp issues
    shape, widths, tokens  --( problem.py, plan.cpp )-->   the launch       --'                           |
    machines.py: clock, latencies, pipes, bandwidth        --( pipeline.py )-->  cycles    <--------------'

`python -m benchmarks.gpu.model --shape 8192x8192 --bits 4 --tokens 1`; what it says of the kernels: docs/kernels.md.
"""
