"""Packs the model of this directory in 3 bits and writes with it. README.md shows these lines; run them beside it."""

from transformers import AutoTokenizer

import mpq_kernels as mpq

plan = mpq.Plan.uniform("examples/gutenberg-6m", bits=3, group_size=64)
report = mpq.pack("examples/gutenberg-6m", "gutenberg-3bit", plan, overwrite=True)
print(f"{report.bpw:.3f} stored bits for each packed weight")
model = mpq.load("gutenberg-3bit")
tokenizer = AutoTokenizer.from_pretrained("gutenberg-3bit")
inputs = tokenizer("The old house stood", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(ids[0]))
