"""The long fuzz, by hand: `make fuzz`, or `python tests/storage/fuzz.py --seconds 600`.

With atheris installed (`pip install 'stillroom[fuzz]'`) it is guided by the coverage of the storage code: the bytes it
invents are laid over one object, chunk or JSON file of a whole cache, checksums, hashes and seals made right again, and the
cache is read. Without it, the seeded loop of the test suite runs, each round with a seed of its own. What is a finding is
in `fuzzing.py`; its input is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

try:
    import atheris
except ImportError:
    atheris = None

if atheris is None:
    import fuzzing
    import made
else:
    with atheris.instrument_imports(include=["stillroom.storage"]):
        import fuzzing
        import made

from stillroom.storage import strict


def overlay(data: bytes, over: bytes) -> bytes:
    """`data` with the bytes of `over` laid upon it by exclusive or: zeros change nothing."""
    size = max(len(data), len(over))
    left, right = (np.frombuffer(part.ljust(size, b"\0"), np.uint8) for part in (data, over))
    return (left ^ right).tobytes()


class Target:
    """Caches to break, and one break for each input."""

    def __init__(self, root: Path) -> None:
        self.copies = [fuzzing.Copy(fuzzing.make(made, root / name, name)) for name in fuzzing.SPECS]
        self.objects = [copy.objects() for copy in self.copies]

    def one(self, data: bytes) -> None:
        """Break a cache as `data` says, read it, mend it."""
        if len(data) < 4:
            return
        which = data[0] % len(self.copies)
        copy, objects, over = self.copies[which], self.objects[which], data[4:]
        record, path = objects[data[1] % len(objects)]
        whole = copy.whole[path]
        kind = data[2] % 5
        if kind == 0:
            copy.forge(record, path, overlay(whole, over))
        elif kind in (1, 2):
            chunks = fuzzing.split(whole, fuzzing.chunks_of(record, path))
            place = data[3] % len(chunks)
            if kind == 1:
                chunks[place] = overlay(chunks[place], over)
            else:
                chunks[place] = fuzzing.pack(overlay(fuzzing.unpack(chunks[place]), over), chunks[place])
            copy.forge(record, path, fuzzing.join(chunks))
        elif kind == 3:
            text = (copy.root / "manifest.json", record, copy.root / "index.arrow")[data[3] % 3]
            copy.put(text, overlay(copy.whole[text], over))
        else:
            text = (copy.root / "manifest.json", record)[data[3] % 2]
            try:
                body = strict.sealed(json.loads(overlay(copy.whole[text], over)))
                copy.put(text, json.dumps(body).encode())
            except (ValueError, AttributeError, RecursionError):
                copy.put(text, over)
        try:
            fuzzing.attempt(copy.root)
            fuzzing.attempt(copy.root, columns=())
        finally:
            copy.mend()


def guided(target: Target, seconds: int, corpus: Path) -> None:
    """libFuzzer's loop; it ends the process."""
    corpus.mkdir(parents=True, exist_ok=True)
    for cache in range(len(target.copies)):
        for kind in range(5):
            (corpus / f"seed-{cache}-{kind}").write_bytes(bytes([cache, 7, kind, 0]))
    options = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=3072",
        "-max_len=2048",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.one)
    atheris.Fuzz()


def plain(target: Target, seconds: int) -> None:
    """The loop of the test suite, with new seeds until the time is up."""
    end_s, rounds = time.monotonic() + seconds, 0
    for seed in itertools.count(int(time.time())):
        rng = np.random.default_rng(seed)
        for i in range(200):
            copy = target.copies[i % len(target.copies)]
            what = fuzzing.break_once(rng, copy)
            try:
                fuzzing.attempt(copy.root)
            except Exception as error:
                error.add_note(f"round {i} of seed {seed}: {what}")
                raise
            finally:
                copy.mend()
            rounds += 1
        if time.monotonic() > end_s:
            break
    print(f"{rounds} rounds, no finding")


def main() -> None:
    """Fuzz for a while."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, default=Path("runs/fuzz"), help="inputs worth keeping (guided)")
    parser.add_argument("--plain", action="store_true", help="not guided, though atheris is there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        if atheris is None or arguments.plain:
            plain(target, arguments.seconds)
        else:
            guided(target, arguments.seconds, arguments.corpus)


if __name__ == "__main__":
    main()
