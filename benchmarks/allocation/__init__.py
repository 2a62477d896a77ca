"""Bit allocation: plans against uniform widths, methods against each other, published claims."""
