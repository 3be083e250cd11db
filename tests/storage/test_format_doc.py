"""docs/format.md: its recipes run as they are printed, and its tables name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage import commits, layout, manifest, strict
from stillroom.storage.cache import open_cache
from stillroom.storage.manifest import PackingInfo
from stillroom.storage.spec import SamplerSpec

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
BLOCKS = dict(re.findall(r"^```python ([\w-]+)\n(.*?)^```$", PAGE, re.M | re.S))
SPECS = {
    "threshold": [SamplerSpec(draws=20), SamplerSpec(draws=300, keep_logp="head"), SamplerSpec(draws=1)],
    "counts": [
        SamplerSpec(kind="random", draws=30, keep_logp="none"),
        SamplerSpec(kind="random", draws=400, keep_logp="head"),
        SamplerSpec(kind="systematic", draws=40, keep_logp="all"),
    ],
}


def run(recipe: str, library: str, path: Path, sequence: int):
    """The rows that the printed lines give for one sequence of a shard."""
    rows = []
    scope = {"path": path, "i": sequence, "collect": lambda ids, weights: rows.append((ids, weights))}
    exec(BLOCKS[f"open-{library}"] + BLOCKS[recipe], scope)
    return rows


@pytest.mark.parametrize("library", ["zarr", "tensorstore"])
@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("recipe", ["threshold", "counts"])
def test_the_recipes_as_printed(made, tmp_path, recipe, vocab_size, library):
    for number, spec in enumerate(SPECS[recipe]):
        root = tmp_path / str(number)
        made.write(root, made.manifest(spec, vocab_size=vocab_size, sequences=3, sequences_per_shard=2))
        cache = open_cache(root)
        for index in range(3):
            targets = cache[index].targets
            rows = run(recipe, library, root / cache.record(cache.shard_of(index)).path, index % 2)
            np.testing.assert_array_equal([len(ids) for ids, _ in rows], np.diff(targets.offsets))
            np.testing.assert_array_equal(np.concatenate([ids for ids, _ in rows]), targets.ids)
            weights = np.concatenate([weights for _, weights in rows]).astype(np.float32)
            np.testing.assert_array_equal(weights, targets.weights)  # to the last bit


def test_a_recipe_is_about_ten_lines():
    for name in ("threshold", "counts"):
        assert len(BLOCKS[name].splitlines()) <= 12, name


def test_the_table_of_arrays_is_the_layout(made):
    documented = dict(re.findall(r"^\| `(\w+)` \| (\[S[^|]*\]) \|", PAGE, re.M))
    specs = [spec for group in SPECS.values() for spec in group]
    specs += [SamplerSpec(kind="top_k", draws=9), SamplerSpec(kind="random", exponent=0.5, draws=9, keep_logp="none")]
    documents = PackingInfo(policy="documents", seq_len=16)
    runs = {"token": "[S, L+1]", "row": "[S, L]", "entry": "[S, cap]", "head": "[S, hcap]", "tail": "[S, tcap]"}
    used = {
        array.name: "[S, k, cap/8]" if array.planes else runs[array.run]
        for spec in specs
        for array in layout.arrays_of(made.manifest(spec, vocab_size=70_000, packing=documents))
    }
    assert used == documented


def test_the_tables_of_keys_are_the_files(made, tmp_path):
    made.write(tmp_path, made.manifest(SamplerSpec(draws=9)))
    sections = dict(re.findall(r"^### (\S+\.json)\n(.*?)(?=^##)", PAGE, re.M | re.S))
    for name, path in (("manifest.json", "manifest.json"), ("commits/NNNNNN.json", "commits/000000.json")):
        keys = set()
        for cell in re.findall(r"^\| (`[^|]*) \|", sections[name], re.M):
            keys |= set(re.findall(r"`(\w+)`", cell))
        assert keys - {"profile", "fast", "small"} == set(strict.load_file(tmp_path / path)), name


def test_the_limits_are_the_code():
    assert f"L above {manifest.MAX_SEQ_LEN:,}" in PAGE
    assert f"more than {manifest.MAX_SEQUENCES_PER_SHARD:,}\nsequences a shard" in PAGE
    assert (
        f"a chunk of more than {commits.FREE_CHUNK_BYTES >> 20} MiB in a shard\nthat weighs less than a {commits.MAX_UNFOLDING}th"
        in PAGE
    )
    assert strict.MAX_JSON_BYTES == 1 << 20
    assert f"# The cache on disk, format version {manifest.FORMAT_VERSION}\n" in PAGE


def test_the_seal_as_described(made, tmp_path):
    import hashlib
    import json

    made.write(tmp_path, made.manifest(SamplerSpec(draws=9)))
    for path in (tmp_path / "manifest.json", tmp_path / "commits/000000.json"):
        rest = json.loads(path.read_text())
        seal = rest.pop("sha256")
        assert hashlib.sha256((json.dumps(rest, indent=1, sort_keys=True) + "\n").encode()).hexdigest() == seal
