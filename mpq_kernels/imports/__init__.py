"""Quantized checkpoints of other programs become packed ones, code by code: nothing is quantized again.

May import: hf, packer, nn, checkpoint, plan, dense, files, format.
Gives: convert.import_checkpoint and its report, load.load. formats.py is the table of formats, with one file for each;
source.py makes what a format's file reads into a checkpoint for the packer; job.py gives the packer codes in place of
weights.
"""
