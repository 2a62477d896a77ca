"""What packed bytes mean: codes and their planes, layouts of segments, weights as values, words, and the oracle.

May import: errors. Knows no disk and no model.
Gives: codes.FORMATS, layout.WeightLayout, weights.QuantizedWeight and PackedWeight, words.pack_weight and
unpack_weight, reference.dequantize and error_bound. Source: docs/format.md.
"""
