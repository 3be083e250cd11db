"""`verify`: is this cache what was written, and could its rows have come from its sampler? Shard by shard, bounded memory."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from stillroom.storage.chain import Edges, breaks
from stillroom.storage.commits import COMMITS, CommitRecord, committed, load_record, record_name
from stillroom.storage.depot import is_url, redacted
from stillroom.storage.errors import CacheError, DamagedError, FormatError, InputError
from stillroom.storage.files import sync_directory
from stillroom.storage.index import INDEX_NAME, MAX_INDEX_BYTES, Index
from stillroom.storage.inspect_files import Finding
from stillroom.storage.inspect_shard import ShardCheck, inspect_shard
from stillroom.storage.manifest import CONCAT, DOCUMENTS, Manifest

_RECORD_LIKE: Final = re.compile(r"(\d{1,12})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        path: the cache.
        sound: no finding. An incomplete cache is sound: its missing shards are `missing`, not damage.
        shards: shards of the plan; `committed` of them have a record.
        missing: the others, as runs (start, stop) of their indices.
        sequences: sequences decoded; rows: their rows.
        hashed_bytes: bytes compared with their SHA-256.
        findings: what is wrong, shard by shard.
        dropped: shards whose records `repair` took away: the next `stillroom cache` makes them.
        seconds: it took.
    """

    path: str
    sound: bool
    shards: int
    committed: int
    missing: tuple[tuple[int, int], ...]
    sequences: int
    rows: int
    hashed_bytes: int
    findings: tuple[Finding, ...]
    dropped: tuple[int, ...]
    seconds: float

    @property
    def exit_status(self) -> int:
        """0 sound, 1 findings (repaired ones too)."""
        return 0 if self.sound else 1


def verify(
    path: str | os.PathLike[str],
    *,
    hashes: bool = False,
    sample: int | None = None,
    repair: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Check a cache: records, files and sizes of every committed shard, its metadata, and its rows.

    Args:
        path: directory of the cache.
        hashes: also compare every file with the SHA-256 of its record.
        sample: decode only so many sequences, spread evenly over what is committed; None decodes all.
        repair: take away the records (and then the folders) of shards that must be computed again. Sound shards, and
            findings whose remedy is another, are left alone.
        on_progress: told how many of the committed shards are done.

    Raises:
        NotACacheError, FormatError: no manifest, or one this version can not read.
        CacheError: something may not be read.
        InputError: `sample` is below 1.
    """
    if sample is not None and sample < 1:
        raise InputError(f"sample came as {sample}, wanted 1 or more: leave it out to decode every sequence")
    if is_url(path):
        raise InputError(
            f"{redacted(path)} came to be verified, wanted a directory: copy it to a disk and verify the copy"
        )
    started, root = time.monotonic(), Path(path)
    manifest = Manifest.load(root)
    present, strays = _listing(root, manifest)
    wanted = None if sample is None else _spread(manifest, present, sample)
    findings = [finding for _, finding in strays] + _index(root, manifest, present)
    edges: Edges = {}
    sequences = hashed = 0
    try:
        for done, index in enumerate(present):
            chosen = None if wanted is None else wanted.get(index, [])
            check: ShardCheck = inspect_shard(root, manifest, index, hashes=hashes, sequences=chosen)
            findings += check.findings
            sequences, hashed = sequences + check.sequences, hashed + check.hashed_bytes
            if check.edges is not None and not any(finding.recompute for finding in check.findings):
                edges[index] = check.edges
            on_progress(done + 1, len(present))
        if manifest.packing.policy in (CONCAT, DOCUMENTS):
            findings += breaks(root, manifest, edges)
    except PermissionError as error:
        raise CacheError(
            f"{root} could not be verified: {error.filename} may not be read; run it as somebody who may"
        ) from error
    bad = sorted({finding.shard for finding in findings if finding.recompute and finding.shard is not None})
    if repair:
        for name, _ in strays:
            (root / COMMITS / name).unlink(missing_ok=True)
        if bad or any(finding.kind == "index" for finding in findings):
            (root / INDEX_NAME).unlink(missing_ok=True)  # a copy of the records; any process may make it again
        for index in bad:
            drop(root, manifest, index)
    return VerifyReport(
        path=str(root),
        sound=not findings,
        shards=manifest.shards,
        committed=len(present),
        missing=_gaps(present, manifest.shards),
        sequences=sequences,
        rows=sequences * manifest.packing.seq_len,
        hashed_bytes=hashed,
        findings=tuple(sorted(findings, key=lambda f: -1 if f.shard is None else f.shard)),
        dropped=tuple(bad) if repair else (),
        seconds=time.monotonic() - started,
    )


def drop(root: Path, manifest: Manifest, index: int) -> None:
    """Take a shard out of the cache: its record first, then the folder that a well-formed record names.

    A kill in between, or a malformed record, leaves an attempt that no record names; the writer collects those.
    """
    try:
        record: CommitRecord | None = load_record(root, manifest, index)
    except DamagedError:
        record = None
    (root / record_name(index)).unlink(missing_ok=True)
    sync_directory(root / COMMITS)
    if record is not None:
        folder = root / record.path
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)


def _listing(root: Path, manifest: Manifest) -> tuple[list[int], list[tuple[str, Finding]]]:
    """Committed shards of the plan, and the names of records that belong to none."""
    present, strays = [], []
    committed(root)  # that there is a directory of records
    for name in sorted(entry.name for entry in (root / COMMITS).iterdir()):
        match = _RECORD_LIKE.fullmatch(name)
        if match is None:
            continue
        index = int(match[1])
        if index < manifest.shards and name == Path(record_name(index)).name:
            present.append(index)
            continue
        what = f"{COMMITS}/{name} is a record of no shard: the plan has {manifest.shards}"
        remedy = f"`verify --repair` or delete {COMMITS}/{name}"
        strays.append((name, Finding(shard=None, kind="stray", what=what, remedy=remedy, recompute=False)))
    return sorted(present), strays


def _gaps(present: list[int], shards: int) -> tuple[tuple[int, int], ...]:
    """Runs of indices below `shards` that are not in `present`, which ascends."""
    edges = [-1, *present, shards]
    return tuple((left + 1, right) for left, right in pairwise(edges) if right > left + 1)


def _index(root: Path, manifest: Manifest, present: list[int]) -> list[Finding]:
    """Whether index.arrow, where there is one, can mislead a reader that trusts it. (Behind the records it may be.)"""
    try:
        size = (root / INDEX_NAME).stat().st_size
    except FileNotFoundError:
        return []
    try:
        if size > MAX_INDEX_BYTES:
            raise FormatError(f"{INDEX_NAME} holds {size:,} bytes, wanted at most {MAX_INDEX_BYTES:,}")
        gone = set(Index(pa.memory_map(str(root / INDEX_NAME)).read_buffer(), manifest).shards.tolist()) - set(present)
        what = f"{INDEX_NAME} names shard {min(gone)}, which has no record" if gone else None
    except (FormatError, OSError) as error:
        what = str(error)
    remedy = f"`verify --repair` or delete {INDEX_NAME}: it is a copy of the records and can be made again"
    return [] if what is None else [Finding(shard=None, kind="index", what=what, remedy=remedy, recompute=False)]


def _spread(manifest: Manifest, present: list[int], sample: int) -> dict[int, list[int]]:
    """`sample` sequences, evenly spread, as numbers within their shards."""
    ends = np.cumsum([stop - start for start, stop in map(manifest.shard_range, present)], dtype=np.int64)
    total = int(ends[-1]) if present else 0
    chosen: dict[int, list[int]] = {}
    for number in np.unique(np.linspace(0, total - 1, min(sample, total)).astype(np.int64)):
        place = int(np.searchsorted(ends, number, side="right"))
        chosen.setdefault(present[place], []).append(int(number - (ends[place - 1] if place else 0)))
    return chosen
