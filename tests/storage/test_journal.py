"""Journals of shards in hand: what comes back is what was appended, from files that end, change and come from anywhere."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from stillroom.storage import journal as journal_module
from stillroom.storage.cache import open_cache
from stillroom.storage.journal import PARTIAL, Journals, journals_at
from stillroom.storage.journal_records import header
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets
from stillroom.storage.verify import verify
from stillroom.storage.writer import CacheWriter

FIELDS = ("offsets", "ids", "weights", "label_logp", "entropy", "logp")
L = 4
HEAD_BYTES, RECORD_HEAD_BYTES = 52, 16


@pytest.fixture
def plan(made):
    """Two shards of six sequences of four rows."""
    return made.manifest(SamplerSpec(draws=8), vocab_size=300, seq_len=L, sequences=12, sequences_per_shard=6)


@pytest.fixture
def shard(made, plan):
    """Targets of each of the six sequences of shard 1."""
    targets = made.shard_data(plan, 1)[1]
    return [targets.slice_rows(i * L, (i + 1) * L) for i in range(6)]


def append(journals: Journals, sequences: list[SparseTargets], first: int, stop: int, *, bad_rows: int = 0) -> None:
    with journals.begin(1, first) as journal:
        for number in range(first, stop):
            journal.append(1, sequences[number], bad_rows)


def check(taken: list, sequences: list[SparseTargets]) -> int:
    """What was taken up are the first sequences, to the bit; how many."""
    for number, kept in enumerate(taken):
        assert (kept.first, kept.sequences) == (number, 1)
        for field in FIELDS:
            mine, theirs = getattr(kept.targets, field), getattr(sequences[number], field)
            assert mine.dtype == theirs.dtype
            assert mine.tobytes() == theirs.tobytes(), field
    return len(taken)


def test_attempts_are_put_together(plan, shard, tmp_path) -> None:
    journals = Journals(tmp_path / "p", plan)
    assert journals.take_up(1, bad_rows=True) == []
    assert not (tmp_path / "p").exists()
    append(journals, shard, 0, 2)
    append(journals, shard, 0, 1)  # two at once did the same
    append(journals, shard, 2, 4)
    append(journals, shard, 5, 6)  # of no use without sequence 4
    assert check(journals.take_up(1, bad_rows=True), shard) == 4
    append(journals, shard, 3, 5)
    assert check(journals.take_up(1, bad_rows=True), shard) == 6
    assert journals.take_up(0, bad_rows=True) == []


@pytest.mark.parametrize("name", ["threshold", "head only", "random", "random, log p", "importance", "top_k", "top_p"])
def test_every_sampler_and_rows_that_keep_nothing(name, made, tmp_path) -> None:
    plan = made.manifest(made.SPECS[name])
    tokens, targets, rounding = made.shard_data(plan, 1)
    targets.label_logp[5], targets.entropy[5] = np.nan, np.nan  # an empty row of a masked sequence
    journals = Journals(tmp_path, plan)
    with journals.begin(1, 0) as journal:
        journal.append(2, targets.slice_rows(0, 32), 7)
        journal.append(1, targets.slice_rows(32, 48), 0)
    taken = journals.take_up(1, bad_rows=True)
    assert [(kept.sequences, kept.bad_rows) for kept in taken] == [(2, 7), (1, 0)]
    assert journals.take_up(1, bad_rows=False) == []
    one, other = CacheWriter(tmp_path / "a", plan), CacheWriter(tmp_path / "b", plan)
    ours = SparseTargets.concat([kept.targets for kept in taken])
    assert one.write_shard(1, tokens, ours, rounding).objects == other.write_shard(1, tokens, targets, rounding).objects


def test_any_end_and_any_flipped_byte(plan, shard, tmp_path) -> None:
    journals = Journals(tmp_path, plan)
    append(journals, shard, 0, 2)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    ends = [HEAD_BYTES]
    for sequence in shard[:2]:
        ends.append(ends[-1] + RECORD_HEAD_BYTES + 12 * (L + sequence.entries) + 4)
    assert ends[-1] == len(data)
    for length in range(len(data)):
        file.write_bytes(data[:length])
        assert check(journals.take_up(1, bad_rows=True), shard) == sum(end <= length for end in ends[1:])
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        whole = sum(end <= place for end in ends[1:]) if place >= HEAD_BYTES else 0
        assert check(journals.take_up(1, bad_rows=True), shard) == whole, place


def forged(head: bytes, *arrays: np.ndarray) -> bytes:
    data = head + b"".join(array.tobytes() for array in arrays)
    return data + google_crc32c.value(data).to_bytes(4, "little")


def changed(sequence: SparseTargets, **values: float) -> bytes:
    """A record of this sequence with the first number of some arrays set, its checksum right."""
    arrays = {"n": np.diff(sequence.offsets).astype("<u4")}
    arrays |= {name: getattr(sequence, name).copy() for name in ("label_logp", "entropy", "ids", "weights", "logp")}
    for name, value in values.items():
        arrays[name][0] = value
    return forged(struct.pack("<IIQ", 1, 0, sequence.entries), *arrays.values())


def test_forged_files_are_passed_over(plan, shard, made, tmp_path, caplog) -> None:
    """With every checksum right."""
    sound = changed(shard[0])
    other = made.manifest(SamplerSpec(draws=9), vocab_size=300, seq_len=L, sequences=12, sequences_per_shard=6)
    one = shard[0]
    assert one.offsets[1] > 1
    hostile = {
        "another run": header(other, 1, 0) + sound,
        "another shard": header(plan, 0, 0) + sound,
        "beyond the end": header(plan, 1, 6) + sound,
        "far beyond": header(plan, 1, 2**32 - 1) + sound,
        "id too large": header(plan, 1, 0) + changed(one, ids=300),
        "id negative": header(plan, 1, 0) + changed(one, ids=-1),
        "id twice": header(plan, 1, 0) + changed(one, ids=int(one.ids[1])),
        "weight negative": header(plan, 1, 0) + changed(one, weights=-0.5),
        "weight infinite": header(plan, 1, 0) + changed(one, weights=np.inf),
        "weight no number": header(plan, 1, 0) + changed(one, weights=np.nan),
        "no probability": header(plan, 1, 0) + changed(one, logp=400.0),
        "log p no number": header(plan, 1, 0) + changed(one, logp=np.nan),
        "counts that do not add up": header(plan, 1, 0) + changed(one, n=int(one.offsets[1]) + 1),
        "counts that wrap": header(plan, 1, 0) + changed(one, n=2**32 - 1),
        "no sequences": header(plan, 1, 0) + forged(struct.pack("<IIQ", 0, 0, 0)),
        "more sequences than there are": header(plan, 1, 0) + forged(struct.pack("<IIQ", 7, 0, 0), np.zeros(7 * L * 3, "<u4")),
        "more bad rows than rows": header(plan, 1, 0) + forged(struct.pack("<IIQ", 1, L + 1, 0), np.zeros(L * 3, "<u4")),
        "more entries than a row may have": header(plan, 1, 0) + forged(struct.pack("<IIQ", 1, 0, 2**62), np.zeros(L, "<u4")),
        "sizes of no file": header(plan, 1, 0) + struct.pack("<IIQ", 6, 0, 6 * 32),
        "nothing": b"",
    }  # fmt: skip
    journals = Journals(tmp_path, plan)
    for number, (name, data) in enumerate(hostile.items()):
        file = tmp_path / f"000001-{number:016x}.journal"
        file.write_bytes(data)
        assert journals.take_up(1, bad_rows=True) == [], name
    (tmp_path / f"000001-{99:016x}.journal").write_bytes(header(plan, 1, 0) + sound)
    assert check(journals.take_up(1, bad_rows=True), shard) == 1  # beside all of them
    assert "rows that were not sampled" in caplog.text


def test_what_is_no_file_is_passed_over(plan, shard, tmp_path) -> None:
    """A pipe would keep us waiting, a link lead anywhere."""
    append(Journals(tmp_path / "elsewhere", plan), shard, 0, 6)
    (real,) = (tmp_path / "elsewhere").iterdir()
    folder = tmp_path / "p"
    folder.mkdir()
    os.mkfifo(folder / f"000001-{0:016x}.journal")
    (folder / f"000001-{1:016x}.journal").symlink_to(real)
    (folder / f"000001-{2:016x}.journal").mkdir()
    (folder / "000001-notes.journal").write_bytes(real.read_bytes())
    journals = Journals(folder, plan)
    assert journals.take_up(1, bad_rows=True) == []
    assert journals.indices() == {1}


def test_a_commit_takes_them_away_and_disturbs_nobody(plan, shard, made, tmp_path) -> None:
    tokens, targets, rounding = made.shard_data(plan, 1)
    writer, slow = CacheWriter(tmp_path / "c", plan), CacheWriter(tmp_path / "c", plan)
    append(writer.journals, shard, 0, 6)
    with slow.journals.begin(1, 0) as journal, writer.journals.begin(0, 0) as other:
        journal.append(1, shard[0], 0)
        other.append(1, made.shard_data(plan, 0)[1].slice_rows(0, L), 0)
        writer.write_shard(1, tokens, targets, rounding)
        assert writer.journals.indices() == {0}
        journal.append(1, shard[1], 0)  # goes nowhere, and does no harm
    slow.write_shard(1, tokens, targets, rounding)
    assert not verify(tmp_path / "c", hashes=True).findings
    assert len(open_cache(tmp_path / "c", partial=True)) == 6
    writer.write_shard(0, *made.shard_data(plan, 0))
    assert not (tmp_path / "c" / PARTIAL).exists()
    append(writer.journals, shard, 0, 6)  # as of a writer that was killed right after its commit
    assert CacheWriter(tmp_path / "c", plan).journals.indices() == set()


def test_without_room_there_is_none(plan, shard, tmp_path, monkeypatch, caplog) -> None:
    usage = journal_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(journal_module.shutil, "disk_usage", lambda path: usage._replace(free=4000))
    journals = Journals(tmp_path / "p", plan)
    append(journals, shard, 0, 3)
    append(journals, shard, 0, 3)
    assert caplog.text.count("no journal of the shard in hand is kept") == 1
    assert not list((tmp_path / "p").iterdir())


def test_of_a_cache_in_a_store(plan, shard, tmp_path, monkeypatch, caplog) -> None:
    """In the temporary directory, where others write too: a folder that is not this user's alone is not used."""
    from obstore.store import MemoryStore

    from stillroom.storage.remote.bucket import Bucket

    monkeypatch.setattr(journal_module.tempfile, "tempdir", str(tmp_path))
    journals = journals_at(Bucket("memory://c", store=MemoryStore()), plan)
    append(journals, shard, 0, 3)
    assert journals.folder.parent == tmp_path
    assert plan.identity[:32] in journals.folder.name
    assert journals.folder.stat().st_mode & 0o777 == 0o700
    assert check(journals.take_up(1, bad_rows=True), shard) == 3
    journals.folder.chmod(0o777)
    assert journals.take_up(1, bad_rows=True) == []
    append(journals, shard, 0, 3)
    assert "must be this user's" in caplog.text
    journals.folder.chmod(0o700)
    journals.clear([1])
    journals.folder.symlink_to(tmp_path / "elsewhere")
    assert journals.take_up(1, bad_rows=True) == []
    assert Path(journals.folder).is_symlink()
