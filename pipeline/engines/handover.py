"""A settled run on its way from the process that packed the corpus to other workers of the same machine.

Arrays are written as they are and mapped by every reader, so that the packed tokens are in memory once. The folder is a
private temporary one of the same user and the same run: the only place where Stillroom unpickles.
"""

from __future__ import annotations

import mmap
import pickle
from pathlib import Path
from typing import Final

from stillroom.pipeline.prepare import Prepared

_RUN: Final = "run.pickle"


def save(prepared: Prepared, folder: Path) -> None:
    """Write `prepared` into `folder`; `is_saved` says so only when all of it is there."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(prepared, protocol=5, buffer_callback=buffers.append)
    for number, buffer in enumerate(buffers):
        (folder / f"{number}.bin").write_bytes(buffer.raw())
    (folder / f"{_RUN}.part").write_bytes(data)
    (folder / f"{_RUN}.part").rename(folder / _RUN)


def is_saved(folder: Path) -> bool:
    """Whether `load` has something to load."""
    return (folder / _RUN).exists()


def load(folder: Path) -> Prepared:
    """What `save` wrote; its arrays are read-only maps of the files."""
    paths = sorted(folder.glob("*.bin"), key=lambda path: int(path.stem))
    buffers = [_mapped(path) for path in paths]
    prepared: Prepared = pickle.loads((folder / _RUN).read_bytes(), buffers=buffers)  # our own, see above
    return prepared


def _mapped(path: Path) -> bytes | mmap.mmap:
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
