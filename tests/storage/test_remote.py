"""Remote caches against real servers: what is read is what was written, whatever the network and other processes do."""

from __future__ import annotations

import logging
import pickle
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

from stillroom.storage.cache import open_cache
from stillroom.storage.commits import load_record, record_name
from stillroom.storage.depot import redacted
from stillroom.storage.errors import CacheError, DamagedError, InputError, NotACacheError
from stillroom.storage.index import INDEX_NAME, write_index
from stillroom.storage.remote import cache as remote_cache
from stillroom.storage.remote.local import FullError
from stillroom.storage.remote.place import Place
from stillroom.storage.remote.retry import RetryPolicy, with_retries
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.stream import StreamOrder

SECRET = "planted-secret-7f3a"
QUICK = RetryPolicy(attempts=4, base_s=0.01, top_s=0.05)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(remote_cache, "DEFAULT_RETRY", QUICK)


@pytest.fixture(scope="module")
def cache(made, tmp_path_factory):
    """A cache of 8 shards on disk, with an index."""
    root = tmp_path_factory.mktemp("origin") / "cache"
    made.write(root, made.manifest(SamplerSpec(draws=20), sequences=23, sequences_per_shard=3))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    write_index(root)
    return root


@pytest.fixture(scope="module")
def largest(cache):
    manifest = open_cache(cache).manifest
    return max(load_record(cache, manifest, shard).size_bytes for shard in range(manifest.shards))


@pytest.fixture(scope="module")
def s3(stores, cache):
    """A bucket that holds the cache, twice: with and without its index."""
    with stores.s3_server() as endpoint:
        bucket = stores.S3(endpoint, "shelf")
        for name in ("cache", "bare"):
            bucket.put_folder(cache, name)
        bucket.delete(f"bare/{INDEX_NAME}")
        yield bucket


@pytest.fixture
def proxy(stores, s3):
    """Between the client and the bucket."""
    server = stores.Proxy(s3.endpoint)
    with stores.serving(server):
        yield server


def options(endpoint, **client):
    return {
        "config": {
            "endpoint": endpoint, "access_key_id": "user", "secret_access_key": SECRET, "region": "us-east-1",
        },
        "client_options": {"allow_http": True, **client},
    }  # fmt: skip


def assert_same(remote, origin, indices=None):
    indices = list(range(len(origin))) if indices is None else indices
    ours, theirs = remote.read(indices), origin.read(indices)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    for name in ("offsets", "ids", "weights", "logp", "label_logp", "entropy"):
        np.testing.assert_array_equal(getattr(ours.targets, name), getattr(theirs.targets, name))


@pytest.mark.parametrize("reader", ["direct", "zarr"])
@pytest.mark.parametrize("name", ["cache", "bare"])
@pytest.mark.parametrize("scheme", ["s3", "memory", "file", pytest.param("http", marks=pytest.mark.slow)])
def test_every_store_reads_as_the_disk(scheme, name, reader, cache, s3, stores, tmp_path, request):
    settings = {}
    if scheme == "s3":
        url, settings = f"s3://shelf/{name}", {"storage_options": options(s3.endpoint)}
    elif scheme == "memory":
        memory = fsspec.filesystem("memory")
        memory.put(str(cache), f"/{name}", recursive=True)
        request.addfinalizer(lambda: memory.rm(f"/{name}", recursive=True))
        if name == "bare":
            memory.rm(f"/{name}/{INDEX_NAME}")
        url = f"memory://{name}"
    else:
        folder = tmp_path / name
        folder.symlink_to(cache)
        if name == "bare":
            folder.unlink()
            import shutil

            shutil.copytree(cache, folder)
            (folder / INDEX_NAME).unlink()
        url = f"file://{folder}"
        if scheme == "http":
            served = stores.web(tmp_path)
            url = f"{served.__enter__()}/{name}"
            request.addfinalizer(lambda: served.__exit__(None, None, None))
    remote = open_cache(url, cache_dir=tmp_path / "local", reader=reader, **settings)
    origin = open_cache(cache)
    assert len(remote) == len(origin) == 23
    assert remote.manifest == origin.manifest
    assert_same(remote, origin)
    assert (remote.entries, remote.bytes_by_array()) == (origin.entries, origin.bytes_by_array())
    assert (remote.path / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_with_an_index_opening_asks_for_no_record(proxy, tmp_path):
    open_cache("s3://shelf/cache", cache_dir=tmp_path, storage_options=options(proxy.endpoint))
    assert not [path for path in proxy.asked if "commits" in path]
    assert sum(proxy.asked.values()) == 4  # manifest, index, tokenizer: its list and its file


def test_every_object_is_fetched_once(proxy, cache, tmp_path):
    settings = {"cache_dir": tmp_path, "storage_options": options(proxy.endpoint)}
    assert_same(open_cache("s3://shelf/cache", **settings), open_cache(cache))
    assert_same(open_cache("s3://shelf/cache", **settings), open_cache(cache))
    shards = {path: times for path, times in proxy.asked.items() if "/shards/" in path}
    manifest = open_cache(cache).manifest
    assert len(shards) == sum(len(load_record(cache, manifest, shard).objects) for shard in range(manifest.shards))
    assert set(shards.values()) == {1}


@pytest.mark.parametrize("kind", ["500", "reset", "cut", "wrong"])
def test_what_passes_is_tried_again(kind, proxy, cache, tmp_path):
    """The first two answers (for wrong bytes: the first one) for every object are bad."""
    many = 1 if kind == "wrong" else 2
    proxy.fault = lambda path: kind if proxy.asked[path] <= many and ("/shards/" in path or kind != "wrong") else None
    remote = open_cache("s3://shelf/cache", cache_dir=tmp_path, storage_options=options(proxy.endpoint))
    assert_same(remote, open_cache(cache), list(range(6)))
    assert not list(tmp_path.rglob("*.part"))


def test_a_silent_server_is_given_up_and_tried_again(proxy, cache, tmp_path):
    proxy.fault = lambda path: "stall" if path.endswith("/tokens/c/0/0") and proxy.asked[path] == 1 else None
    settings = options(proxy.endpoint, timeout="1s")
    start = time.perf_counter()
    assert_same(open_cache("s3://shelf/cache", cache_dir=tmp_path, storage_options=settings), open_cache(cache), [0])
    assert time.perf_counter() - start < 15


@pytest.mark.parametrize(("kind", "error"), [("500", CacheError), ("cut", CacheError), ("wrong", DamagedError)])
def test_what_lasts_is_said_without_secrets(kind, error, proxy, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    proxy.fault = lambda path: kind if "/shards/" in path else None
    remote = open_cache("s3://shelf/cache", cache_dir=tmp_path, storage_options=options(proxy.endpoint))
    with pytest.raises(error, match=r"s3://shelf/cache/shards/000000-[0-9a-f]+\.zarr/") as caught:
        remote.read([0])
    said = str(caught.value) + repr(caught.value.__cause__) + caplog.text + repr(remote._place)
    assert SECRET not in said
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    proxy.fault = lambda path: None
    remote.read([0])  # and nothing is left in the way


def test_a_missing_object_is_damage(s3, cache, tmp_path):
    s3.put_folder(cache, "holed")
    record = load_record(cache, open_cache(cache).manifest, 2)
    s3.delete(f"holed/{record.path}/n/c/0/0")
    remote = open_cache("s3://shelf/holed", cache_dir=tmp_path, storage_options=options(s3.endpoint))
    with pytest.raises(DamagedError, match=r"s3://shelf/holed/.*is missing"):
        remote.read([6])


def test_a_stale_index_gives_way_to_the_record(made, tmp_path):
    root = tmp_path / "origin"
    manifest = made.manifest(SamplerSpec(draws=20), sequences=6, sequences_per_shard=3)
    writer = made.write(root, manifest)
    write_index(root)
    import shutil

    shutil.rmtree(root / load_record(root, manifest, 1).path)
    (root / record_name(1)).unlink()
    writer.write_shard(1, *made.shard_data(manifest, 1))  # again, under another name
    remote = open_cache(f"file://{root}", cache_dir=tmp_path / "local")
    assert_same(remote, open_cache(root))
    assert remote.record(1) == load_record(root, manifest, 1)


@pytest.mark.parametrize("harm", [b"", b"nonsense" * 100])
def test_a_damaged_index_is_passed_over(harm, s3, cache, tmp_path):
    s3.put_folder(cache, "odd")
    s3.put(f"odd/{INDEX_NAME}", harm)
    assert_same(
        open_cache("s3://shelf/odd", cache_dir=tmp_path, storage_options=options(s3.endpoint)), open_cache(cache)
    )


def test_a_spoiled_local_copy_is_fetched_again(cache, tmp_path):
    remote = open_cache(f"file://{cache}", cache_dir=tmp_path)
    remote.read([0])
    file = remote.path / remote.record(0).path / "id_lo" / "c" / "0" / "0"
    for harmed in (bytes([file.read_bytes()[0] ^ 255]) + file.read_bytes()[1:], b""):
        file.write_bytes(harmed)
        assert_same(open_cache(f"file://{cache}", cache_dir=tmp_path), open_cache(cache), [0, 1, 2])


def test_an_incomplete_cache(made, tmp_path):
    root = tmp_path / "origin"
    manifest = made.manifest(SamplerSpec(draws=20), sequences=9, sequences_per_shard=3)
    made.write(root, manifest)
    (root / record_name(1)).unlink()
    with pytest.raises(CacheError, match="lacks 1 of 3 shards"):
        open_cache(f"file://{root}", cache_dir=tmp_path / "local")
    part = open_cache(f"file://{root}", cache_dir=tmp_path / "local", partial=True)
    assert part.shards == (0, 2)
    assert_same(part, open_cache(root, partial=True))


def test_errors_of_address(cache, tmp_path, s3):
    settings = {"cache_dir": tmp_path / "local"}
    with pytest.raises(NotACacheError, match="s3://shelf/nothing holds no manifest"):
        open_cache("s3://shelf/nothing", storage_options=options(s3.endpoint), **settings)
    with pytest.raises(InputError, match=r"https://host/cache came with a query"):
        open_cache(f"https://user:{SECRET}@host/cache?sig={SECRET}", **settings)
    with pytest.raises(InputError, match="nothing here reads nosuch://"):
        open_cache("nosuch://host/cache", **settings)
    with pytest.raises(InputError, match="are for URLs"):
        open_cache(cache, cache_bytes=10)
    with pytest.raises(CacheError, match=r"http://127.0.0.1:9/cache/manifest.json could not be read") as caught:
        open_cache(f"http://user:{SECRET}@127.0.0.1:9/cache", **settings)
    assert SECRET not in str(caught.value) + repr(caught.value.__cause__)
    assert redacted(f"https://user:{SECRET}@host:1/a/b?x={SECRET}#y") == "https://host:1/a/b"


def test_a_cap_below_one_shard_is_refused(cache, largest, tmp_path):
    with pytest.raises(InputError, match=r"cache_bytes is 10,000, but shard 0 of file://.* alone holds"):
        open_cache(f"file://{cache}", cache_dir=tmp_path, cache_bytes=10_000)
    remote = open_cache(f"file://{cache}", cache_dir=tmp_path, cache_bytes=3 * largest)
    with pytest.raises(InputError, match="a window of 2 shards wants room for 4"):
        remote.follow(StreamOrder(remote.lengths, seed=0, window=2))
    with pytest.raises(InputError, match="wants them all at once"):
        remote.follow(StreamOrder(remote.lengths, seed=0))
    assert remote.default_window == 1
    assert open_cache(f"file://{cache}", cache_dir=tmp_path).default_window is None


@pytest.mark.parametrize("room", [1, 3, 5])
def test_the_cap_holds_at_every_moment(room, cache, largest, tmp_path):
    remote = open_cache(f"file://{cache}", cache_dir=tmp_path, cache_bytes=room * largest)
    origin = open_cache(cache)
    order = StreamOrder(remote.lengths, seed=1, window=max(1, room // 2))
    follower = remote.follow(order) if room > 1 else None
    for position in range(0, 2 * order.size, 2):
        if follower:
            follower.advance(position)
        assert_same(remote, origin, order.sequences(position, position + 2).tolist())
        assert remote.local.held_bytes() <= room * largest
    if follower:
        follower.close()
    everything = list(range(len(origin)))  # more shards at once than there is room for
    assert_same(remote, origin, everything[::3] + everything[1::3])


def test_prefetching_brings_the_next_window_before_it_is_read(cache, largest, tmp_path):
    remote = open_cache(f"file://{cache}", cache_dir=tmp_path, cache_bytes=6 * largest)
    order = StreamOrder(remote.lengths, seed=1, window=2)
    follower = remote.follow(order)
    window = order.window_at(0)
    follower.advance(0)
    wanted = {*window.places, *order.window_at(window.stop).places}
    deadline = time.monotonic() + 20
    while not all((remote.path / remote.record(shard).path).is_dir() for shard in wanted):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    follower.close()
    assert not any(thread.is_alive() for thread in follower._threads)


def test_eviction_spares_what_is_read(cache, largest, tmp_path):
    """A reader in another process of the same directory: its shards stay, and reading on works."""
    one, other = (open_cache(f"file://{cache}", cache_dir=tmp_path, cache_bytes=2 * largest) for _ in range(2))
    one.local.wait_s = other.local.wait_s = 0.3
    reader = one._shard(0)
    held = one.path / one.record(0).path
    for index in range(3, len(other)):
        other.read([index])  # all the room there is for seven shards is one
        assert held.is_dir()
    np.testing.assert_array_equal(reader.chunk("tokens", 1), open_cache(cache)._shard(0).chunk("tokens", 1))
    other._shard(2)
    with pytest.raises(FullError, match="all in use"):
        open_cache(f"file://{cache}", cache_dir=tmp_path, cache_bytes=2 * largest).local.__class__(
            one.local.cache_dir, one.local.root.name, cap_bytes=2 * largest, wait_s=0.2
        ).lease(one.record(1), lambda record, folder: None)
    del reader
    one._open.clear()
    other.read([3])
    assert not held.is_dir() or other.local.held_bytes() <= 2 * largest


def test_a_cache_can_be_pickled(cache, tmp_path):
    remote = open_cache(f"file://{cache}", cache_dir=tmp_path)
    remote.read([0])
    again = pickle.loads(pickle.dumps(remote))
    assert_same(again, open_cache(cache))
    assert again.entries == remote.entries


CLIENT = """
import hashlib, sys
import stillroom.storage.remote.cache as remote_cache
from stillroom.storage.cache import open_cache
from stillroom.storage.remote.retry import RetryPolicy
from stillroom.storage.stream import StreamOrder
url, local, cap, endpoint = sys.argv[1:5]
remote_cache.DEFAULT_RETRY = RetryPolicy(attempts=3, base_s=0.01, top_s=0.05)
options = {
    "config": {"endpoint": endpoint, "access_key_id": "u", "secret_access_key": "s", "region": "us-east-1"},
    "client_options": {"allow_http": True},
} if endpoint else None
cache = open_cache(url, cache_dir=local, cache_bytes=int(cap), storage_options=options)
order = StreamOrder(cache.lengths, seed=0, window=2)
print("open", flush=True)
digest = hashlib.sha256()
follower = cache.follow(order)
for position in range(0, order.size, 2):
    follower.advance(position)
    batch = cache.read(order.sequences(position, position + 2))
    digest.update(batch.tokens.tobytes() + batch.targets.ids.tobytes() + batch.targets.weights.tobytes())
follower.close()
print(digest.hexdigest(), flush=True)
"""


def client(url, local, cap, endpoint=""):
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, url, str(local), str(cap), endpoint], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("room", [5, 100])
def test_two_processes_share_one_directory(room, proxy, largest, tmp_path):
    clients = [client("s3://shelf/cache", tmp_path, room * largest, proxy.endpoint) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in clients]
    assert [process.returncode for process in clients] == [0, 0]
    assert said[0][1] == said[1][1]
    if room == 100:  # nothing was fetched twice
        assert {times for path, times in proxy.asked.items() if "/shards/" in path} == {1}
    assert not list(tmp_path.rglob("*.part"))


def test_a_killed_download_leaves_nothing_in_the_way(proxy, cache, largest, tmp_path):
    proxy.fault = lambda path: "stall" if path.endswith("/id_lo/c/0/0") else None
    process = client("s3://shelf/cache", tmp_path, 5 * largest, proxy.endpoint)
    assert process.stdout.readline() == "open\n"
    deadline = time.monotonic() + 30
    while not [path for path in tmp_path.rglob("*.part") if (path / "tokens" / "c" / "0" / "0").exists()]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = list(tmp_path.rglob("*.part"))
    assert left
    proxy.fault = lambda path: None
    remote = open_cache(
        "s3://shelf/cache", cache_dir=tmp_path, cache_bytes=2 * largest, storage_options=options(proxy.endpoint)
    )
    assert_same(remote, open_cache(cache))  # needs their room: the dead hold none
    assert not list(tmp_path.rglob("*.part"))
    assert remote.local.held_bytes() <= 2 * largest


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import CacheError
cache = open_cache(sys.argv[1], cache_dir=sys.argv[2])
try:
    cache.read([0])
except CacheError as error:
    print(error)
"""


def test_a_full_disk_is_said(made, tmp_path):
    made.write(
        tmp_path / "origin", made.manifest(SamplerSpec(draws=20), sequences=9, sequences_per_shard=9, seq_len=64)
    )
    command = [sys.executable, "-c", FULL, f"file://{tmp_path}/origin", str(tmp_path / "local")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "has no space for shard 0" in done.stdout
    assert not list((tmp_path / "local").rglob("*.part"))


FORKED = """
import os, sys
from stillroom.storage.errors import InputError
from stillroom.storage.remote.place import Place
from stillroom.storage.remote.retry import RetryPolicy
place = Place("s3://shelf/cache", storage_options={"skip_signature": True}, retry=RetryPolicy())
if not (child := os.fork()):
    try:
        place.read("manifest.json")
    except InputError as error:
        os._exit(7 if "spawn" in str(error) else 1)
    os._exit(2)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_is_told_to_spawn():
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=60).returncode == 7


def test_waits_grow_and_are_bounded():
    policy = RetryPolicy(attempts=9, base_s=0.5, top_s=4.0)
    longest = [max(policy.wait_s(attempt) for _ in range(200)) for attempt in range(9)]
    for attempt, seconds in enumerate(longest):
        limit = min(4.0, 0.5 * 2**attempt)
        assert 0.8 * limit < seconds <= limit  # 200 uniform draws all below 0.8 of the limit: 4e-20


@pytest.mark.parametrize(
    ("error", "times"), [(ConnectionError, 4), (TimeoutError, 4), (FileNotFoundError, 1), (PermissionError, 1)]
)
def test_only_what_may_pass_is_tried_again(error, times):
    calls = []

    def call():
        calls.append(1)
        raise error("no")

    with pytest.raises(error):
        with_retries(call, policy=QUICK, what="x")
    assert len(calls) == times


def test_objects_and_ranges(s3):
    place = Place("s3://shelf/cache/", storage_options=options(s3.endpoint), retry=QUICK)
    s3.put("cache/note.txt", b"0123456789")
    assert (place.read("note.txt"), place.read("note.txt", 3, 5)) == (b"0123456789", b"34")
    assert place.list("nothing") == []
    with pytest.raises(FileNotFoundError):
        place.read("nothing.txt")
