"""What goes in comes out, through both readers, for every sampler and every choice of what to keep."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import zarr

from stillroom.storage import layout
from stillroom.storage.cache import open_cache
from stillroom.storage.codes import logp_scale
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets

SPECS = [
    SamplerSpec(draws=20),
    SamplerSpec(draws=20, keep_logp="head"),
    SamplerSpec(draws=300),  # 16-bit counts and lengths
    SamplerSpec(draws=1),
    SamplerSpec(kind="random", draws=30, keep_logp="none"),
    SamplerSpec(kind="random", draws=30, keep_logp="head"),
    SamplerSpec(kind="random", draws=30, keep_logp="all"),
    SamplerSpec(kind="random", draws=400, keep_logp="none"),
    SamplerSpec(kind="random", draws=30, exponent=0.7, keep_logp="all"),
    SamplerSpec(kind="random", draws=30, exponent=1.5, keep_logp="none"),
    SamplerSpec(kind="systematic", draws=40, keep_logp="none"),
    SamplerSpec(kind="systematic", draws=40, keep_logp="all"),
    SamplerSpec(kind="stratified", draws=40, keep_logp="all"),
    SamplerSpec(kind="top_k", draws=25),
    SamplerSpec(kind="top_p", draws=60, top_p=0.8),
]
IDS = [f"{s.kind}-{s.draws}-{s.keep_logp}-{s.exponent}" for s in SPECS]


def joined(made, manifest):
    shards = [made.shard_data(manifest, index) for index in range(manifest.shards)]
    return np.concatenate([tokens for tokens, _, _ in shards]), SparseTargets.concat([t for _, t, _ in shards])


def assert_equal(a: SparseTargets, b: SparseTargets) -> None:
    for name in ("offsets", "ids", "weights", "label_logp", "entropy", "logp"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            np.testing.assert_array_equal(left, right, err_msg=name)
            assert left.dtype == right.dtype


@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_round_trip(made, tmp_path, spec, vocab_size):
    manifest = made.manifest(spec, vocab_size=vocab_size, sequences=5, sequences_per_shard=3)
    made.write(tmp_path, manifest)
    tokens, given = joined(made, manifest)

    cache = open_cache(tmp_path)
    assert len(cache) == 5
    assert cache.entries == given.entries
    came = cache.read(range(5))
    np.testing.assert_array_equal(came.tokens, tokens)
    assert came.tokens.dtype == np.uint32
    np.testing.assert_array_equal(came.targets.offsets, given.offsets)
    assert np.abs(came.targets.label_logp - given.label_logp).max() <= 1 / 256 + 1e-6
    assert np.abs(came.targets.entropy - given.entropy).max() <= 1 / 30 + 1e-6
    for row in range(given.rows):
        check_row(spec, given.slice_rows(row, row + 1), came.targets.slice_rows(row, row + 1))

    # One by one, in any order, by zarr-python: the same.
    plain = open_cache(tmp_path, reader="zarr").read([4, 0, 2])
    assert_equal(plain.targets, SparseTargets.concat([cache[i].targets for i in (4, 0, 2)]))
    np.testing.assert_array_equal(plain.tokens, tokens[[4, 0, 2]])


def check_row(spec, given, came):
    truth = {i: (w, 0.0 if given.logp is None else given.logp[k]) for k, (i, w) in enumerate(pairs(given))}
    assert sorted(came.ids.tolist()) == sorted(truth)
    weight = np.array([truth[i][0] for i in came.ids.tolist()], np.float64)
    logp = np.array([truth[i][1] for i in came.ids.tolist()], np.float64)
    if not len(weight):
        return
    step = np.expm1(np.log(spec.draws) / 191)  # one level up, as a ratio
    head = logp >= logp_scale(spec.draws).pivot_logp
    if spec.kind == "threshold":
        assert np.all(np.diff(head.astype(int)) <= 0)  # the head comes first
        assert np.sum(came.weights, dtype=np.float32) == 1
        assert np.all(came.weights >= 0)
        assert np.all(np.diff(came.ids[~head]) > 0)
        others = head & (np.arange(len(head)) > 0)
        np.testing.assert_allclose(came.weights[others], weight[others], rtol=step + 1e-6, atol=2**-23)
        assert np.ptp(came.weights[~head]) <= 2**-24 if (~head).any() else True
    elif spec.kind in ("top_k", "top_p"):
        assert came.weights.sum(dtype=np.float64) == pytest.approx(weight.sum(), abs=1e-6)
        low = weight < 1 / spec.draws
        np.testing.assert_allclose(came.weights[1:][~low[1:]], weight[1:][~low[1:]], rtol=step + 1e-6)
        np.testing.assert_allclose(np.log(came.weights[1:]), np.log(weight[1:]), atol=18 / 63 + 1e-6)
    elif spec.exponent == 1.0:
        np.testing.assert_allclose(came.weights, weight, rtol=1e-6)
        count = np.rint(came.weights * spec.draws).astype(int)
        assert np.all(np.lexsort((came.ids, -count)) == np.arange(len(count)))
    else:
        np.testing.assert_array_equal(came.weights, weight.astype(np.float32))
    if spec.keep_logp == "none":
        assert came.logp is None
        return
    assert np.all(np.abs(came.logp - logp)[head] <= step + 1e-4)
    if spec.keep_logp == "all":
        assert np.all(np.abs(came.logp - logp)[~head & (logp > -18)] <= 18 / 63 + 1e-4)
        assert np.all((came.logp >= logp_scale(spec.draws).pivot_logp) == head)
    else:
        assert np.all(np.isnan(came.logp) == ~head)


def pairs(targets):
    return zip(targets.ids.tolist(), targets.weights.tolist(), strict=True)


def test_stock_zarr_reads_every_array(made, tmp_path):
    # Also the proof that our hand-written bytes are what zarr means by them.
    manifest = made.manifest(SamplerSpec(draws=20), vocab_size=70_000)
    made.write(tmp_path, manifest)
    cache = open_cache(tmp_path)
    for shard in cache.shards:
        group = zarr.open_group(tmp_path / cache.record(shard).path, mode="r")
        assert set(group.array_keys()) == {array.name for array in layout.arrays_of(manifest)}
        assert group.attrs["stillroom"]["sampler"] == manifest.sampler.to_json()
        reader = cache._shard(shard)
        for name, array in group.arrays():
            whole = array[:]
            assert array.metadata.dimension_names[0] == "sequence"
            for sequence in range(reader.record.sequences):
                np.testing.assert_array_equal(whole[sequence], reader.chunk(name, sequence))
    tokens, _ = joined(made, manifest)
    group = zarr.open_group(tmp_path / cache.record(0).path, mode="r")
    np.testing.assert_array_equal(group["tokens"][:], tokens[:3])


def test_same_data_same_bytes(made, tmp_path):
    manifest = made.manifest(SamplerSpec(draws=20), vocab_size=70_000)
    for name in ("a", "b"):
        made.write(tmp_path / name, manifest)
    one, two = open_cache(tmp_path / "a"), open_cache(tmp_path / "b")
    assert [one.record(i).objects for i in one.shards] == [two.record(i).objects for i in two.shards]
    assert one.record(0).path != two.record(0).path
    on_disk = sum(path.stat().st_size for path in (tmp_path / "a/shards").rglob("*") if path.is_file())
    assert sum(one.bytes_by_array().values()) == on_disk


def test_order_of_entries_does_not_change_the_bytes(made, tmp_path):
    # Rows whose entries come in another order, and blocks of another size, encode alike.
    manifest = made.manifest(SamplerSpec(kind="random", draws=30, keep_logp="none"), sequences=3)
    tokens, given, rounding = made.shard_data(manifest, 0)
    rng = np.random.default_rng(0)
    order = np.concatenate([a + rng.permutation(b - a) for a, b in zip(given.offsets, given.offsets[1:], strict=False)])
    mixed = SparseTargets(given.offsets, given.ids[order], given.weights[order], given.label_logp, given.entropy)
    records = []
    for name, targets in (("a", given), ("b", mixed)):
        records.append(made.CacheWriter(tmp_path / name, manifest).write_shard(0, tokens, targets, rounding))
    assert records[0].objects == records[1].objects


def test_without_logp_and_in_a_worker(made, tmp_path):
    made.write(tmp_path, made.manifest(SamplerSpec(draws=20)))
    cache = open_cache(tmp_path)
    assert cache[0].targets.logp is not None
    assert open_cache(tmp_path, columns=("tokens", "entropy", "label_logp"))[0].targets.logp is None
    assert_equal(pickle.loads(pickle.dumps(cache))[4].targets, cache[4].targets)
    with pytest.raises(IndexError, match="sequence 6 came, wanted 0 to 5"):
        cache[6]
    with pytest.raises(IndexError):
        cache[-1]
    assert list(cache.read([]).tokens.shape) == [0, 17]


def test_rows_on_both_sides_of_every_group(made, tmp_path):
    # More rows than are decoded or encoded at a time, all rows empty included.
    manifest = made.manifest(SamplerSpec(draws=3, keep_logp="head"), seq_len=9000, sequences=2, sequences_per_shard=2)
    rng = np.random.default_rng(0)
    n = np.concatenate([rng.integers(0, 2, 9000), np.zeros(9000, int)])
    entries = int(n.sum())
    targets = SparseTargets(
        np.append(0, np.cumsum(n)), rng.integers(0, 300, entries).astype(np.int32), np.ones(entries, np.float32),
        np.full(18000, np.nan, np.float32), np.zeros(18000, np.float32), np.zeros(entries, np.float32),
    )  # fmt: skip
    writer = made.CacheWriter(tmp_path, manifest)
    writer.write_shard(0, np.zeros((2, 9001), np.uint32), targets, rng.random((18000, 3)))
    assert_equal(open_cache(tmp_path).read([0, 1]).targets, targets)
