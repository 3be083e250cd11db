"""Makes golden caches of the format's present version: `python tests/golden/make_golden.py --write [NAME ...]`.

A golden is for ever: what is there is never written over. Run it when a new format version or a new kind of record needs
goldens of its own, under new names, and keep the old ones: `test_golden.py` must go on reading them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "storage"))

import made  # noqa: E402

from stillroom.storage.cache import open_cache  # noqa: E402
from stillroom.storage.manifest import PackingInfo  # noqa: E402
from stillroom.storage.spec import SamplerSpec  # noqa: E402

FIELDS = ("offsets", "ids", "weights", "label_logp", "entropy", "logp")
SPECS = {
    "threshold": SamplerSpec(draws=20),
    "threshold-head": SamplerSpec(draws=20, keep_logp="head"),
    "threshold-wide": SamplerSpec(draws=300),  # lengths and tail mass in 16 bits
    "random": SamplerSpec(kind="random", draws=12, keep_logp="none"),
    "random-head": SamplerSpec(kind="random", draws=12, keep_logp="head"),
    "random-all": SamplerSpec(kind="random", draws=12, keep_logp="all"),
    "random-wide": SamplerSpec(kind="random", draws=300, keep_logp="none"),  # counts in 16 bits
    "random-exponent": SamplerSpec(kind="random", draws=12, exponent=0.7, keep_logp="none"),
    "systematic": SamplerSpec(kind="systematic", draws=12, keep_logp="none"),
    "top_k": SamplerSpec(kind="top_k", draws=10),
    "top_p": SamplerSpec(kind="top_p", draws=20, top_p=0.8),
    "threshold-fast": SamplerSpec(draws=20),
    "random-fast": SamplerSpec(kind="random", draws=12, keep_logp="none"),
    "threshold-small": SamplerSpec(draws=20),
    "random-small": SamplerSpec(kind="random", draws=12, keep_logp="all"),
    "threshold-documents": SamplerSpec(draws=20),
}


def write(name: str) -> None:
    """One golden: the cache, and what it decodes to."""
    folder = HERE / name
    folder.mkdir()  # fails where there is one
    # Two vocabularies: ids in 16 bits, ids with bit planes above them; and one cache of several shards.
    profile = name.split("-")[-1] if name.endswith(("fast", "small")) else "standard"
    vocab_size = 5000 if name == "systematic" or profile == "small" else 70_000
    sequences = 3 if name == "threshold" else 2
    packing = PackingInfo(policy="documents" if name.endswith("documents") else "concat", seq_len=8)
    size = {"vocab_size": vocab_size, "sequences": sequences, "sequences_per_shard": 2}
    plan = made.manifest(SPECS[name], packing=packing, profile=profile, **size)
    made.write(folder / "cache", plan)
    tokens, targets = open_cache(folder / "cache").read(range(sequences))
    fields = {field: getattr(targets, field) for field in FIELDS}
    expected = {"tokens": tokens.tolist()} | {k: None if v is None else v.tolist() for k, v in fields.items()}
    if (starts := open_cache(folder / "cache").starts(range(sequences))) is not None:
        expected["starts"] = starts.astype(int).tolist()
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    """Write the goldens named, or all that are not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="yes, write new goldens")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    for name in arguments.names or [name for name in SPECS if not (HERE / name).exists()]:
        write(name)
        print("wrote", name)


if __name__ == "__main__":
    main()
