"""A packed checkpoint: what its config says, where its tensors are, and the manifest of hashes.

May import: dense, files, format. Makes nothing: the packer writes.
Gives: PackedCheckpoint, PackingConfig and PackedModule; manifest.verified_files.
"""

from .config import PackedModule, PackingConfig
from .packed import PackedCheckpoint

__all__ = ["PackedCheckpoint", "PackedModule", "PackingConfig"]
