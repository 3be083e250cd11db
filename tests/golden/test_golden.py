"""Caches written by earlier versions must decode for ever to the same numbers.

A golden that is missing or reads otherwise is a failure of the reader, never a reason to write it anew; how a new one is
made is in `make_golden.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.cache import open_cache

HERE = Path(__file__).parent
VERSION_1 = {
    "threshold", "threshold-head", "threshold-wide", "random", "random-head", "random-all", "random-wide",
    "random-exponent", "systematic", "top_k", "top_p", "threshold-fast", "random-fast",
    "threshold-small", "random-small", "threshold-documents",
}  # fmt: skip
NAMES = sorted(VERSION_1 | {path.parent.name for path in HERE.glob("*/expected.json")})
DTYPES = {
    "offsets": np.int64, "ids": np.int32, "weights": np.float32,
    "label_logp": np.float32, "entropy": np.float32, "logp": np.float32,
}  # fmt: skip


# zarr-python says of pcodec that other libraries may not know it: that is the price of profile `small`.
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
@pytest.mark.parametrize("reader", ["direct", "zarr"])
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, reader):
    expected = json.loads((HERE / name / "expected.json").read_text())
    cache = open_cache(HERE / name / "cache", reader=reader)
    tokens, targets = cache.read(range(len(cache)))
    assert tokens.tolist() == expected["tokens"]
    starts = cache.starts(range(len(cache)))
    assert (None if starts is None else starts.astype(int).tolist()) == expected.get("starts")
    for field, dtype in DTYPES.items():
        came = getattr(targets, field)
        if expected[field] is None:
            assert came is None, field
        else:
            np.testing.assert_array_equal(came, np.array(expected[field], dtype), err_msg=field)  # to the last bit
