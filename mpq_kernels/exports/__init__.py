"""A packed directory becomes a checkpoint of another program, weight by weight, and exactly.

May import: hf, packer, nn, checkpoint, plan, dense, files, format.
Gives: convert.export_checkpoint and its report. targets.py is the table of what can be written, with one file for each;
source.py lists the linears of a packed directory; integers.py makes codes, scales and zeros of one width of them.
"""
