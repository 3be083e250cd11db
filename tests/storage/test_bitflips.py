"""One bit flipped anywhere in a cache: a full verify names it, and no read gives a wrong row without an error."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import StillroomError
from stillroom.storage.verify import verify

_spec = importlib.util.spec_from_file_location("fuzzing", Path(__file__).with_name("fuzzing.py"))
fuzzing = importlib.util.module_from_spec(_spec)
sys.modules["fuzzing"] = fuzzing
_spec.loader.exec_module(fuzzing)


pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")


def flip(rng, copy) -> Path:
    """Flip one bit: one time in four of Zarr's metadata, else of what the rows hang on, by files or by bytes."""
    metadata = rng.integers(4) == 0
    paths = sorted(path for path in copy.whole if (path.name == "zarr.json") == metadata)
    sizes = np.array([len(copy.whole[path]) for path in paths])
    path = paths[int(rng.choice(len(paths), p=None if rng.integers(2) else sizes / sizes.sum()))]
    data = bytearray(copy.whole[path])
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    copy.put(path, bytes(data))
    return path


def run(copy, reader: str, flips: int, seed: int) -> dict[str, int]:
    """Flip, read, verify; how many flips a read refused, and how many were in bytes that it does not use."""
    rng = np.random.default_rng(seed)
    ends, before = {"refused": 0, "not read": 0}, totals(copy.root)
    for i in range(flips):
        path = flip(rng, copy)
        where = f"flip {i} of seed {seed} in {path.relative_to(copy.root)}"
        try:
            try:
                batch = fuzzing.read(copy.root, reader)
                assert fuzzing.same(batch, copy.rows), f"a wrong row without an error: {where}"
                ends["not read"] += 1
            except StillroomError:
                ends["refused"] += 1
            # index.arrow is a copy, and some of its bytes are padding: what it says is what counts.
            unharmed = path.name == "index.arrow" and totals(copy.root) == before
            assert damage(copy.root) or unharmed, f"not detected: {where}"
        finally:
            copy.mend()
    return ends


def totals(root: Path):
    """What a cache says of itself as a whole, for which it asks the index."""
    cache = open_cache(root)
    return cache.entries, cache.bytes_by_array()


def damage(root: Path) -> bool:
    """Does a full verify find anything?"""
    try:
        return not verify(root, hashes=True, sample=1).sound  # hashes alone are enough, and quicker than every row
    except StillroomError:
        return True


@pytest.fixture
def copy(made, tmp_path, request):
    return fuzzing.Copy(fuzzing.make(made, tmp_path / "cache", request.param))


@pytest.mark.parametrize("copy", ["threshold"], indirect=True)
def test_flips(copy):
    assert not damage(copy.root)
    ends = run(copy, "direct", 80, seed=0)
    print(ends)
    assert ends["refused"] > 40
    assert not damage(copy.root)


@pytest.mark.slow
@pytest.mark.parametrize("copy", list(fuzzing.SPECS), indirect=True)
@pytest.mark.parametrize(("reader", "flips"), [("direct", 1500), ("zarr", 200)])
def test_more_flips(copy, reader, flips):
    print(reader, run(copy, reader, flips, seed=1))
