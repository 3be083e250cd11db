"""One committed shard, looked at from the outside in: its record, its files, their metadata, their rows.

Shapes: `B` sequences of a block, `L1` = L + 1 tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.storage.commits import CommitRecord, load_record
from stillroom.storage.decode import decode_rows
from stillroom.storage.encode import EncodedRows
from stillroom.storage.errors import DamagedError
from stillroom.storage.inspect_files import (
    Finding,
    Kind,
    check_files,
    check_hashes,
    check_metadata,
    redo,
    unknown_files,
)
from stillroom.storage.invariants import first_problem
from stillroom.storage.layout import Widths, padded
from stillroom.storage.manifest import CONCAT, DOCUMENTS, Manifest
from stillroom.storage.raw import blocks_of, decodable, read_block
from stillroom.storage.readers import DirectReader
from stillroom.storage.targets import SparseTargets

Array = npt.NDArray[Any]


@dataclass(slots=True)
class ShardCheck:
    """What was found in one shard: findings, sequences decoded, bytes hashed, first and last token where readable."""

    record: CommitRecord | None = None
    findings: list[Finding] = field(default_factory=list)
    sequences: int = 0
    hashed_bytes: int = 0
    edges: tuple[int, int] | None = None


def inspect_shard(
    root: Path, manifest: Manifest, index: int, *, hashes: bool, sequences: Iterable[int] | None = None
) -> ShardCheck:
    """Check shard `index`; a file that is missing or cut ends it before anything is decoded.

    Args:
        root: directory of the cache.
        manifest: of the cache.
        index: of the shard.
        hashes: compare every file with its SHA-256 too.
        sequences: decode only these, counted within the shard; None decodes all.

    Raises:
        FormatError: a newer version wrote the record.
        PermissionError: a file may not be read.
    """
    check = ShardCheck()

    def found(kind: Kind, what: str) -> None:
        check.findings.append(Finding(shard=index, kind=kind, what=what, remedy=redo(index)))

    try:
        check.record = record = load_record(root, manifest, index)
    except DamagedError as error:
        found("record", error.what or str(error))
        return check
    for kind, what in check_files(root, record):
        found(kind, what)
    check.findings += unknown_files(root, record)
    if not any(finding.recompute for finding in check.findings):
        if hashes:
            for kind, what in check_hashes(root, record):
                found(kind, what)
            check.hashed_bytes = record.size_bytes
        for kind, what in check_metadata(root, manifest, record):
            found(kind, what)
        try:
            reader = DirectReader(root, manifest, record)
            spans = blocks_of(0, record.sequences, manifest.packing.seq_len)
            spans = spans if sequences is None else ((one, one + 1) for one in sequences)
            for kind, what in _rows(reader, manifest, spans, check, whole=sequences is None):
                found(kind, what)
            check.edges = (_ends(reader, 0)[0], _ends(reader, record.sequences - 1)[1])
        except DamagedError as error:
            found("decode", error.what or str(error))
    return check


def _rows(
    reader: DirectReader, manifest: Manifest, spans: Iterable[tuple[int, int]], check: ShardCheck, *, whole: bool
) -> Iterator[tuple[Kind, str]]:
    """The first row that can not be; then whether the record counts what is there."""
    record, entries, widest = reader.record, 0, dict.fromkeys(("entry", "head", "tail"), 0)
    last_stop, last_token = -1, 0
    for start, stop in spans:
        block = read_block(reader, manifest, start, stop)
        targets = _decoded(reader, manifest, block, start, stop)
        check.sequences += stop - start
        if problem := first_problem(manifest, block, targets):
            yield "rows", f"sequence {record.start + start + problem.sequence}: {problem.what}"
            return
        firsts, lasts = _seams(block.arrays["tokens"], block.arrays.get("starts"), stop - start)
        if manifest.packing.policy in (CONCAT, DOCUMENTS):
            before = np.append(last_token if start == last_stop else int(firsts[0]), lasts[:-1])
            broken = np.flatnonzero(firsts != before)
            if broken.size:
                number = record.start + start + int(broken[0])
                yield "chain", f"sequence {number} does not start with the last token of sequence {number - 1}"
                return
        last_stop, last_token = stop, int(lasts[-1])
        entries += targets.entries
        for run in widest:
            widest[run] = max(widest[run], int(block.lengths[run].max()))
    if whole and entries != record.entries:
        yield "totals", f"it holds {entries:,} entries, its record says {record.entries:,}"
    elif whole and record.widths != Widths(**{run: padded(width) for run, width in widest.items()}):
        yield "totals", f"its widest sequences are {widest}, its record says {record.widths}"


def _seams(tokens: Array, starts: Array | None, sequences: int) -> tuple[Array, Array]:
    """First and last token of every sequence; where documents are told apart, with the mark of a beginning above its bits."""
    seams = tokens.astype(np.int64)
    if starts is not None:
        seams |= starts.astype(np.int64) << 32
    seams_BL1 = seams.reshape(sequences, -1)
    return seams_BL1[:, 0], seams_BL1[:, -1]


def _ends(reader: DirectReader, sequence: int) -> tuple[int, int]:
    starts = reader.chunk("starts", sequence) if "starts" in reader.arrays else None
    first, last = _seams(reader.chunk("tokens", sequence), starts, 1)
    return int(first[0]), int(last[0])


def _decoded(reader: DirectReader, manifest: Manifest, block: EncodedRows, start: int, stop: int) -> SparseTargets:
    """What a block decodes to; if it does not, the complaint names the first sequence that is to blame."""
    try:
        return decode_rows(manifest.sampler, manifest.vocab_size, decodable(block), logp=True)
    except DamagedError as error:
        for one in range(start, stop):
            try:
                alone = read_block(reader, manifest, one, one + 1)
                decode_rows(manifest.sampler, manifest.vocab_size, decodable(alone), logp=True)
            except DamagedError as its_own:
                raise DamagedError(f"sequence {reader.record.start + one}: {its_own.what or its_own}") from error
        raise
