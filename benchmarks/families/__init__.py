"""Every family of transformers as a tiny random model: is it packed, and does the packed model compute what it should?

cases.py: what a case is. shrink.py: a config becomes a tiny one. causal.py: the causal families. multimodal.py: those
that read images or sound, with inputs of media.py. encoders.py: encoders, classifiers, encoder-decoders. check.py: one
case. sweep.py: all cases, each in a process of its own. pages.py: docs/models.md.
"""
