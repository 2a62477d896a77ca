"""The transformers side: packed directories load through `from_pretrained`, and through `load`, which checks more.

May import: nn, checkpoint, backends, dense, files, format. This file imports nothing, so that `import mpq_kernels` is
free. Gives: register.py, which waits for transformers and peft; quantizer.py, which puts packed modules in place;
fit.py, which finds their names in a model; load.load; dequantize.py and resize.py, for methods of packed models;
adapters.py and lora.with_packed_layers, for peft; compiled.py, for generation through torch.compile, and export.py, for
programs that run elsewhere.
"""
