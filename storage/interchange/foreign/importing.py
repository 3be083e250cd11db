"""`import_foreign`: another tool's cache to one of ours, of sampler `top_k`, looked through once and then written.

The first pass reads and checks everything and writes nothing: a broken file leaves no trace. The second makes the shards, each
committed as it comes; called again it passes over those that are there. Both hold a few sequences and one shard at a time.

Shapes: `B` sequences, `S` sequences of a shard, `L` rows of a sequence.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from stillroom.storage.errors import InputError
from stillroom.storage.interchange.foreign.came import Came, Rules, ends
from stillroom.storage.interchange.foreign.files import content_digest, find_files
from stillroom.storage.interchange.foreign.rows import Found, settle
from stillroom.storage.manifest import (
    IMPORTED,
    MAX_SEQ_LEN,
    MAX_SEQUENCES_PER_SHARD,
    SEPARATE,
    CorpusInfo,
    Manifest,
    PackingInfo,
    TeacherInfo,
    TokenizerInfo,
)
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets
from stillroom.storage.writer import CacheWriter

SHARD_ROWS: Final = 1 << 16  # of a shard where nothing is said
UNKNOWN: Final = "unknown"
Rounding = Callable[[npt.NDArray[np.int64], int], npt.NDArray[np.float64]]


class Reader(Protocol):
    """One foreign format."""

    def settings(self) -> dict[str, Any]:
        """What decides what the files mean, besides their bytes."""

    def read(self, files: tuple[Path, ...]) -> Iterator[Came]:
        """Sequences of the files, in order, some at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What the files do not say, and the user does.

    Attributes:
        format: name of the format.
        teacher: name of the teacher.
        tokenizer: whose ids these are.
        vocab_size: of the teacher; every id is below it.
        pad_id: token that fills sequences up; its rows have no target.
        seq_len: rows kept of each sequence; None: those of the longest.
        sequences_per_shard: None: so many as have about 65,536 rows.
        libraries, created: as in a manifest.
    """

    format: str
    teacher: str
    tokenizer: TokenizerInfo
    vocab_size: int
    pad_id: int
    seq_len: int | None
    sequences_per_shard: int | None
    libraries: dict[str, str]
    created: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignResult:
    """What `import_foreign` did and found.

    Attributes:
        out: the cache.
        shards: of the cache, `shards_before` of them were there already.
        sequences, rows: in the whole cache, rows that fill up included.
        targets: rows with entries.
        entries_per_target: mean.
        draws: entries of the longest.
        kept_mass: mean probability the targets hold; `most_mass`: the highest one came with.
        scaled: targets that held more than 1 and were scaled to it.
        zeros: entries of probability 0 that were left out.
        labels_known: share of targets that hold their label, and so know its log-probability.
        labels_known_shifted: the same if every list belonged one token earlier, and one later.
        rows_cut: rows beyond `seq_len`; lists_last: lists about what follows a sequence's last token. Neither is kept.
        fingerprint: of teacher, as the manifest has it.
        seconds: it took.
    """

    out: str
    shards: int
    shards_before: int
    sequences: int
    rows: int
    targets: int
    entries_per_target: float
    draws: int
    kept_mass: float
    most_mass: float
    scaled: int
    zeros: int
    labels_known: float
    labels_known_shifted: tuple[float, float]
    rows_cut: int
    lists_last: int
    fingerprint: str
    seconds: float

    @property
    def already_done(self) -> bool:
        """Whether there was nothing to do."""
        return self.shards == self.shards_before


def import_foreign(
    source: Path,
    out: Path,
    reader: Reader,
    rules: Rules,
    origin: Origin,
    rounding: Rounding,
    *,
    add_tokenizer: Callable[[CacheWriter], None] = lambda writer: None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> ForeignResult:
    """Make a cache from another tool's files; called again it goes on where it stopped.

    Args:
        source: file or folder.
        out: directory of the cache: new, or of the same import.
        reader: of the format.
        rules: what its lists mean.
        origin: what else the user says.
        rounding: uniforms for the sequences of these numbers, `[S * L, 3]`, as `CacheWriter.write_shard` wants them.
        add_tokenizer: puts the tokenizer into the cache.
        on_progress: told (stage, done, total): sequences looked through (total 0: unknown), then shards.

    Raises:
        InputError: a file that can not be read or holds what it can not hold; nothing is written then.
        PlanMismatchError: `out` belongs to another run.
    """
    started, files = time.monotonic(), find_files(source)
    settings = {"format": origin.format, **reader.settings(), **asdict(rules)}
    digest = content_digest(files, settings)
    found, corpus, cut = _look(files, reader, rules, origin.seq_len, on_progress)
    manifest = _manifest(source, origin, found, digest, corpus)
    writer = CacheWriter(out, manifest)
    add_tokenizer(writer)
    before = {index for index in writer.committed() if index < manifest.shards}
    done = 0
    for index, parts in _shards(manifest, reader.read(files), before):
        tokens_SL1, targets = _padded(manifest, parts, rules, origin.pad_id)
        first, stop = manifest.shard_range(index)
        writer.write_shard(index, tokens_SL1, targets, rounding(np.arange(first, stop), manifest.packing.seq_len))
        done += 1
        on_progress("write", done, manifest.shards - len(before))
    if len(before) + done != manifest.shards:
        raise InputError(f"{source} changed while it was imported: import it again, into a new directory")
    return ForeignResult(
        out=str(out),
        shards=manifest.shards,
        shards_before=len(before),
        sequences=manifest.sequences,
        rows=manifest.sequences * manifest.packing.seq_len,
        targets=found.targets,
        entries_per_target=found.entries / found.targets,
        draws=found.most,
        kept_mass=found.mass / found.targets,
        most_mass=found.most_mass,
        scaled=found.scaled,
        zeros=found.zeros,
        labels_known=found.labelled / found.targets,
        labels_known_shifted=(found.hit_rate(-1), found.hit_rate(1)),
        rows_cut=cut,
        lists_last=found.last,
        fingerprint=manifest.teacher.fingerprint,
        seconds=time.monotonic() - started,
    )


def _look(
    files: tuple[Path, ...],
    reader: Reader,
    rules: Rules,
    seq_len: int | None,
    on_progress: Callable[[str, int, int], None],
) -> tuple[Found, str, int]:
    """What the files hold, a digest of their tokens, and how many rows lie beyond `seq_len`."""
    found, cut = Found(), 0
    lengths, tokens = hashlib.sha256(), hashlib.sha256()  # apart: batches may be cut anywhere
    for came in reader.read(files):
        settle(came, rules, found)
        lengths.update(came.tokens_B.astype("<i8").tobytes())
        tokens.update(came.tokens_T.astype("<i8").tobytes())
        if seq_len is not None:
            cut += int(np.maximum(came.tokens_B - 1 - seq_len, 0).sum())
        on_progress("look", found.sequences, 0)
    if found.targets == 0:
        raise InputError(f"{files[0]} and the files beside it hold no target: every list is empty or masked")
    return found, hashlib.sha256(lengths.digest() + tokens.digest()).hexdigest(), cut


def _manifest(source: Path, origin: Origin, found: Found, digest: str, corpus: str) -> Manifest:
    seq_len = origin.seq_len or found.longest
    if seq_len > MAX_SEQ_LEN:
        raise InputError(f"a sequence has {seq_len:,} rows, wanted at most {MAX_SEQ_LEN:,}: cut them with --seq-len")
    per_shard = origin.sequences_per_shard or min(max(1, SHARD_ROWS // seq_len), MAX_SEQUENCES_PER_SHARD)
    return Manifest(
        teacher=TeacherInfo(
            name=origin.teacher,
            revision=None,
            fingerprint=IMPORTED + digest,
            vocab_size=origin.vocab_size,
            dtype=UNKNOWN,
        ),
        tokenizer=origin.tokenizer,
        corpus=CorpusInfo(name=str(source), fingerprint=corpus, documents=found.sequences, tokens=found.tokens),
        packing=PackingInfo(policy=SEPARATE, seq_len=seq_len),
        sampler=SamplerSpec(kind="top_k", draws=found.most),
        vocab_size=origin.vocab_size,
        sequences=found.sequences,
        sequences_per_shard=per_shard,
        libraries={**origin.libraries, "imported from": origin.format},
        created=origin.created,
    )


def _shards(manifest: Manifest, stream: Iterator[Came], before: set[int]) -> Iterator[tuple[int, list[Came]]]:
    """The sequences of every shard that is missing."""
    parts: list[Came] = []
    at = 0
    for came in stream:
        start = 0
        while start < came.sequences and at < manifest.sequences:
            index = at // manifest.sequences_per_shard
            stop = min(came.sequences, start + manifest.shard_range(index)[1] - at)
            if index not in before:
                parts.append(came.part(start, stop))
            at, start = at + stop - start, stop
            if at == manifest.shard_range(index)[1] and parts:
                yield index, parts
                parts = []


def _padded(
    manifest: Manifest, parts: list[Came], rules: Rules, pad_id: int
) -> tuple[npt.NDArray[np.uint32], SparseTargets]:
    """Tokens and targets of the sequences of a shard, each cut or filled up to `L` rows."""
    seq_len = manifest.packing.seq_len
    tokens: list[npt.NDArray[np.uint32]] = []
    targets: list[SparseTargets] = []
    for came in parts:
        tokens.append(_tokens(came, seq_len, pad_id))
        targets.append(_rows(came, settle(came, rules, Found()), seq_len))
    return np.concatenate(tokens), SparseTargets.concat(targets)


def _tokens(came: Came, seq_len: int, pad_id: int) -> npt.NDArray[np.uint32]:
    tokens_BL1 = np.full((came.sequences, seq_len + 1), pad_id, np.uint32)
    place_T = np.arange(len(came.tokens_T)) - np.repeat(ends(came.tokens_B)[:-1], came.tokens_B)
    kept_T = place_T <= seq_len
    number_T = np.repeat(np.arange(came.sequences), came.tokens_B)
    tokens_BL1[number_T[kept_T], place_T[kept_T]] = came.tokens_T[kept_T]
    return tokens_BL1


def _rows(came: Came, settled: SparseTargets, seq_len: int) -> SparseTargets:
    rows_B = came.tokens_B - 1
    place_R = np.arange(settled.rows) - np.repeat(ends(rows_B)[:-1], rows_B)
    new_R = place_R + np.repeat(np.arange(came.sequences) * seq_len, rows_B)
    kept_R = place_R < seq_len
    n_R = np.diff(settled.offsets)
    kept_E = np.repeat(kept_R, n_R)
    many, label_logp = (
        np.zeros(came.sequences * seq_len, np.int64),
        np.full(came.sequences * seq_len, np.nan, np.float32),
    )
    many[new_R[kept_R]], label_logp[new_R[kept_R]] = n_R[kept_R], settled.label_logp[kept_R]
    assert settled.logp is not None
    return SparseTargets(
        offsets=ends(many),
        ids=settled.ids[kept_E],
        weights=settled.weights[kept_E],
        label_logp=label_logp,
        entropy=np.full(len(many), np.nan, np.float32),
        logp=settled.logp[kept_E],
    )
