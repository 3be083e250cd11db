"""Makes the golden caches: `python tests/storage/make_golden.py NEW_FOLDER`.

Run it only when a new format version needs goldens of its own, and keep the old ones: `test_golden_bytes` must go on
reading them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import made

from stillroom.storage.cache import open_cache
from stillroom.storage.spec import SamplerSpec


def main(folder: Path) -> None:
    for spec in (SamplerSpec(draws=20), SamplerSpec(kind="random", draws=12, keep_logp="none")):
        root = folder / spec.kind
        root.mkdir(parents=True)
        made.write(
            root / "cache", made.manifest(spec, vocab_size=70_000, seq_len=8, sequences=2, sequences_per_shard=2)
        )
        tokens, targets = open_cache(root / "cache").read([0, 1])
        fields = {
            name: getattr(targets, name) for name in ("offsets", "ids", "weights", "label_logp", "entropy", "logp")
        }
        expected = {"tokens": tokens.tolist()} | {k: None if v is None else v.tolist() for k, v in fields.items()}
        (root / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
