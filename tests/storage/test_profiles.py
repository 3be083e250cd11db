"""Profiles: the same targets to the last bit, back to the same bytes, readable by stock zarr."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import DamagedError, PlanMismatchError
from stillroom.storage.manifest import Manifest
from stillroom.storage.reencode import reencode
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.writer import CacheWriter

SPECS = [
    SamplerSpec(draws=20),
    SamplerSpec(draws=20, keep_logp="head"),
    SamplerSpec(kind="random", draws=30, keep_logp="none"),
    SamplerSpec(kind="random", draws=30, keep_logp="all"),
    SamplerSpec(kind="random", draws=30, exponent=0.7, keep_logp="all"),
    SamplerSpec(kind="top_k", draws=12),
]
IDS = [f"{s.kind}-{s.keep_logp}-{s.exponent}" for s in SPECS]
PLAIN = "ignore:Numcodecs codecs are not in the Zarr version 3"
NAMES = ("offsets", "ids", "weights", "label_logp", "entropy", "logp")


def assert_equal(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    for name in NAMES:
        a, b = getattr(one.targets, name), getattr(other.targets, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=name)


def shard_bytes(root):
    cache = open_cache(root)
    return [{item.name: item.sha256 for item in cache.record(shard).objects} for shard in cache.shards]


@pytest.mark.filterwarnings(PLAIN)
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_every_profile_reads_the_same_and_comes_back_to_the_same_bytes(made, tmp_path, spec):
    made.write(tmp_path / "standard", made.manifest(spec, vocab_size=70_000))
    whole = open_cache(tmp_path / "standard").read([4, 0, 5, 2])
    for profile in ("fast", "small"):
        seen: dict[int, int] = {}
        reencode(tmp_path / "standard", tmp_path / profile, profile, seen.__setitem__)
        assert seen == {1: 2, 2: 2}
        for reader in ("direct", "zarr"):
            cache = open_cache(tmp_path / profile, reader=reader)
            assert cache.manifest.profile == profile
            assert_equal(cache.read([4, 0, 5, 2]), whole)
        light = open_cache(tmp_path / profile, columns=("tokens",)).read([4, 0, 5, 2])
        np.testing.assert_array_equal(light.targets.ids, whole.targets.ids)
        np.testing.assert_array_equal(light.targets.weights, whole.targets.weights)
        reencode(tmp_path / profile, tmp_path / f"{profile}-back", "standard")
        assert shard_bytes(tmp_path / f"{profile}-back") == shard_bytes(tmp_path / "standard")


def test_the_profile_is_part_of_what_a_cache_is(made, tmp_path):
    plain, fast = made.manifest(SPECS[0]), made.manifest(SPECS[0], profile="fast")
    assert "profile" not in plain.to_json()
    for manifest in (plain, fast):
        assert Manifest.from_json(manifest.to_json()) == manifest
    assert plain.identity != fast.identity
    CacheWriter(tmp_path, plain)
    with pytest.raises(PlanMismatchError, match="profile"):
        CacheWriter(tmp_path, fast)


@pytest.mark.parametrize("profile", ["fast", "small"])
def test_a_flipped_bit_is_an_error(made, tmp_path, profile):
    made.write(tmp_path, made.manifest(SPECS[0], profile=profile))
    shard = tmp_path / open_cache(tmp_path).record(1).path
    rng, tried, refused = np.random.default_rng(0), 0, 0
    good = open_cache(tmp_path).read(range(6))
    for path in sorted(shard.rglob("c/0/*")):
        whole = path.read_bytes()
        for _ in range(8):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            try:
                came = open_cache(tmp_path).read(range(6))
            except DamagedError as error:
                refused += "shard 1" in str(error)
            else:  # a Zstandard frame's header has a bit without a meaning (RFC 8878, 3.1.1.1.1.4): the rows are the same
                assert_equal(came, good)
                refused += profile == "small" and path.parts[-4] not in ("head_rank", "tail_rank", "id_of_rank")
            tried += 1
        path.write_bytes(whole)
    assert refused == tried


@pytest.mark.filterwarnings(PLAIN)
def test_stock_zarr_opens_small(made, tmp_path):
    manifest = made.manifest(SPECS[2], profile="small")
    made.write(tmp_path, manifest)
    cache = open_cache(tmp_path)
    group = zarr.open_group(tmp_path / cache.record(0).path, mode="r")
    id_of_rank = group["id_of_rank"][0]
    assert sorted(id_of_rank) == list(range(manifest.vocab_size))
    targets = cache[0].targets
    heads = np.concatenate(
        [targets.ids[a:b][targets.weights[a:b] > 1.5 / 30] for a, b in zip(targets.offsets, targets.offsets[1:])]
    )
    np.testing.assert_array_equal(id_of_rank[group["head_rank"][0][: len(heads)]], heads)
