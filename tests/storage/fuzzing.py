"""Broken caches by the thousand: mutations of files, and what a read of them may do.

A read may raise an error of ours, or give rows that keep every promise of docs/format.md. Anything else is a finding:
another exception, a hang, a row that is not one.

Shapes: `S` sequences of a shard, `E` entries, `R` rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np

from stillroom.storage import strict
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import StillroomError
from stillroom.storage.index import write_index
from stillroom.storage.spec import SamplerSpec

SPECS = {
    "threshold": SamplerSpec(draws=20),
    "random": SamplerSpec(kind="random", draws=20, keep_logp="head"),
    "exponent": SamplerSpec(kind="random", draws=20, exponent=0.7, keep_logp="none"),
    "top_p": SamplerSpec(kind="top_p", draws=30, top_p=0.8),
    "fast": SamplerSpec(draws=20),
    "fast-random": SamplerSpec(kind="random", draws=20, keep_logp="none"),
    "small": SamplerSpec(draws=20),
    "small-random": SamplerSpec(kind="random", draws=20, keep_logp="none"),
}
INDEX = 16
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def make(made, root: Path, name: str) -> Path:
    """A cache of two shards, small enough to read in a few milliseconds."""
    profile = name.split("-")[0] if name.startswith(("fast", "small")) else "standard"
    vocab_size = 400 if profile == "small" else 70_000  # its table of ranks has an entry for each id
    made.write(
        root,
        made.manifest(
            SPECS[name], vocab_size=vocab_size, seq_len=8, sequences=3, sequences_per_shard=2, profile=profile
        ),
    )
    write_index(root)
    return root


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def records(root: Path) -> dict[Path, dict]:
    return {path: json.loads(path.read_text()) for path in sorted((root / "commits").glob("*.json"))}


@dataclass
class Copy:
    """One cache on disk that is broken and mended again and again."""

    root: Path

    def __post_init__(self) -> None:
        self.whole = {path: path.read_bytes() for path in files(self.root)}
        self.rows = read(self.root)
        self.dirty: set[Path] = set()

    def put(self, path: Path, data: bytes) -> None:
        """Overwrite a file; `mend` takes it back."""
        path.write_bytes(data)
        self.dirty.add(path)

    def mend(self) -> None:
        """Take back what `put` did."""
        for path in self.dirty:
            path.write_bytes(self.whole[path])
        self.dirty.clear()

    def restore(self) -> None:
        """Take back whatever was done."""
        self.dirty.clear()
        for path in files(self.root):
            if path not in self.whole:
                path.unlink()
        for path, data in self.whole.items():
            if path.is_symlink() or not path.is_file():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.stat().st_size != len(data) or path.read_bytes() != data:
                path.write_bytes(data)

    def objects(self) -> list[tuple[Path, Path]]:
        """Record and path of every shard object."""
        return [
            (record, self.root / data["path"] / item["name"])
            for record, data in records(self.root).items()
            for item in data["objects"]
            if not item["name"].endswith("zarr.json")
        ]

    def forge(self, record: Path, path: Path, data: bytes) -> None:
        """Put `data` in the place of an object, and make its record agree."""
        self.put(path, data)
        body = json.loads(record.read_text())
        for item in body["objects"]:
            if self.root / body["path"] / item["name"] == path:
                item |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.put(record, json.dumps(strict.sealed(body)).encode())


def read(root: Path, reader: str = "direct"):
    cache = open_cache(root, reader=reader)
    return cache.read(range(len(cache)))


def same(a, b) -> bool:
    """Are two batches equal to the last bit?"""
    pairs = [(a.tokens, b.tokens)] + [
        (getattr(a.targets, name), getattr(b.targets, name))
        for name in ("offsets", "ids", "weights", "label_logp", "entropy", "logp")
    ]
    return all(
        (x is None and y is None)
        or (
            x is not None
            and y is not None
            and x.dtype == y.dtype
            and np.array_equal(x.view(np.uint8), y.view(np.uint8))
        )
        for x, y in pairs
    )


def attempt(root: Path, reader: str = "direct", **options):
    """The rows, checked, or None where an error of ours came; any other exception is the finding."""
    try:
        cache = open_cache(root, reader=reader, **options)
        batch = cache.read(range(min(len(cache), 64)))
        assert cache.entries >= 0
        assert min(cache.bytes_by_array().values()) > 0
    except StillroomError as error:
        str(error).encode("utf-8", "backslashreplace")
        return None
    # Of profile `fast` the weights themselves are stored; they come as they are where that is enough.
    check_rows(cache.manifest, batch, sums=not (cache.manifest.profile == "fast" and batch.targets.logp is None))
    return batch


def check_rows(manifest, batch, *, sums: bool = True) -> None:
    """What docs/format.md promises of every row that a read gives."""
    spec, targets = manifest.sampler, batch.targets
    n_R = np.diff(targets.offsets)
    assert targets.rows == len(batch.tokens) * manifest.packing.seq_len
    assert batch.tokens.max(initial=0) < max(manifest.vocab_size, manifest.tokenizer.vocab_size)
    assert n_R.max(initial=0) <= spec.draws + (spec.kind == "threshold")
    assert targets.ids.min(initial=0) >= 0
    assert targets.ids.max(initial=0) < manifest.vocab_size
    assert np.all(np.isfinite(targets.weights))
    assert targets.weights.min(initial=0) >= 0
    if not sums:
        return
    row_E = np.repeat(np.arange(targets.rows), n_R)
    sum_R = np.bincount(row_E, targets.weights.astype(np.float64), targets.rows)[n_R > 0]
    if spec.kind == "threshold":
        assert np.all(sum_R == 1)
    elif spec.kind in ("top_k", "top_p"):
        assert np.all(sum_R <= 1 + 1e-6)
    elif spec.exponent == 1.0:
        count_E = targets.weights.astype(np.float64) * spec.draws
        np.testing.assert_allclose(count_E, np.rint(count_E), atol=1e-3)
        np.testing.assert_allclose(sum_R, 1, atol=1e-4)


# --- bytes


def mutate_bytes(rng, data: bytes) -> bytes:
    """One change a broken disk, a cut download or a careless editor makes."""
    raw = bytearray(data)
    place = int(rng.integers(len(raw) + 1))
    kind = rng.integers(7)
    if kind == 0 and raw:
        raw[place % len(raw)] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        raw[place : place + 4] = rng.bytes(4)
    elif kind == 2:
        del raw[place : place + int(rng.integers(1, 9))]
    elif kind == 3:
        raw[place:place] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 4:
        del raw[place:]
    elif kind == 5:
        raw[place:place] = raw[: int(rng.integers(1, 64))]
    else:
        edges = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
        raw[place : place + 8] = edges[rng.integers(len(edges))].to_bytes(8, "little")
    return bytes(raw)


def split(data: bytes, sequences: int) -> list[bytes]:
    """The compressed chunks of a shard object."""
    table = np.frombuffer(data[-4 - INDEX * sequences : -4], "<u8").reshape(-1, 2).astype(int)
    return [data[start : start + size] for start, size in table.tolist()]


def unpack(chunk: bytes) -> bytes:
    """The elements of a chunk of zstd; what is before the checksum of any other."""
    return bytes(numcodecs.Zstd().decode(chunk)) if chunk[:4] == ZSTD_MAGIC else chunk[:-4]


def pack(raw: bytes, like: bytes) -> bytes:
    """Inverse of `unpack`, in the way of `like`."""
    if like[:4] == ZSTD_MAGIC:
        return bytes(numcodecs.Zstd(level=1, checksum=True).encode(raw))
    return raw + google_crc32c.value(raw).to_bytes(4, "little")


def join(chunks: list[bytes], table: np.ndarray | None = None) -> bytes:
    """A shard object of these chunks, its index and the CRC of its index right (or `table`, with a right CRC)."""
    if table is None:
        sizes = np.array([len(chunk) for chunk in chunks], np.uint64)
        table = np.stack([np.cumsum(sizes) - sizes, sizes], 1)
    index = table.astype("<u8").tobytes()
    return b"".join([*chunks, index, google_crc32c.value(index).to_bytes(4, "little")])


def forge_object(rng, data: bytes, sequences: int) -> bytes:
    """What somebody who knows the format would plant: the CRC of the index is right, the rest is theirs."""
    chunks = split(data, sequences)
    which = int(rng.integers(sequences))
    kind = rng.integers(6)
    if kind == 0:  # another index
        table = np.frombuffer(data[-4 - INDEX * sequences : -4], "<u8").reshape(-1, 2).copy()
        table[which, rng.integers(2)] = rng.choice(
            np.array([0, 1, len(data), 2**32, 2**63, 2**64 - 1, int(rng.integers(1 << 20))], np.uint64)
        )
        return join(chunks, table)
    if kind == 1:  # a frame that is broken
        chunks[which] = mutate_bytes(rng, chunks[which])
    elif kind == 2:  # a frame that is broken but for its checksum
        if chunks[which][:4] == ZSTD_MAGIC:
            plain = numcodecs.Zstd(level=1, checksum=False).encode(unpack(chunks[which]))
            chunks[which] = mutate_bytes(rng, bytes(plain))
        else:
            chunks[which] = pack(mutate_bytes(rng, unpack(chunks[which])), chunks[which])
    elif kind == 3:  # other elements
        raw = bytearray(unpack(chunks[which]))
        for _ in range(int(rng.integers(1, 5))):
            raw[int(rng.integers(len(raw)))] = int(rng.choice([0, 1, 2, 63, 64, 127, 255, int(rng.integers(256))]))
        chunks[which] = pack(bytes(raw), chunks[which])
    elif kind == 4:  # a chunk of another size
        chunks[which] = pack(mutate_bytes(rng, unpack(chunks[which])) or b"\0", chunks[which])
    else:  # one for another
        chunks[which] = chunks[int(rng.integers(sequences))]
    return join(chunks)


def chunks_of(record: Path, path: Path) -> int:
    """How many chunks an object has: one a sequence, but for the one table of profile `small`."""
    if "id_of_rank" in path.parts:
        return 1
    body = json.loads(record.read_text())
    return body["stop"] - body["start"]


# --- JSON

HOSTILE = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 10**400, -(2**70), 0.5, 1e308, -0.0, "", "x", "../../etc/passwd",
    "/etc/passwd", "shards/../../x.zarr", "shards/000000-0123456789abcdef.zarr", "https://elsewhere/x", "\0", "\ud800",
    "\x1b[2J", "0" * 64, "9" * 5000, [], [[]], {}, {"x": 1}, [0] * 100, [2**64, -1], "threshold", "random", "top_k", "none",
]  # fmt: skip


def places(value, at=()) -> list[tuple]:
    """Path of every value in a JSON tree."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


def mutate_json(rng, data: dict) -> dict:
    """One hostile change of one place of a JSON object."""
    data = json.loads(json.dumps(data))
    options = [place for place in places(data) if place]
    *parents, last = options[int(rng.integers(len(options)))]
    holder = data
    for key in parents:
        holder = holder[key]
    kind = rng.integers(5)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(rng.choice(["surprise", "", "__class__", "\u202e", "path"]))] = HOSTILE[rng.integers(len(HOSTILE))]
    elif kind == 2 and isinstance(holder[last], int) and not isinstance(holder[last], bool):
        holder[last] += int(rng.choice([-8, -1, 1, 8, 255, 2**16, 2**40, -holder[last]]))
    elif kind == 3 and isinstance(holder, list) and holder:
        holder.append(holder[0])
    else:
        holder[last] = HOSTILE[rng.integers(len(HOSTILE))]
    return data


def pick(rng, copy: Copy) -> tuple[Path, Path]:
    objects = copy.objects()
    return objects[int(rng.integers(len(objects)))]


def break_once(rng, copy: Copy) -> str:
    """Break one thing of a whole cache; says what. `Copy.mend` takes it back."""
    kind = rng.integers(13) // 2
    if kind == 6:
        path = copy.root / "index.arrow"
        copy.put(path, mutate_bytes(rng, path.read_bytes()))
        return "changed index.arrow"
    if kind < 2:
        record, path = pick(rng, copy)
        copy.forge(record, path, forge_object(rng, path.read_bytes(), chunks_of(record, path)))
        return f"forged {path.relative_to(copy.root)}"
    if kind == 2:
        record, path = pick(rng, copy)
        copy.forge(record, path, mutate_bytes(rng, path.read_bytes()))
        return f"changed {path.relative_to(copy.root)}"
    texts = [path for path in copy.whole if path.suffix == ".json"]
    # Half of the time a record or the manifest, of which there are few.
    few = [path for path in texts if path.name != "zarr.json"]
    some = few if rng.integers(2) else texts
    path = some[int(rng.integers(len(some)))]
    if kind == 3:
        data = mutate_bytes(rng, path.read_bytes())
    else:
        body = mutate_json(rng, json.loads(path.read_text()))
        if path.name != "zarr.json" and rng.integers(8) and "sha256" in body:
            body = strict.sealed(body)
        data = json.dumps(body).encode("utf-8", "surrogatepass")
    copy.put(path, data)
    return f"changed {path.relative_to(copy.root)}"
