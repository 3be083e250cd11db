"""Row statistics: what sorting all rows gives, kept beside the cache, never believed where they do not fit."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest

from stillroom.storage.cache import open_cache
from stillroom.storage.depot import Directory
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import Manifest
from stillroom.storage.orphans import collect_orphans
from stillroom.storage.rows import ROWS_KIND, ROWS_NAME, row_statistics
from stillroom.storage.sidecar import pack
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets
from stillroom.storage.verify import verify

SHARES = [0.0, 0.001, 0.1, 0.25, 1 / 3, 0.5, 0.77, 0.999, 1.0]
FIELDS = ("shards", "rows_S", "label_logp_S", "entropy_S", "label_logp_C", "entropy_C")


@pytest.fixture(scope="module")
def cache(made, tmp_path_factory):
    """Eleven sequences in four shards; one row in eight has no target."""
    root = tmp_path_factory.mktemp("rows") / "cache"
    made.write(root, made.manifest(SamplerSpec(draws=20), sequences=11, sequences_per_shard=3))
    return root


@pytest.fixture
def copy(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "copy", ignore=shutil.ignore_patterns("derived"))
    return tmp_path / "copy"


def rows_of(opened):
    """(label_logp, entropy) of the rows with a target of each sequence, by decoding all of them."""
    found = []
    for index in range(len(opened)):
        targets = opened[index].targets
        keep = np.diff(targets.offsets) > 0
        found.append((targets.label_logp[keep], targets.entropy[keep]))
    return found


def assert_same(one, other):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("profile", ["standard", "fast", "small"])
@pytest.mark.parametrize("reader", ["direct", "zarr"])
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_they_are_those_of_the_decoded_rows(made, tmp_path, profile, reader):
    spec = SamplerSpec(kind="random", draws=30) if profile == "small" else SamplerSpec(draws=20)
    made.write(tmp_path, made.manifest(spec, sequences=5, sequences_per_shard=3, profile=profile))
    opened = open_cache(tmp_path, reader=reader)
    found, rows = row_statistics(opened), rows_of(opened)
    assert found.rows == sum(len(logp) for logp, _ in rows) < 5 * 16
    np.testing.assert_array_equal(found.rows_S, [len(logp) for logp, _ in rows])
    for column, place, means_S in (("label_logp", 0, found.label_logp_S), ("entropy", 1, found.entropy_S)):
        ordered = np.sort(np.concatenate([row[place] for row in rows]))
        for share in SHARES:
            wanted = ordered[max(0, int(np.ceil(share * len(ordered))) - 1)]
            assert np.float32(found.quantile(share, column)) == wanted
        # Both are roundings of the same mean: a float32 has 24 bits.
        np.testing.assert_allclose(means_S, [row[place].mean(dtype=np.float64) for row in rows], rtol=2**-23)
        value_C, count_C = found.distribution(column)
        np.testing.assert_array_equal(np.repeat(value_C, count_C), ordered)


def test_packed_documents_and_sequences_without_a_target(made, tmp_path):
    made.write(
        tmp_path / "d", made.manifest(SamplerSpec(draws=20), packing=made.PackingInfo(policy="documents", seq_len=16))
    )
    opened = open_cache(tmp_path / "d")
    np.testing.assert_array_equal(row_statistics(opened).rows_S, [len(logp) for logp, _ in rows_of(opened)])
    manifest = made.manifest(SamplerSpec(draws=20), sequences=2, sequences_per_shard=2)
    writer = made.CacheWriter(tmp_path / "e", manifest)
    tokens, targets, rounding = made.shard_data(manifest, 0)
    writer.write_shard(0, tokens, made.emptied(targets, np.arange(32) >= 16), rounding)
    found = row_statistics(open_cache(tmp_path / "e"))
    assert found.rows_S.tolist() == [0, 14]
    assert np.isnan(found.label_logp_S[0])
    assert np.isnan(found.entropy_S[0])
    assert np.isfinite(found.label_logp_S[1])


def test_they_are_kept_and_nothing_else_minds(cache):
    first = row_statistics(open_cache(cache))
    before = (cache / "derived" / ROWS_NAME).stat().st_mtime_ns
    told = []
    second = row_statistics(open_cache(cache), on_progress=lambda done, total: told.append(done))
    assert told == []
    assert_same(first, second)
    assert (cache / "derived" / ROWS_NAME).stat().st_mtime_ns == before
    assert verify(cache, hashes=True).sound
    (cache / "derived" / ".rows.arrow-0123.tmp").write_bytes(b"left by a killed process")
    assert collect_orphans(Directory(cache), Manifest.load(cache), age_s=-1) == ["derived/.rows.arrow-0123.tmp"]
    assert len(open_cache(cache)) == 11


def test_shards_that_came_since_are_added(cache, copy):
    whole = row_statistics(open_cache(cache))
    record = copy / "commits" / "000001.json"
    kept = record.read_bytes()
    record.unlink()
    partial = row_statistics(open_cache(copy, partial=True))
    assert partial.shards.tolist() == [0, 2, 3]
    record.write_bytes(kept)
    told = []
    grown = row_statistics(open_cache(copy), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]
    assert_same(grown, whole)
    record.unlink()  # dropped by a repair: what is not at hand must not count
    assert_same(row_statistics(open_cache(copy, partial=True)), partial)


def other_manifest(made, found):
    return pack(ROWS_KIND, made.manifest(SamplerSpec(draws=21)), {name: getattr(found, name) for name in FIELDS})


def forged(**changes):
    def make(made, found):
        manifest = made.manifest(SamplerSpec(draws=20), sequences=11, sequences_per_shard=3)
        return pack(ROWS_KIND, manifest, {name: changes.get(name, getattr(found, name)) for name in FIELDS})

    return make


@pytest.mark.parametrize(
    "damage",
    [
        lambda made, found: b"", lambda made, found: b"ARROW1\0\0" + b"x" * 100, other_manifest,
        forged(shards=np.array([0, 1, 2, 9])), forged(shards=np.array([3, 2, 1, 0])), forged(rows_S=np.full(11, 17)),
        forged(rows_S=np.full(10, 14)), forged(label_logp_C=np.full(65536, -1)), forged(entropy_C=np.zeros(256, np.int64)),
        forged(label_logp_S=np.full(11, np.inf, np.float32)), forged(label_logp_S=np.zeros(11)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_computed_again(cache, copy, made, damage, caplog):
    whole = row_statistics(open_cache(cache))
    path = copy / "derived" / ROWS_NAME
    path.parent.mkdir()
    path.write_bytes(damage(made, whole))
    assert_same(row_statistics(open_cache(copy)), whole)
    assert "computed again" in caplog.text
    assert path.read_bytes() == (cache / "derived" / ROWS_NAME).read_bytes()


def test_no_flipped_bit_goes_unseen(cache, copy):
    whole = row_statistics(open_cache(cache))
    row_statistics(open_cache(copy))
    path = copy / "derived" / ROWS_NAME
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), 25, replace=False).tolist():
        harmed = bytearray(data)
        harmed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        assert_same(row_statistics(open_cache(copy)), whole)


def test_links_are_not_followed(cache, copy, tmp_path, caplog):
    whole, outside = row_statistics(open_cache(cache)), tmp_path / "outside"
    outside.mkdir()
    (copy / "derived").symlink_to(outside)
    assert_same(row_statistics(open_cache(copy)), whole)
    assert list(outside.iterdir()) == []
    assert "is a link" in caplog.text
    (copy / "derived").unlink()
    (copy / "derived").mkdir()
    (outside / ROWS_NAME).write_bytes(b"theirs")
    (copy / "derived" / ROWS_NAME).symlink_to(outside / ROWS_NAME)
    assert_same(row_statistics(open_cache(copy)), whole)
    assert (outside / ROWS_NAME).read_bytes() == b"theirs"


def test_a_place_that_takes_no_file_is_no_error(cache, copy, caplog):
    (copy / "derived").write_text("a file is in the way")
    assert_same(row_statistics(open_cache(copy)), row_statistics(open_cache(cache)))
    assert "was not kept" in caplog.text


def test_of_a_remote_cache_they_are_fetched_or_kept_here(cache, copy, tmp_path):
    whole = row_statistics(open_cache(cache))
    remote = open_cache(f"file://{cache}", cache_dir=tmp_path / "a")
    told = []
    assert_same(row_statistics(remote, on_progress=lambda done, total: told.append(done)), whole)
    assert told == []
    bare = open_cache(f"file://{copy}", cache_dir=tmp_path / "b")
    assert_same(row_statistics(bare), whole)
    assert not (copy / "derived").exists()
    assert bare.derived(ROWS_NAME).is_file()


def test_questions_that_have_no_answer(cache):
    found = row_statistics(open_cache(cache))
    with pytest.raises(InputError, match="wanted 0 to 1"):
        found.quantile(1.5)
    with pytest.raises(InputError, match="wanted label_logp or entropy"):
        found.quantile(0.5, "loss")


def test_a_second_is_enough_for_a_million_rows(made, tmp_path):
    rows, seq_len = 1 << 18, 1024
    manifest = made.manifest(
        SamplerSpec(kind="random", draws=1, keep_logp="none"), seq_len=seq_len, sequences=rows // seq_len,
        sequences_per_shard=rows // seq_len,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, (rows // seq_len, seq_len + 1)).astype(np.uint32)
    entropy, logp = rng.gamma(2.0, 1.0, rows).astype(np.float32), -rng.gamma(1.0, 2.0, rows).astype(np.float32)
    ids = rng.integers(0, 300, rows).astype(np.int32)
    targets = SparseTargets(np.arange(rows + 1), ids, np.ones(rows, np.float32), logp, entropy, None)
    made.CacheWriter(tmp_path, manifest).write_shard(0, tokens, targets, np.zeros((rows, 3)))
    opened, seconds = open_cache(tmp_path), []
    for _ in range(3):  # the best of three, as others share the cores
        opened.derived(ROWS_NAME).unlink(missing_ok=True)
        start = time.process_time()
        found = row_statistics(opened)
        seconds.append(time.process_time() - start)
    assert found.rows == rows
    assert min(seconds) < rows / 1e6
