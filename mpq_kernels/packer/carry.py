"""Files that are carried along: tokenizer, chat templates, licence, and the model card with a note at its end.

They are copied byte for byte, folders included. Only README.md gets a note on how to load the packed weights: it is
what people read who are given the directory, it would else describe other files than those beside it, and nothing
depends on its bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ..files.strict import create_file, fsync_directory, write_all

MODEL_CARD = "readme.md"
NOTE = b"""

---

The linear layers of this copy of the model are packed by `mpq_kernels`; `quantization_config` in `config.json` says
how. To load it:

```python
import mpq_kernels

model = mpq_kernels.load("path/to/this/directory")
```

After `import mpq_kernels`, `AutoModelForCausalLM.from_pretrained` loads it too.
"""


def carried_bytes(root: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of each file in the output. root: the source's directory, which `names` are relative to."""
    return {name: (root / name).stat().st_size + len(_note(root, name)) for name in names}


def folders_of(names: Iterable[str]) -> list[str]:
    """The folders that these files are in, outer ones first."""
    return sorted({str(folder) for name in names for folder in PurePosixPath(name).parents} - {"."})


def carry(root: Path, names: Sequence[str], directory: Path) -> None:
    """Copy files into a new directory, durably. Raises OSError, also when one is there already."""
    folders = [directory / folder for folder in folders_of(names)]
    for folder in folders:
        folder.mkdir()
    for name in names:
        with (
            open(root / name, "rb") as file,
            create_file(directory / name) as descriptor,
            os.fdopen(os.dup(descriptor), "wb") as out,
        ):
            shutil.copyfileobj(file, out)
            out.flush()
            write_all(descriptor, _note(root, name))
    for folder in folders:
        fsync_directory(folder)


def _note(root: Path, name: str) -> bytes:
    """What is added to a file: the note, to a model card without it."""
    if name.lower() != MODEL_CARD or NOTE in (root / name).read_bytes():
        return b""
    return NOTE
