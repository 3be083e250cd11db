"""Hostile caches: every read ends, in an error of ours or in rows that keep the promises of docs/format.md.

The bounded share of `make fuzz`: seeded loops over bytes, hypothesis over structure, and the memory a read may take.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import numcodecs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from stillroom.storage import strict
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import DamagedError, FormatError, StillroomError

_spec = importlib.util.spec_from_file_location("fuzzing", Path(__file__).with_name("fuzzing.py"))
fuzzing = importlib.util.module_from_spec(_spec)
sys.modules["fuzzing"] = fuzzing
_spec.loader.exec_module(fuzzing)


pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")


@pytest.fixture(scope="module")
def copies(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    return {name: fuzzing.Copy(fuzzing.make(made, root / name, name)) for name in fuzzing.SPECS}


@pytest.fixture
def copy(copies):
    yield copies["threshold"]
    copies["threshold"].restore()


def loop(copies, reader: str, rounds: int, seed: int) -> dict[str, int]:
    """Break and read `rounds` times; how many ended in which way."""
    rng = np.random.default_rng(seed)
    ends = {"refused": 0, "unchanged": 0, "other rows": 0}
    for i in range(rounds):
        copy = list(copies.values())[i % len(copies)]
        what = fuzzing.break_once(rng, copy)
        start_s = time.perf_counter()
        try:
            fuzzing.attempt(copy.root, reader, columns=("tokens",))  # takes a way of its own
            batch = fuzzing.attempt(copy.root, reader)
        except Exception as error:
            error.add_note(f"round {i} of seed {seed}, {reader}: {what}")
            raise
        finally:
            copy.mend()
        assert time.perf_counter() - start_s < 10, what
        ends["refused" if batch is None else "unchanged" if fuzzing.same(batch, copy.rows) else "other rows"] += 1
    return ends


@pytest.mark.parametrize(("reader", "rounds"), [("direct", 200), ("zarr", 24)])
def test_a_broken_cache_is_refused_or_keeps_its_promises(copies, reader, rounds):
    ends = loop(copies, reader, rounds, seed=3)
    print(reader, ends)
    assert ends["refused"] > rounds // 2  # the mutations do bite


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("reader", "rounds"), [("direct", 12_000), ("zarr", 1500)])
def test_a_broken_cache_many_times(copies, reader, rounds):
    print(reader, loop(copies, reader, rounds, seed=4))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(2**63, 2**80) | st.floats() | st.text(max_size=8)
    | st.sampled_from(fuzzing.HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_structure(copies, data):
    # Any value in any place of any JSON file, sealed again as a forger would; through the direct reader.
    copy = copies[data.draw(st.sampled_from(list(copies)))]
    path = data.draw(st.sampled_from([p for p in copy.whole if p.suffix == ".json" and p.name != "zarr.json"]))
    body = json.loads(copy.whole[path])
    *parents, last = data.draw(st.sampled_from([place for place in fuzzing.places(body) if place]))
    holder = body
    for key in parents:
        holder = holder[key]
    holder[last] = data.draw(JSON)
    try:
        text = json.dumps(strict.sealed(body))
    except (ValueError, RecursionError):  # NaN has no seal
        text = json.dumps(body)
    try:
        copy.put(path, text.encode("utf-8", "surrogatepass"))
        fuzzing.attempt(copy.root)
    finally:
        copy.mend()


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 50_000, "[" * 200_000, '{"shard": 1, "shard": 1}', '{"a": 1e999}', "\ufeff{}", '{"a": ' + "9" * 5000 + "}",
     '{"a": -Infinity}', " " * (1 << 20) + "{}", '"x"', "null", ""],
    ids=["deep-object", "deep-list", "twice", "infinite", "mark", "digits", "minus-infinity", "long", "text", "null", "empty"],
)  # fmt: skip
@pytest.mark.parametrize("reader", ["direct", "zarr"])
def test_texts_that_are_no_json_of_ours(copy, text, reader):
    for path in some_files(copy):
        if path.suffix == ".json":
            copy.put(path, text.encode())
            batch = fuzzing.attempt(copy.root, reader)
            # The direct reader does not open zarr.json but for its size.
            assert batch is None or (path.name == "zarr.json" and fuzzing.same(batch, copy.rows)), path
            copy.mend()


def some_files(copy) -> list[Path]:
    """One file of every kind."""
    group = next(copy.root.glob("shards/000000-*"))
    parts = ("zarr.json", "n/zarr.json", "n/c/0/0")
    return [copy.root / "manifest.json", copy.root / "commits/000000.json", *(group / part for part in parts)]


def replace(path: Path, kind: str, elsewhere: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link out":
        (elsewhere / "secret").write_bytes(data)
        path.symlink_to(elsewhere / "secret")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "hole":
        with path.open("wb") as file:
            file.truncate(1 << 40)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link out", "link to itself", "device", "hole", "gone"])
def test_things_that_are_no_files(copy, tmp_path, kind):
    # A pipe would wait for ever, a device never end, a link lead to somebody's secrets.
    for path in some_files(copy):
        for reader in ("direct", "zarr"):
            replace(path, kind, tmp_path)
            start_s = time.perf_counter()
            if kind == "link out" and path.suffix == ".json" and path.name != "zarr.json":
                fuzzing.attempt(copy.root, reader)  # a linked manifest or record is read: it is JSON of ours or refused
            else:
                with pytest.raises(StillroomError):
                    fuzzing.read(copy.root, reader)
            assert time.perf_counter() - start_s < 10
            copy.restore()


@pytest.mark.parametrize("folder", ["shards", "commits"])
def test_linked_folders(copy, tmp_path, folder):
    (copy.root / folder).rename(tmp_path / folder)
    (copy.root / folder).symlink_to(tmp_path / folder)
    if folder == "shards":
        with pytest.raises(DamagedError, match="leads out of the cache"):
            fuzzing.read(copy.root)
    else:
        assert fuzzing.same(fuzzing.read(copy.root), copy.rows)
    (copy.root / folder).unlink()
    (tmp_path / folder).rename(copy.root / folder)


# --- memory

LIMIT = 1 << 26  # bytes a refusal may cost; the chunks of these caches are below 10 kB

CHILD = """
import json, os, resource, sys
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import StillroomError
import zarr, zarr.codecs

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

open_cache(sys.argv[1], reader="zarr").read([0])  # what is loaded late is loaded now
found = {}
for path in sys.argv[3:]:
    for reader in ("direct", "zarr"):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            start = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) << 10
            size = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
            resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]),) * 2)
            try:
                cache = open_cache(path, reader=reader)
                cache.read(range(min(len(cache), 4)))
                end = "rows"
            except StillroomError as error:
                end = type(error).__name__
            except BaseException as error:
                end = "finding: " + repr(error)[:200]
            os.write(write, json.dumps([end, max(0, peak() - start)]).encode())
            os._exit(0)
        os.close(write)
        text = os.read(read, 4096)
        os.waitpid(child, 0)
        os.close(read)
        found[os.path.basename(path) + " " + reader] = json.loads(text) if text else ["finding: died", 0]
print(json.dumps(found))
"""


def bomb(size: int, *, claims: int | None = None) -> bytes:
    """A Zstandard frame that unfolds to `size` zeros, and says that it is `claims` of them."""
    frame = bytearray(numcodecs.Zstd(level=1, checksum=False).encode(np.zeros(size, np.uint8)))
    if claims is None:
        return bytes(frame)
    start = 4 + 1 + (0 if frame[4] >> 5 & 1 else 1)
    width = (1, 2, 4, 8)[frame[4] >> 6]
    frame[4] |= 0xC0  # eight bytes of content size
    frame[start : start + width] = claims.to_bytes(8, "little")
    return bytes(frame)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_read_takes_more_memory_than_its_files_warrant(made, copies, tmp_path):
    cases = {}

    def case(name: str, array: str, chunks) -> None:
        other = fuzzing.Copy(fuzzing.make(made, tmp_path / name, "threshold"))
        record, path = next((r, p) for r, p in other.objects() if f"/{array}/c/" in str(p))
        count = fuzzing.chunks_of(record, path)
        other.forge(record, path, fuzzing.join([bytes(x) for x in chunks(fuzzing.split(path.read_bytes(), count))]))
        cases[name] = tmp_path / name

    case("bomb", "n", lambda chunks: [bomb(1 << 29), *chunks[1:]])
    case("forged size", "n", lambda chunks: [bomb(1 << 16, claims=1 << 40), *chunks[1:]])
    case("small size", "id_lo", lambda chunks: [bomb(1 << 29, claims=512), *chunks[1:]])
    case("many frames", "n", lambda chunks: [bomb(1 << 22) * 64, *chunks[1:]])

    # A manifest of the largest sizes there are and records that fit it: a gigabyte a chunk, if one believed it.
    for name, (draws, seq_len) in {"huge": (4096, 1 << 17), "wide": (4096, 1 << 11)}.items():
        other = fuzzing.Copy(fuzzing.make(made, tmp_path / name, "threshold"))
        manifest = json.loads((other.root / "manifest.json").read_text())
        manifest["sampler"]["draws"], manifest["packing"]["seq_len"] = draws, seq_len
        other.put(other.root / "manifest.json", json.dumps(strict.sealed(manifest)).encode())
        identity = open_cache(other.root).manifest.identity
        for record, body in fuzzing.records(other.root).items():
            width = (draws + 1) * seq_len // 8 * 8
            body |= {"manifest": identity, "rows": (body["stop"] - body["start"]) * seq_len}
            body["widths"] = {"entry": width, "head": width, "tail": width}
            other.put(record, json.dumps(strict.sealed(body)).encode())
        cases[name] = other.root

    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(copies["threshold"].root), str(LIMIT * 4), *map(str, cases.values())],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    print(found)
    assert {end for end, _ in found.values()} <= {"DamagedError", "FormatError"}, found
    assert max(grown for _, grown in found.values()) < LIMIT, found


def test_a_chunk_may_not_unfold_from_nothing(copy):
    record = next(iter(fuzzing.records(copy.root)))
    body = json.loads(record.read_text())
    manifest = json.loads((copy.root / "manifest.json").read_text())
    manifest["packing"]["seq_len"] = 1 << 17
    copy.put(copy.root / "manifest.json", json.dumps(strict.sealed(manifest)).encode())
    width = 21 << 17
    body |= {
        "manifest": open_cache(copy.root).manifest.identity,
        "rows": (body["stop"] - body["start"]) << 17,
        "widths": {"entry": width * 4 // 4, "head": width, "tail": width},
    }
    copy.put(record, json.dumps(strict.sealed(body)).encode())
    with pytest.raises(DamagedError):
        open_cache(copy.root)[0]
    manifest["sampler"]["draws"] = 4096
    copy.put(copy.root / "manifest.json", json.dumps(strict.sealed(manifest)).encode())
    with pytest.raises((DamagedError, FormatError), match="another manifest"):
        open_cache(copy.root)[0]
    body["manifest"] = open_cache(copy.root).manifest.identity
    body["widths"] = {"entry": 4097 << 17, "head": 8, "tail": 8}
    copy.put(record, json.dumps(strict.sealed(body)).encode())
    with pytest.raises(DamagedError, match="lets a chunk of 1,074,003,968 bytes unfold from a shard of"):
        open_cache(copy.root)[0]


assert resource.RLIMIT_AS  # the child needs it
