"""Kernels in Triton over the packed tensors as they are: the portable path, from compute capability 8.0 and gfx942 on.

    work.py     which program multiplies which part of a weight: plain Python, no triton
    configs.py  how large parts are on which architecture, and where tuned choices are stored: no triton
    unpack.py   words -> operand A
    linear.py   y = x W^T for groups of 16, 32 or a multiple of 64 columns (or the whole segment)
    dense.py    W itself, and y for every other group
    launch.py   tensors -> launches
    tune.py     the measurement behind `mpq tune`

Nothing here is imported before a layer runs on this backend: `import mpq_kernels` needs no triton.
"""
