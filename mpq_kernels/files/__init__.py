"""Files that are distrusted when they are read and durable when they are written: JSON, safetensors, shards.

May import: errors. Knows no model, and of torch only the dtypes and tensors that a file holds.
Gives: strict.read_json_object and replace_file, safetensors.read_header and NewFile, shards.TensorFiles.
"""
