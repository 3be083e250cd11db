"""`verify` names every kind of damage and its shard; `--repair` drops just those, and the writer makes them again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from storage_made import SPECS  # made.py, by way of conftest

from stillroom.storage import strict
from stillroom.storage.cache import open_cache
from stillroom.storage.chunks import decode_chunk, encoder
from stillroom.storage.errors import CacheError, FormatError, InputError, NotACacheError
from stillroom.storage.index import write_index
from stillroom.storage.inspect_files import file_hash
from stillroom.storage.layout import arrays_of
from stillroom.storage.manifest import Manifest
from stillroom.storage.verify import verify
from stillroom.storage.writer import CacheWriter

SHARDS, PER_SHARD = 3, 3


def plan(made, name: str, profile: str = "standard"):
    return made.manifest(
        SPECS[name], vocab_size=70_000, sequences=SHARDS * PER_SHARD, sequences_per_shard=PER_SHARD, profile=profile
    )


@pytest.fixture(scope="module")
def caches(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    for name in ("threshold", "random", "top_k"):
        made.write(root / name, plan(made, name))
    for profile in ("fast", "small"):
        made.write(root / profile, plan(made, "threshold", profile))
    return root


@pytest.fixture
def copy(caches, tmp_path) -> Callable[..., Path]:
    def make(name: str = "threshold") -> Path:
        shutil.copytree(caches / name, tmp_path / name, dirs_exist_ok=True)
        return tmp_path / name

    return make


def record_of(root: Path, index: int) -> dict:
    return json.loads((root / f"commits/{index:06d}.json").read_text())


def folder_of(root: Path, index: int) -> Path:
    return root / record_of(root, index)["path"]


def put_record(root: Path, index: int, **changes) -> None:
    """Change a record as a forger would, its own seal made anew."""
    record = strict.sealed({**record_of(root, index), **changes})
    (root / f"commits/{index:06d}.json").write_text(strict.dumps(record))


def forge(root: Path, index: int, array: str, change: Callable[[list], list | None], *, hashes: bool = True) -> None:
    """Replace the chunks of one array; index, CRC and the record's size (and hash) are made to fit."""
    folder, (spec,) = folder_of(root, index), [a for a in arrays_of(Manifest.load(root)) if a.name == array]
    path = next((folder / array / "c").rglob("0/0/0"), None) or folder / array / "c/0/0"
    data = path.read_bytes()
    table = np.frombuffer(data[-4 - 16 * spec.chunks(PER_SHARD) : -4], "<u8").reshape(-1, 2)
    shape = json.loads((folder / array / "zarr.json").read_text())["shape"]
    many = int(np.prod(shape[1:]))
    chunks = [
        decode_chunk(spec.codec, memoryview(data)[int(o) : int(o + n)], spec.dtype, many).copy() for o, n in table
    ]
    before = [chunk.tobytes() for chunk in chunks]
    chunks = change(chunks) or chunks
    assert [chunk.tobytes() for chunk in chunks] != before, "the forgery changes nothing"
    encoded = [encoder(spec.codec)(chunk) for chunk in chunks]
    ends = np.cumsum([len(x) for x in encoded])
    new = np.stack([ends - [len(x) for x in encoded], [len(x) for x in encoded]], 1).astype("<u8").tobytes()
    path.write_bytes(b"".join(encoded) + new + google_crc32c.value(new).to_bytes(4, "little"))
    objects = record_of(root, index)["objects"]
    for item in objects:
        if item["name"] == str(path.relative_to(folder)):
            item["size_bytes"] = path.stat().st_size
            if hashes:
                item["sha256"] = file_hash(path)
    put_record(root, index, objects=objects)


def files(root: Path, index: int) -> dict[str, bytes]:
    folder = folder_of(root, index)
    inside = {str(p.relative_to(root)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return inside | {"record": (root / f"commits/{index:06d}.json").read_bytes()}


@pytest.mark.parametrize("profile", ["standard", "fast", "small"])
@pytest.mark.parametrize("name", SPECS)
def test_every_sampler_is_sound(made, tmp_path, name, profile):
    manifest = made.manifest(SPECS[name], profile=profile)
    made.write(tmp_path, manifest)
    seen = []
    report = verify(tmp_path, hashes=True, on_progress=lambda done, total: seen.append((done, total)))
    assert report.findings == ()
    assert report.sound
    assert report.exit_status == 0
    assert (report.shards, report.committed, report.missing) == (2, 2, ())
    assert (report.sequences, report.rows) == (6, 96)
    assert report.hashed_bytes == sum(open_cache(tmp_path).record(i).size_bytes for i in (0, 1))
    assert seen == [(1, 2), (2, 2)]


def truncate(root):
    path = folder_of(root, 1) / "id_lo/c/0/0"
    path.write_bytes(path.read_bytes()[:-1])


def empty(root):
    (folder_of(root, 1) / "zarr.json").write_bytes(b"")


def flip(root):
    path = folder_of(root, 1) / "tokens/c/0/0"
    data = bytearray(path.read_bytes())
    data[20] ^= 4
    path.write_bytes(data)


def flip_metadata(root):
    path = folder_of(root, 1) / "n/zarr.json"
    text = path.read_text()
    path.write_text(text.replace('"level": 1', '"level": 3'))
    assert path.read_text() != text


def missing_object(root):
    (folder_of(root, 1) / "n/c/0/0").unlink()


def missing_folder(root):
    shutil.rmtree(folder_of(root, 1))


def malformed_record(root):
    path = root / "commits/000001.json"
    path.write_text(path.read_text()[:-20])


def flipped_record(root):
    path = root / "commits/000001.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0', 1))


def record_of_another(root):
    shutil.copy(root / "commits/000000.json", root / "commits/000001.json")


def record_counts_more(root):
    put_record(root, 1, entries=record_of(root, 1)["entries"] + 1)


def record_is_wider(root):
    widths = record_of(root, 1)["widths"]
    put_record(root, 1, widths={**widths, "tail": widths["tail"] + 8})


def link_out(root):
    path = folder_of(root, 1) / "n/c/0/0"
    outside = root.parent / "secret"
    shutil.move(path, outside)
    path.symlink_to(outside)


DAMAGE = {
    truncate: ("size", "id_lo/c/0/0 holds"),
    empty: ("size", "zarr.json holds 0 bytes"),
    flip: ("decode", "sequence 0 of tokens does not decode"),
    flip_metadata: ("metadata", "n/zarr.json does not say what the format demands"),
    missing_object: ("missing", "n/c/0/0 cannot be opened"),
    missing_folder: ("missing", "its folder shards/000001-"),
    malformed_record: ("record", "damaged JSON"),
    flipped_record: ("record", "impossible size or hash|its own checksum says"),
    record_of_another: ("record", "names shard 0"),
    record_counts_more: ("totals", "entries, its record says"),
    record_is_wider: ("metadata", "tail"),
    link_out: ("link", "leads out of the cache"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_repaired(made, copy, damage):
    root = copy()
    good = files(root, 0), files(root, 2)
    bytes_before = {item["name"]: item["sha256"] for item in record_of(root, 1)["objects"]}
    damage(root)
    kind, words = DAMAGE[damage]
    report = verify(root, hashes=damage is not flip)
    assert not report.sound
    assert report.exit_status == 1
    assert report.dropped == ()
    assert {finding.shard for finding in report.findings} == {1}
    assert kind in {finding.kind for finding in report.findings}
    assert any(re.search(words, finding.what) for finding in report.findings), report.findings
    assert all("only this shard is redone" in finding.remedy for finding in report.findings)

    repaired = verify(root, repair=True)
    assert repaired.dropped == (1,)
    assert not (root / "commits/000001.json").exists()
    assert (files(root, 0), files(root, 2)) == good
    left = verify(root, hashes=True)
    assert left.sound
    assert left.missing == ((1, 2),)

    writer = CacheWriter(root, plan(made, "threshold"))
    assert writer.committed() == {0, 2}
    writer.write_shard(1, *made.shard_data(writer.manifest, 1))
    whole = verify(root, hashes=True)
    assert whole.sound
    assert whole.missing == ()
    assert {item["name"]: item["sha256"] for item in record_of(root, 1)["objects"]} == bytes_before


def test_repair_does_not_follow_a_record_to_another_shard(copy):
    root = copy()
    good = files(root, 0)
    record_of_another(root)
    verify(root, repair=True)
    assert files(root, 0) == good


def test_swapped_shards(copy):
    root = copy()
    first, second = folder_of(root, 0), folder_of(root, 1)
    first.rename(root / "aside")
    second.rename(first)
    (root / "aside").rename(second)
    report = verify(root)
    assert {finding.shard for finding in report.findings} == {0, 1}
    assert {finding.kind for finding in report.findings} <= {"size", "metadata"}
    assert verify(root, repair=True).dropped == (0, 1)
    assert verify(root).missing == ((0, 2),)


def test_a_file_too_many_is_a_finding_but_no_reason_to_recompute(copy):
    root = copy()
    (folder_of(root, 1) / "n/notes.txt").write_text("hello")
    before = files(root, 1)
    report = verify(root, repair=True)
    (finding,) = report.findings
    assert (finding.shard, finding.kind, finding.recompute) == (1, "unknown", False)
    assert "n/notes.txt" in finding.what
    assert report.dropped == ()
    assert files(root, 1) == before
    assert report.exit_status == 1


@pytest.mark.parametrize("name", ["000009.json", "0000001.json"])
def test_records_outside_the_plan(copy, name):
    root = copy()
    shutil.copy(root / "commits/000001.json", root / "commits" / name)
    report = verify(root, repair=True)
    (finding,) = report.findings
    assert (finding.shard, finding.kind) == (None, "stray")
    assert name in finding.what
    assert sorted(path.name for path in (root / "commits").iterdir()) == [f"00000{i}.json" for i in range(3)]
    assert verify(root).sound


def test_an_index_that_misleads(copy):
    root = copy()
    path = write_index(root)
    assert verify(root).sound
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (finding,) = verify(root).findings
    assert (finding.shard, finding.kind, finding.recompute) == (None, "index", False)
    write_index(root)
    (root / "commits/000001.json").unlink()
    (finding,) = verify(root, repair=True).findings
    assert "index.arrow names shard 1, which has no record" in finding.what
    assert not path.exists()
    assert verify(root).missing == ((1, 2),)
    write_index(root)  # behind what the writer adds later: no finding
    truncate_n = folder_of(root, 2) / "n/c/0/0"
    truncate_n.write_bytes(b"x")
    assert verify(root, repair=True).dropped == (2,)
    assert not path.exists(), "it would name the shard that was dropped"


def test_only_hashes_see_a_change_that_could_be_true(copy):
    root = copy()

    def lower(chunks):
        chunks[1][3] += 1

    forge(root, 1, "label_logp", lower, hashes=False)
    assert verify(root).sound
    (finding,) = verify(root, hashes=True).findings
    assert (finding.shard, finding.kind) == (1, "hash")
    assert "label_logp" in finding.what


def set_to(value, place=3):
    def change(chunks):
        chunks[1][place] = value

    return change


def pad_with_seven(chunks):
    next(chunk for chunk in chunks if chunk[-1] == 0)[-1] = 7  # the widest sequence has no padding


def id_again(chunks):
    chunks[1][1] = chunks[1][0]


def rank_again(chunks):
    chunks[0][0] = chunks[0][1]


FORGED = {
    "token beyond the vocabulary": (
        "threshold",
        "tokens",
        set_to(70_000),
        "rows",
        "sequence 4: a token id is not below",
    ),
    "entropy above ln V": ("threshold", "entropy", set_to(254), "rows", "sequence 4: an entropy is outside"),
    "no label": ("threshold", "label_logp", set_to(65_535), "rows", "sequence 4: a row with entries lacks its label"),
    "head code in the tail": (
        "threshold",
        "logp_tail",
        set_to(200),
        "rows",
        "sequence 4: a tail log-p code lies above",
    ),
    "tail code in the head": ("threshold", "logp_head", set_to(3), "decode", "negative"),
    "sums": ("threshold", "tail", lambda chunks: [np.full_like(c, 255) for c in chunks], "decode", "negative|sum to 1"),
    "count of one": ("random", "count", set_to(1, 0), "decode|rows", "sum to 20|below 2"),
    "one count more": (
        "random",
        "count",
        lambda chunks: chunks[0].__setitem__(0, chunks[0][0] + 1),
        "decode",
        "sum to 20",
    ),
    "kept mass": ("top_k", "kept", set_to(0.0), "decode", "kept mass"),
    "text breaks off": ("threshold", "tokens", set_to(5, 0), "chain", "sequence 4 does not start with the last token"),
    "more than the widths": (
        "threshold",
        "n",
        lambda c: [np.full_like(x, 255) for x in c],
        "decode",
        "more than it has",
    ),
    "padding": ("threshold", "id_lo", pad_with_seven, "decode", "sequence . of id_lo is not padded with zeros"),
    "fast: a weight of its own": ("fast", "weight", set_to(0.5, 0), "decode", "weight is not what its codes say"),
    "fast: an id beyond": ("fast", "id", set_to(70_000, 0), "decode", "an id is not below"),
    "fast: an id twice": ("fast", "id", id_again, "decode|rows", "twice|ascend"),
    "fast: padding": ("fast", "id", pad_with_seven, "decode", "sequence . of id is not padded with zeros"),
    "small: a rank beyond": ("small", "tail_rank", set_to(80_000, 0), "decode", "a rank is not below"),
    "small: an id in two ranks": ("small", "id_of_rank", rank_again, "decode|rows", "rank"),
    "small: padding": (
        "small",
        "head_rank",
        pad_with_seven,
        "decode",
        "sequence . of head_rank is not padded with zeros",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_rows_that_no_sampler_makes(copy, name):
    cache, array, change, kind, words = FORGED[name]
    root = copy(cache)
    forge(root, 1, array, change)
    report = verify(root, hashes=True)
    assert {finding.shard for finding in report.findings} == {1}
    assert re.fullmatch(kind, report.findings[0].kind), report.findings
    assert re.search(words, report.findings[0].what), report.findings
    assert verify(root, repair=True).dropped == (1,)


def decoded(root, sequence):
    return open_cache(root)[sequence].targets


def test_ids_twice_and_out_of_order(copy):
    """Codes that decode without complaint but break the order or the uniqueness of a row."""
    root = copy("top_k")
    targets = decoded(root, 3)
    row = int(np.argmax(np.diff(targets.offsets) == 20))
    start = int(targets.offsets[row])

    def twice(chunks):
        chunks[0][start + 1] = chunks[0][start]

    def set_high(chunks):  # bit planes: give the second id the first one's high bit
        bits = np.unpackbits(chunks[0], bitorder="little")
        bits[start + 1] = bits[start]
        return [np.packbits(bits, bitorder="little"), *chunks[1:]]

    forge(root, 1, "id_lo", twice)
    if targets.ids[start] >> 16 != targets.ids[start + 1] >> 16:
        forge(root, 1, "id_hi", set_high)
    (finding,) = verify(root, hashes=True).findings
    assert (finding.kind, finding.what) == ("rows", "sequence 3: an id comes twice in a row")

    root = copy("top_k")

    def swapped(chunks):
        chunks[0][[start + 1, start + 15]] = chunks[0][[start + 15, start + 1]]

    forge(root, 1, "logp", swapped)
    (finding,) = verify(root, hashes=True).findings
    assert finding.kind in ("rows", "decode")
    assert "out of order" in finding.what


def test_importance_weights_that_are_no_numbers(made, tmp_path):
    made.write(tmp_path, plan(made, "importance"))
    for value in (np.nan, np.inf, -1.0):
        forge(tmp_path, 1, "weight", set_to(value))
        report = verify(tmp_path, hashes=True)
        assert [finding.what for finding in report.findings] == ["sequence 4: a weight is negative or not finite"]


def test_the_text_breaks_off_between_shards(copy):
    root = copy()
    forge(root, 1, "tokens", lambda chunks: chunks[2].__setitem__(-1, 5))
    # Shard 1 fits shard 0 before it; shard 2 has no other neighbour to vouch for it.
    report = verify(root)
    assert [(f.shard, f.kind) for f in report.findings] == [(2, "chain")]
    assert "shard 2 does not start with the last token of shard 1" in report.findings[0].what
    # Without shard 0 the two are alone, and the hashes decide: here both are as recorded, there one is not.
    (root / "commits/000000.json").unlink()
    (finding,) = verify(root, repair=True).findings
    assert not finding.recompute
    assert "delete commits/000001.json and commits/000002.json" in finding.remedy
    root = copy()
    (root / "commits/000000.json").unlink()
    forge(root, 1, "tokens", lambda chunks: chunks[2].__setitem__(-1, 5), hashes=False)
    (finding,) = verify(root, repair=True).findings
    assert (finding.shard, finding.recompute) == (1, True)


def test_sample_decodes_only_so_many(copy):
    root = copy()
    assert verify(root, sample=2).sequences == 2
    assert verify(root, sample=100).sequences == 9
    forge(root, 1, "entropy", lambda chunks: chunks[1].__setitem__(3, 254))
    assert verify(root, sample=2).sound  # the first and the last sequence of the cache
    assert [f.shard for f in verify(root, sample=9).findings] == [1]
    with pytest.raises(InputError, match="sample came as 0"):
        verify(root, sample=0)


def test_an_incomplete_cache_is_sound(made, tmp_path):
    manifest = plan(made, "threshold")
    writer = CacheWriter(tmp_path, manifest)
    report = verify(tmp_path, sample=3)
    assert (report.sound, report.committed, report.missing) == (True, 0, ((0, 3),))
    writer.write_shard(1, *made.shard_data(manifest, 1))
    report = verify(tmp_path, hashes=True)
    assert (report.sound, report.committed, report.missing, report.sequences) == (True, 1, ((0, 1), (2, 3)), 3)


def test_what_can_not_be_verified(copy, tmp_path):
    with pytest.raises(NotACacheError):
        verify(tmp_path / "nowhere")
    root = copy()
    put_record(root, 1, format_version=99)
    with pytest.raises(FormatError, match="upgrade stillroom"):
        verify(root, repair=True)
    assert (root / "commits/000001.json").exists(), "a newer version's shard is not damage"
    shutil.rmtree(root / "commits")
    with pytest.raises(CacheError, match="has no commits/"):
        verify(root)


def test_every_flipped_bit_of_a_shard_is_found_with_hashes(copy):
    root = copy("random")
    rng = np.random.default_rng(0)
    targets = [path for path in [*root.rglob("*")] if path.is_file()]
    for path in rng.choice(np.array(targets, object), 40):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            found = not verify(root, hashes=True).sound
        except FormatError:
            found = path.name == "manifest.json" or path.parent.name == "commits"
        assert found, path
        path.write_bytes(whole)
