"""Kernels of other packages behind one interface."""
