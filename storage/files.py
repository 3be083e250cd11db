"""Three things done to files with care: a durable write, a put that fails if the name is taken, and hashes.

"Durable" means the bytes and the directory entry are both on the disk before the function returns.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it; the caller flushes the directory.

    Raises:
        FileExistsError: the name is taken.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def put_if_absent(path: Path, data: bytes) -> bool:
    """Make `path` hold `data`, whole or not at all, unless something is already there; True if this call did.

    A hard link is the one file operation that is atomic, durable after a directory flush, and fails where the name exists.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        write_durably(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        sync_directory(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)
