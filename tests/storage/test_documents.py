"""Packing `documents`: where documents begin is kept by every profile, reader, export and check."""

from __future__ import annotations

import numpy as np
import pytest
import storage_made as made  # made.py, by way of conftest

from stillroom.storage.cache import open_cache
from stillroom.storage.interchange.reading import import_cache
from stillroom.storage.interchange.writing import export_cache
from stillroom.storage.manifest import PackingInfo
from stillroom.storage.reencode import reencode
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.verify import verify
from stillroom.storage.writer import CacheWriter


def _manifest(**changes):
    packing = PackingInfo(policy="documents", seq_len=16)
    return made.manifest(SamplerSpec(draws=20), packing=packing, sequences=7, **changes)


@pytest.mark.parametrize("reader", ["direct", "zarr"])
@pytest.mark.parametrize(
    "profile", ["standard", "fast", pytest.param("small", marks=pytest.mark.filterwarnings("ignore:Numcodecs"))]
)
def test_beginnings_come_back(tmp_path, profile, reader):
    manifest = _manifest(profile=profile)
    made.write(tmp_path, manifest)
    cache = open_cache(tmp_path, reader=reader)
    order = [6, 0, 3, 3]
    np.testing.assert_array_equal(cache.starts(order), made.document_starts(manifest)[order])
    tokens, targets = cache.read(range(7))
    across = made.document_starts(manifest)[:, 1:].ravel()
    assert across.sum() > 7
    assert not np.diff(targets.offsets)[across].any()
    assert np.diff(targets.offsets)[~across].any()
    assert tokens.shape == (7, 17)
    assert verify(tmp_path, hashes=True).sound


def test_concat_has_no_such_array_and_no_such_bytes(tmp_path):
    made.write(tmp_path, made.manifest(SamplerSpec(draws=20)))
    assert open_cache(tmp_path).starts([0]) is None
    assert not list(tmp_path.rglob("starts"))


def test_export_import_and_reencoding_keep_them(tmp_path):
    manifest = _manifest()
    made.write(tmp_path / "cache", manifest)
    export_cache(tmp_path / "cache", tmp_path / "rows")
    assert import_cache(tmp_path / "rows", tmp_path / "again").identical == manifest.shards
    reencode(tmp_path / "again", tmp_path / "fast", "fast")
    for name in ("again", "fast"):
        cache = open_cache(tmp_path / name)
        np.testing.assert_array_equal(cache.starts(range(7)), made.document_starts(manifest))


def _written(root, change):
    """A cache whose second shard was made from something else."""
    manifest = _manifest()
    writer = CacheWriter(root, manifest)
    for index in range(manifest.shards):
        tokens, targets, rounding, starts = made.shard_data(manifest, index)
        starts = starts.copy()
        if index == 1:
            targets = change(starts, targets)
        writer.write_shard(index, tokens, targets, rounding, starts)
    return verify(root)


def test_verify_sees_where_beginnings_do_not_fit(tmp_path):
    def same(starts, targets):
        return targets

    def other_seam(starts, targets):
        starts[0, 0] = not starts[0, 0]
        return targets

    def other_seam_within(starts, targets):
        starts[1, 0] = not starts[1, 0]
        return targets

    def kept_across(starts, targets):
        starts[1, 3:] = True
        return targets

    assert _written(tmp_path / "a", same).sound
    assert [f.kind for f in _written(tmp_path / "b", other_seam).findings] == ["chain"]
    assert [(f.shard, f.kind) for f in _written(tmp_path / "c", other_seam_within).findings] == [(1, "chain")]
    (found,) = _written(tmp_path / "d", kept_across).findings
    assert found.kind == "rows"
    assert "sequence 4: a row has entries though its label begins another document" in found.what


def test_beginnings_are_given_just_where_the_packing_has_them(tmp_path):
    with_starts, without = _manifest(), made.manifest(SamplerSpec(draws=20))
    tokens, targets, rounding, starts = made.shard_data(with_starts, 0)
    with pytest.raises(ValueError, match=r"`starts_SL1` of shard 0 came as \[\], wanted \[3, 17\]"):
        CacheWriter(tmp_path / "a", with_starts).write_shard(0, tokens, targets, rounding)
    with pytest.raises(ValueError, match=r"`starts_SL1` of shard 0 came as \[3, 17\], wanted \[\]"):
        CacheWriter(tmp_path / "b", without).write_shard(0, tokens, targets, rounding, starts)
