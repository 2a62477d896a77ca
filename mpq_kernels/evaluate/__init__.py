"""How good and how fast a causal language model is, packed or dense, and models without weights to time.

May import: hf, nn, plan, checkpoint, dense, files, format.
Gives: perplexity, divergence.divergence, generation_speed, speed.measure, synthetic.synthetic_model.
"""

from .perplexity import Perplexity, perplexity
from .speed import Measurement, Speed, generation_speed, measure

__all__ = ["Measurement", "Perplexity", "Speed", "generation_speed", "measure", "perplexity"]
