"""Broken and hostile shards: each is named with its remedy, by both readers, and none reads as zeros."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest

from stillroom.storage import strict
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import DamagedError, FormatError
from stillroom.storage.spec import SamplerSpec

REMEDY = r"shard 1: .*delete commits/000001.json and run `stillroom cache` again: only that shard is recomputed"
SPECS = {
    "threshold": SamplerSpec(draws=20),
    "random": SamplerSpec(kind="random", draws=20, keep_logp="none"),
    "top_k": SamplerSpec(kind="top_k", draws=20),
}


@pytest.fixture(scope="module")
def caches(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    for name, spec in SPECS.items():
        made.write(root / name, made.manifest(spec, vocab_size=70_000))
    return root


@pytest.fixture(params=["direct", "zarr"])
def reader(request):
    return request.param


@pytest.fixture
def broken(caches, tmp_path):
    """Copies a cache; gives its path and shard 1's folder."""

    def copy(name="threshold"):
        root = tmp_path / name
        shutil.copytree(caches / name, root)
        record = json.loads((root / "commits/000001.json").read_text())
        return root, root / record["path"]

    return copy


def assert_damaged(root, reader, match=REMEDY):
    cache = open_cache(root, reader=reader)
    cache.read([0, 1, 2])  # the other shard is not touched by it
    with pytest.raises(DamagedError, match=match):
        cache.read(range(6))


def set_record(root, **changes):
    path = root / "commits/000001.json"
    path.write_text(json.dumps(strict.sealed(json.loads(path.read_text()) | changes)))  # as a forger would


def rewrite(root, shard: Path, array: str, change, *, crc=True):
    """Replace one array's chunks and make index, CRC and record fit again, as a forger would."""
    sequences, codec = 3, numcodecs.Zstd(level=1, checksum=True)
    path = next((shard / array / "c").rglob("0/0/0"), None) or shard / array / "c/0/0"
    data = path.read_bytes()
    index = np.frombuffer(data[-4 - 16 * sequences : -4], "<u8").reshape(-1, 2)
    dtype = json.loads((shard / array / "zarr.json").read_text())["data_type"]
    chunks = [
        np.frombuffer(codec.decode(data[int(o) : int(o + n)]), np.dtype(dtype).newbyteorder("<")).copy()
        for o, n in index
    ]
    encoded = [bytes(x) if isinstance(x, bytes) else codec.encode(x) for x in change(chunks)]
    ends = np.cumsum([len(x) for x in encoded])
    table = np.stack([np.concatenate([[0], ends[:-1]]), [len(x) for x in encoded]], 1).astype("<u8").tobytes()
    put(root, shard, path, b"".join(encoded) + table + google_crc32c.value(table).to_bytes(4, "little"))


def put(root, shard, path, data: bytes):
    path.write_bytes(data)
    record = json.loads((root / "commits/000001.json").read_text())
    for item in record["objects"]:
        if item["name"] == str(path.relative_to(shard)):
            item["size_bytes"] = len(data)
    set_record(root, objects=record["objects"])


def test_missing_objects(broken, reader):
    root, shard = broken()
    (shard / "n/c/0/0").unlink()
    assert_damaged(root, reader)
    shutil.rmtree(shard)
    assert_damaged(root, reader)


@pytest.mark.parametrize("array", ["tokens", "id_lo", "tail", "n"])
def test_truncated_and_padded_objects(broken, reader, array):
    root, shard = broken()
    path = shard / array / "c/0/0"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        path.write_bytes(data)
        assert_damaged(root, reader)


def test_flipped_bits_anywhere(broken, reader):
    root, shard = broken()
    rng = np.random.default_rng(0)
    for array in ("tokens", "id_lo", "n", "n_head", "logp_head", "tail", "entropy"):
        path = shard / array / "c/0/0"
        whole = path.read_bytes()
        for _ in range(1 if reader == "zarr" else 5):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            assert_damaged(root, reader)
        path.write_bytes(whole)


def test_truncated_object_with_a_record_that_agrees(broken, reader):
    root, shard = broken()
    put(root, shard, shard / "n/c/0/0", (shard / "n/c/0/0").read_bytes()[:-9])
    assert_damaged(root, reader)
    put(root, shard, shard / "n/c/0/0", b"x")
    assert_damaged(root, reader)


def test_shard_of_another_place(broken, reader):
    root, _ = broken()
    first = json.loads((root / "commits/000000.json").read_text())
    (root / "commits/000001.json").write_text(json.dumps(first))
    assert_damaged(root, reader)


def test_a_record_missing_after_opening(broken):
    root, _ = broken()
    cache = open_cache(root)
    (root / "commits/000001.json").unlink()
    with pytest.raises(DamagedError, match="shard 1 has no record"):
        cache[5]


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "shards/../../elsewhere.zarr"},
        {"path": "/etc/000001-aaaaaaaa.zarr"},
        {"path": "shards/000002-aaaaaaaa.zarr"},
        {"start": 0},
        {"rows": 7},
        {"entries": -1},
        {"widths": {"entry": 1 << 40, "head": 8, "tail": 8}},
        {"widths": {"entry": 8, "head": 8}},
        {"objects": []},
        {"objects": [{"name": "../../manifest.json", "size_bytes": 3, "sha256": "0" * 64}]},
        {"manifest": "0" * 64},
        {"surprise": 1},
        {"shard": True},
        {"libraries": {"numpy": 2}},
    ],
    ids=str,
)
def test_records_that_cannot_be(broken, reader, changes):
    root, _ = broken()
    set_record(root, **changes)
    assert_damaged(root, reader)


def test_a_record_of_a_newer_version(broken):
    root, _ = broken()
    set_record(root, format_version=2, surprise=1)
    with pytest.raises(FormatError, match="this stillroom reads version 1: upgrade"):
        open_cache(root)[5]


def test_damaged_record_json(broken, reader):
    root, _ = broken()
    (root / "commits/000001.json").write_text('{"shard": 1')
    assert_damaged(root, reader)


def test_links_out_of_the_cache(broken, reader, tmp_path):
    root, shard = broken()
    secret = tmp_path / "secret"
    shutil.copy(shard / "n/c/0/0", secret)
    (shard / "n/c/0/0").unlink()
    (shard / "n/c/0/0").symlink_to(secret)
    assert_damaged(root, reader, match="leads out of the cache")


def test_a_chunk_that_unfolds_to_more_is_not_allocated(broken):
    # 64 MB from a few kB: refused by its size, in the frame header or while decoding.
    root, shard = broken()
    bomb = numcodecs.Zstd(level=1, checksum=True).encode(np.zeros(1 << 26, np.uint8))
    rewrite(root, shard, "n", lambda chunks: [bomb, bomb, bomb])
    assert_damaged(root, "direct")


@pytest.mark.parametrize("forge", ["missing", "offset", "overlap"])
def test_forged_index_with_a_right_crc(broken, forge):
    # zarr-python reads zeros here; the direct reader does not.
    root, shard = broken()
    path = shard / "n/c/0/0"
    data = path.read_bytes()
    index = np.frombuffer(data[-52:-4], "<u8").reshape(3, 2).copy()
    if forge == "missing":
        index[1] = 2**64 - 1
    elif forge == "offset":
        index[1, 0] = 1 << 60
    else:
        index[2] = index[1]
    table = index.tobytes()
    path.write_bytes(data[:-52] + table + google_crc32c.value(table).to_bytes(4, "little"))
    assert_damaged(root, "direct")


def test_ids_outside_the_vocabulary(broken, reader):
    root, shard = broken()
    rewrite(root, shard, "id_hi", lambda chunks: [chunk | 255 for chunk in chunks])
    assert_damaged(root, reader, match="not below the vocabulary size 70000.*only that shard")


def test_lengths_beyond_the_padding(broken, reader):
    root, shard = broken()
    rewrite(root, shard, "n", lambda chunks: [np.full_like(chunk, 255) for chunk in chunks])
    assert_damaged(root, reader, match="claims .* elements")


@pytest.mark.parametrize("change", ["more", "moved", "zero", "lengths"])
def test_counts_that_do_not_sum_to_the_draws(broken, reader, change):
    root, shard = broken("random")

    def forge(chunks):
        for chunk in chunks:
            head = int(np.count_nonzero(chunk))
            if change == "more":
                chunk[0] += 1
            elif change == "moved":  # the total is right, the rows are not
                chunk[0], chunk[head - 1] = chunk[0] + 1, chunk[head - 1] - 1
            elif change == "zero":
                chunk[:] = 0
            else:  # n: one entry more here, one fewer there
                chunk[[0, 1]] = chunk[:2].sum() - 1, 1
        return chunks

    rewrite(root, shard, "n" if change == "lengths" else "count", forge)
    what = "more head entries than entries" if change == "lengths" else "counts of a row do not sum to 20"
    assert_damaged(root, reader, match=what + ".*only that shard")


def test_threshold_rows_that_do_not_sum_to_one(broken, reader):
    root, shard = broken()
    rewrite(root, shard, "tail", lambda chunks: [np.full_like(chunk, 255) for chunk in chunks])
    assert_damaged(root, reader, match="weight of a row is negative|do not sum to 1")


def test_head_lengths_beyond_the_rows(broken, reader):
    root, shard = broken()

    def forge(chunks):
        for chunk in chunks:
            full, empty = np.argmax(chunk), np.flatnonzero(chunk == 0)[0]  # the total stays
            chunk[empty], chunk[full] = chunk[full], 0
        return chunks

    rewrite(root, shard, "n_head", forge)
    assert_damaged(root, reader, match="shard 1: ")


def test_kept_mass_that_is_not_the_entries(broken, reader):
    root, shard = broken("top_k")
    for value in (np.nan, -1.0, 2.0, 0.0):
        rewrite(root, shard, "kept", lambda chunks, value=value: [np.full_like(c, value) for c in chunks])
        assert_damaged(root, reader, match="kept mass")
