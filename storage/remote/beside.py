"""What opening a remote cache fetches beside the shards: its index, its records one by one, its tokenizer."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pyarrow as pa

from stillroom.storage.commits import CommitRecord, find_record, load_record
from stillroom.storage.errors import DamagedError, FormatError
from stillroom.storage.index import INDEX_NAME, Index
from stillroom.storage.manifest import Manifest
from stillroom.storage.remote.place import Place

_TOKENIZER: Final = "tokenizer"
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def first_record(place: Place, manifest: Manifest, index: Index | None, shard: int) -> CommitRecord:
    """The record of a shard, from the index if that has it, else from the store."""
    try:
        if index is not None:
            return index.record(shard)
    except (KeyError, DamagedError):
        pass
    return load_record(place, manifest, shard)


def probe_records(place: Place, manifest: Manifest) -> dict[int, CommitRecord]:
    """All records there are, one request each, from a server that lists nothing."""
    with ThreadPoolExecutor(16, thread_name_prefix="stillroom-records") as pool:
        found = pool.map(lambda shard: find_record(place, manifest, shard), range(manifest.shards))
        return {record.shard: record for record in found if record is not None}


def fetch_index(place: Place, manifest: Manifest, root: Path) -> Index | None:
    """The store's index, kept in the local directory for worker processes; None if it has none that can be used."""
    try:
        index = Index(pa.py_buffer(data := place.read(INDEX_NAME)), manifest)
    except (FileNotFoundError, FormatError):
        return None
    temporary = root / f".{INDEX_NAME}-{os.getpid()}.tmp"
    temporary.write_bytes(data)
    temporary.replace(root / INDEX_NAME)
    return index


def fetch_tokenizer(place: Place, root: Path) -> None:
    """The tokenizer's files into the local directory, if the cache has any and they are not there."""
    if (root / _TOKENIZER).is_dir():
        return
    names = place.list(_TOKENIZER) if place.lists else _TOKENIZER_FILES
    part = root / f".{_TOKENIZER}-{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name in filter(_PLAIN_NAME.fullmatch, names):
        try:
            (part / name).write_bytes(place.read(f"{_TOKENIZER}/{name}"))
        except FileNotFoundError:
            continue
    try:
        if any(part.iterdir()):
            part.rename(root / _TOKENIZER)
    except OSError:  # another process was first
        pass
    finally:
        shutil.rmtree(part, ignore_errors=True)
