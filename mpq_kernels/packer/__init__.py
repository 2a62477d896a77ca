"""Dense checkpoint + plan -> packed checkpoint, of exactly the announced size, whatever kills it half-way.

May import: nn, calibrate, checkpoint, quantize, plan, dense, files, format.
Gives: pack.pack and its report. job.py decides what is written, write.py writes, unfinished.py and journal.py let a
killed run go on, output.py swaps the finished directory into place.
"""
