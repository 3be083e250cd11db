"""The files of a committed shard, looked at from outside: there, whole, as written, and no others; and what to do if not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from stillroom.storage import strict
from stillroom.storage.commits import SHARDS, CommitRecord, record_name
from stillroom.storage.errors import FormatError
from stillroom.storage.layout import array_metadata, arrays_of, group_metadata
from stillroom.storage.manifest import Manifest

Kind = Literal[
    "record",
    "missing",
    "size",
    "hash",
    "link",
    "unknown",
    "metadata",
    "decode",
    "rows",
    "totals",
    "chain",
    "stray",
    "index",
]
_UNKNOWN_SHOWN: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a cache.

    Attributes:
        shard: its index, or None where it is about no shard of the plan.
        kind: `record` (missing, malformed or another shard's), `missing`, `size`, `hash`, `link` or `unknown` (a file),
            `metadata` (a zarr.json), `decode` (bytes that do not unfold or contradict each other), `rows` (a row no sampler
            makes), `totals` (the record counts something else), `chain` (sequences that do not follow on), `stray` (a
            record outside the plan), `index` (an index.arrow that says what is not so).
        what: the damage, one sentence.
        remedy: what to do about it.
        recompute: whether dropping the shard's record, and running `stillroom cache` again, is the remedy.
    """

    shard: int | None
    kind: Kind
    what: str
    remedy: str
    recompute: bool = True


def redo(index: int) -> str:
    """The remedy for a shard that must be computed again."""
    return (
        f"`verify --repair` (or delete {record_name(index)}), then `stillroom cache` again: only this shard is redone"
    )


def check_files(root: Path, record: CommitRecord) -> Iterator[tuple[Kind, str]]:
    """Files of the record that are missing, lead out of the cache, or have another size.

    Raises:
        PermissionError: one may not be read.
    """
    folder, inside = root / record.path, os.path.realpath(root / SHARDS) + os.sep
    if not folder.is_dir():
        yield "missing", f"its folder {record.path} is missing"
        return
    for item in record.objects:
        name = f"{record.path}/{item.name}"
        try:
            size = (folder / item.name).stat().st_size
        except PermissionError:
            raise
        except OSError as error:
            yield "missing", f"{name} cannot be opened ({error.strerror})"
            continue
        if not os.path.realpath(folder / item.name).startswith(inside):
            yield "link", f"{name} leads out of the cache"
        elif size != item.size_bytes:
            yield "size", f"{name} holds {size:,} bytes, its record says {item.size_bytes:,}"


def unknown_files(root: Path, record: CommitRecord) -> list[Finding]:
    """Files of the shard's folder that its record does not name: one finding for all of them."""
    listed, extra = {item.name for item in record.objects}, []
    for folder, folders, files in os.walk(root / record.path):
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        names = [(Path(folder) / name).relative_to(root / record.path).as_posix() for name in files + linked]
        extra += [name for name in names if name not in listed]
    if not extra:
        return []
    shown = ", ".join(sorted(extra)[:_UNKNOWN_SHOWN]) + (" ..." if len(extra) > _UNKNOWN_SHOWN else "")
    what = f"{len(extra)} files of {record.path} are in no record: {shown}"
    remedy = "delete them; the shard itself is not touched by them"
    return [Finding(shard=record.shard, kind="unknown", what=what, remedy=remedy, recompute=False)]


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(root: Path, record: CommitRecord) -> Iterator[tuple[Kind, str]]:
    """Files that are not what was written."""
    for item in record.objects:
        if file_hash(root / record.path / item.name) != item.sha256:
            yield "hash", f"{record.path}/{item.name} is not what was written: its SHA-256 differs from the record's"


def check_metadata(root: Path, manifest: Manifest, record: CommitRecord) -> Iterator[tuple[Kind, str]]:
    """zarr.json files that say something else than manifest and record do."""
    wanted: dict[str, dict[str, Any]] = {"zarr.json": group_metadata(manifest, record.shard, record.widths)}
    for array in arrays_of(manifest):
        shape = array.chunk_shape(manifest.packing.seq_len, record.widths)
        wanted[f"{array.name}/zarr.json"] = array_metadata(array, record.sequences, shape)
    for name, metadata in wanted.items():
        try:
            came: dict[str, Any] | None = strict.load_file(root / record.path / name)
        except (FormatError, UnicodeDecodeError):
            came = None
        if came != metadata:
            yield "metadata", f"{record.path}/{name} does not say what the format demands of this shard"
