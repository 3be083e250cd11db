"""The tokenizer folder that travels with a cache, copied with care: an export may come from a stranger."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from stillroom.storage.interchange.files import replacing

TOKENIZER: Final = "tokenizer"
_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_BYTES: Final = 256 << 20


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer folder that travels with a cache: files of known kinds and bounded size.

    A link is followed only from a hub snapshot into the `blobs` beside its snapshots: a stranger's link could lead to a
    secret of yours.
    """
    if not (source / TOKENIZER).is_dir() or (source / TOKENIZER).is_symlink():
        return
    blobs = source.resolve().parent.parent / "blobs"
    for path in sorted((source / TOKENIZER).iterdir()):
        if path.suffix not in _SUFFIXES or not path.is_file():
            continue
        if path.is_symlink() and path.resolve().parent != blobs:
            continue
        if path.stat().st_size <= _BYTES and not (target / TOKENIZER / path.name).exists():
            with replacing(target / TOKENIZER / path.name) as temporary:
                shutil.copyfile(path, temporary)
