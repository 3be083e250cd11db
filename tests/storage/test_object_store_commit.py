"""Writing a cache to an object store: the same protocol, against a real S3-protocol server that fails, races and forgets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from obstore.store import MemoryStore

from stillroom.cli import main
from stillroom.storage import strict
from stillroom.storage.cache import open_cache
from stillroom.storage.commits import record_name
from stillroom.storage.depot import Directory
from stillroom.storage.errors import CacheError, FormatError, InputError, PlanMismatchError
from stillroom.storage.index import INDEX_NAME, write_index
from stillroom.storage.remote import bucket as bucket_module
from stillroom.storage.remote.bucket import PART_BYTES, Bucket
from stillroom.storage.remote.retry import RetryPolicy
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.verify import verify
from stillroom.storage.writer import CacheWriter

SECRET = "planted-secret-7f3a"
QUICK = RetryPolicy(attempts=4, base_s=0.01, top_s=0.05)
WORKER = Path(__file__).with_name("made.py")
ANY_AGE = -3600.0  # younger than an hour from now: whatever the clocks say


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(bucket_module, "DEFAULT_RETRY", QUICK)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def s3(stores):
    with stores.s3_server() as endpoint:
        yield stores.S3(endpoint, "shelf")


@pytest.fixture
def proxy(stores, s3):
    server = stores.Proxy(s3.endpoint)
    with stores.serving(server):
        yield server


@pytest.fixture
def url(request):
    """A prefix that no other test writes to."""
    return f"s3://shelf/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
def plan(made):
    return made.manifest(SamplerSpec(draws=20), sequences=9)


@pytest.fixture
def reference(made, plan, tmp_path):
    """The same cache, written to a disk."""
    made.write(tmp_path / "reference", plan)
    return open_cache(tmp_path / "reference")


def options(endpoint, **client):
    return {
        "config": {
            "endpoint": endpoint, "access_key_id": "user", "secret_access_key": SECRET, "region": "us-east-1",
        },
        "client_options": {"allow_http": True, **client},
    }  # fmt: skip


def environment(endpoint):
    return {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
    }  # fmt: skip


def write(made, writer, shards=None):
    for index in range(writer.manifest.shards) if shards is None else shards:
        writer.write_shard(index, *made.shard_data(writer.manifest, index))


def fetched(s3, url, folder):
    """A local copy of everything under the URL."""
    s3.get_folder(url.removeprefix("s3://shelf/"), folder)
    return folder


def assert_whole(s3, url, folder, reference):
    """All shards are there once, byte for byte those of the reference, and nothing is besides."""
    report = verify(fetched(s3, url, folder), hashes=True)
    assert report.sound, report.findings
    assert report.missing == ()
    copy = open_cache(folder)
    assert [copy.record(i).objects for i in copy.shards] == [reference.record(i).objects for i in reference.shards]
    assert {path.name for path in (folder / "shards").iterdir()} == {
        Path(copy.record(i).path).name for i in copy.shards
    }


# The depot alone: a directory and a bucket keep the same promises.


@pytest.fixture(params=["directory", "memory", "s3"])
def depot(request, tmp_path):
    if request.param == "directory":
        return Directory(tmp_path / "depot")
    if request.param == "memory":
        return Bucket("memory://shelf", store=MemoryStore())
    proxy = request.getfixturevalue("proxy")
    return Bucket(request.getfixturevalue("url"), storage_options=options(proxy.endpoint))


def test_a_depot(depot):
    depot.prepare("commits", "shards")
    assert depot.names("shards") == depot.names("nowhere") == []
    with pytest.raises(FileNotFoundError):
        depot.read_json("commits/1.json")
    assert depot.put_if_absent("commits/1.json", b'{"a": 1}')
    assert not depot.put_if_absent("commits/1.json", b'{"a": 2}')
    assert depot.read_json("commits/1.json") == {"a": 1}
    depot.replace("index.arrow", b"one")
    depot.replace("index.arrow", b"[]")
    with pytest.raises(FormatError, match="wanted a JSON object"):
        depot.read_json("index.arrow")
    depot.replace("index.arrow", b" " * (strict.MAX_JSON_BYTES + 1))
    with pytest.raises(FormatError, match="at most"):
        depot.read_json("index.arrow")
    for folder in ("shards/a.zarr", "shards/ab.zarr"):
        depot.put_folder(folder, [("zarr.json", b"{}"), ("n/zarr.json", b"{}"), ("n/c/0/0", b"1234")])
    assert sorted(depot.names("shards")) == ["a.zarr", "ab.zarr"]
    assert sorted(depot.names("shards/a.zarr/n")) == ["c", "zarr.json"]
    assert -60 < depot.age_s("shards/a.zarr") < 60
    assert depot.age_s("shards/b.zarr") < -1e9
    depot.discard("shards/a.zarr")
    depot.discard("shards/none.zarr")
    assert depot.names("shards") == ["ab.zarr"]
    assert depot.names("commits") == ["1.json"]
    assert depot.leavings() == []


def test_a_large_object_goes_in_parts(proxy, s3, url, tmp_path):
    depot = Bucket(url, storage_options=options(proxy.endpoint))
    data = np.random.default_rng(0).bytes(2 * PART_BYTES + 12345)
    depot.put_folder("shards/a.zarr", [("big", data)])
    assert len([path for path in proxy.put if "partNumber" in path]) == 3
    fetched(s3, url, tmp_path)
    assert (tmp_path / "shards/a.zarr/big").read_bytes() == data


# One writer.


def test_a_cache_on_s3_is_the_cache_on_disk(made, proxy, s3, url, plan, reference, tmp_path):
    with CacheWriter(url, plan, storage_options=options(proxy.endpoint)) as writer:
        for index in range(plan.shards):
            writer.submit(index, *made.shard_data(plan, index))
    assert writer.committed() == {0, 1, 2}
    assert write_index(writer.depot) == f"{url}/{INDEX_NAME}"
    remote = open_cache(writer.root, cache_dir=tmp_path / "local", storage_options=options(proxy.endpoint))
    ours, theirs = remote.read(range(9)), reference.read(range(9))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    for name in ("offsets", "ids", "weights", "logp", "label_logp", "entropy"):
        np.testing.assert_array_equal(getattr(ours.targets, name), getattr(theirs.targets, name))
    assert not [path for path in proxy.asked if "/commits/" in path and proxy.asked[path] > 3]
    assert_whole(s3, url, tmp_path / "copy", reference)
    assert (tmp_path / "copy" / INDEX_NAME).read_bytes() == write_index(tmp_path / "copy").read_bytes()


def test_every_record_is_put_with_the_condition_and_the_server_holds_to_it(made, proxy, url, plan):
    writer = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    path = "/" + url.removeprefix("s3://") + "/manifest.json"
    assert proxy.refused == {path: 1}  # the store was asked whether it refuses, and did
    write(made, writer)
    assert proxy.conditions == {"if-none-match: *": 2 + plan.shards}
    assert not writer.depot.put_if_absent(record_name(1), b"{}")
    assert len(proxy.refused) == 2
    assert writer.record(1).shard == 1


def test_what_is_committed_is_skipped(made, proxy, url, plan):
    first = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    write(made, first, [0, 2])
    before = dict(proxy.put)
    again = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    assert again.committed() == {0, 2}
    assert again.write_shard(2, *made.shard_data(plan, 2)) == first.record(2)
    assert dict(proxy.put) == before


def test_another_run_is_refused(made, proxy, url, plan):
    CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    before = dict(proxy.put)
    CacheWriter(url, dataclasses.replace(plan, created="later", libraries={}), storage_options=options(proxy.endpoint))
    other = dataclasses.replace(plan, sampler=SamplerSpec(draws=21))
    with pytest.raises(PlanMismatchError, match=rf"{url} belongs to another run \(sampler\.draws: 20, now 21\)"):
        CacheWriter(url, other, storage_options=options(proxy.endpoint))
    assert dict(proxy.put) == before


def test_the_loser_deletes_its_attempt(made, proxy, url, plan, monkeypatch):
    writer = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    winner = writer.write_shard(0, *made.shard_data(plan, 0))
    monkeypatch.setattr(writer, "record", lambda index: None)  # as if the other had finished in between
    assert writer.write_shard(0, *made.shard_data(plan, 0)) == winner
    assert writer.depot.names("shards") == [Path(winner.path).name]


# What stores do.


@pytest.mark.parametrize("kind", ["500", "reset", "lost", "slow"])
def test_what_passes_is_tried_again(kind, made, proxy, s3, url, plan, reference, tmp_path):
    """The first request for each object fails: before it arrives, or after it was carried out."""
    some = ("/tokens/", "/commits/") if kind == "slow" else ("/",)
    proxy.write_fault = lambda method, path: (
        kind if proxy.put[path] == 1 and any(name in path for name in some) else None
    )
    writer = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    write(made, writer)
    records = [path for path in proxy.put if "/commits/" in path]
    assert len(records) == plan.shards
    if kind == "lost":  # the second put of a record found the first, and knew it for its own
        assert all(proxy.refused[path] == 1 for path in records)
    if kind != "slow":
        assert all(proxy.put[path] >= 2 for path in records)
    assert_whole(s3, url, tmp_path / "copy", reference)


def test_a_silent_store_is_given_up_and_asked_again(made, proxy, s3, url, plan, reference, tmp_path):
    proxy.write_fault = lambda method, path: "hang" if path.endswith("000000.json") and proxy.put[path] == 1 else None
    start = time.perf_counter()
    writer = CacheWriter(url, plan, storage_options=options(proxy.endpoint, timeout="1s"))
    write(made, writer)
    assert time.perf_counter() - start < 20
    assert_whole(s3, url, tmp_path / "copy", reference)


def test_a_rivals_record_is_not_taken_for_ours(made, proxy, url, plan, monkeypatch):
    """The answer to our put is lost, and it was a refusal."""
    writer = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    winner = writer.write_shard(0, *made.shard_data(plan, 0))
    monkeypatch.setattr(writer, "record", lambda index: None)
    record = "/" + url.removeprefix("s3://") + "/" + record_name(0)
    before, faults = proxy.put[record], ["lost"]
    proxy.write_fault = lambda method, path: faults.pop() if path == record and faults else None
    assert writer.write_shard(0, *made.shard_data(plan, 0)) == winner
    assert (proxy.put[record], proxy.refused[record]) == (before + 2, 2)
    assert writer.depot.names("shards") == [Path(winner.path).name]


@pytest.mark.parametrize("where", ["/shards/", "/commits/"])
def test_what_lasts_is_one_sentence_and_loses_nothing(where, made, proxy, s3, url, plan, reference, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    writer = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    write(made, writer, [0])
    proxy.write_fault = lambda method, path: "500" if where in path and method == "PUT" else None
    with pytest.raises(CacheError, match=rf"{url}{where}.* could not be written \(.*4 attempts") as caught:
        write(made, writer, [1])
    assert SECRET not in str(caught.value) + repr(caught.value.__cause__) + caplog.text
    assert "\n" not in str(caught.value)
    assert writer.committed() == {0}
    # A record that may still arrive keeps its attempt; where none was put, the attempt is gone.
    assert len(writer.depot.names("shards")) == (2 if where == "/commits/" else 1)
    proxy.write_fault = lambda method, path: None
    resumed = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    write(made, resumed)
    left = resumed.collect_orphans(ANY_AGE)
    assert len(left) == (1 if where == "/commits/" else 0)
    assert_whole(s3, url, tmp_path / "copy", reference)


def test_an_error_on_the_writers_thread_surfaces(made, proxy, url, plan):
    writer = CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    proxy.write_fault = lambda method, path: "500" if "/shards/" in path else None
    writer.submit(0, *made.shard_data(plan, 0))
    with pytest.raises(CacheError, match="could not be written"):
        writer.close()
    proxy.write_fault = lambda method, path: None
    with writer:
        writer.submit(0, *made.shard_data(plan, 0))
    assert writer.committed() == {0}


@pytest.mark.parametrize(
    ("kind", "said"), [("unconditional", "took a second put of manifest.json"), ("501", "does not understand one")]
)
def test_a_store_without_conditional_puts_is_refused(kind, said, proxy, url, plan):
    proxy.write_fault = lambda method, path: kind
    with pytest.raises(CacheError, match=rf"{url} can not be written to, .*{said}.*local directory") as caught:
        CacheWriter(url, plan, storage_options=options(proxy.endpoint))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://host/cache", "hf://datasets/a/b", "memory://cache", "ftp://host/cache"])
def test_places_that_have_none_are_refused(address, plan):
    with pytest.raises(
        InputError, match=rf"{address} came as the place to write a cache, wanted s3://, gs:// or az://"
    ):
        CacheWriter(address, plan)


def test_addresses_are_named_without_secrets(plan):
    with pytest.raises(InputError, match="s3://shelf/cache came with a query"):
        CacheWriter(f"s3://user:{SECRET}@shelf/cache?sig={SECRET}", plan)
    with pytest.raises(InputError, match="without a bucket"):
        CacheWriter("s3:///cache", plan)
    with pytest.raises(InputError, match="are for URLs: drop them"):
        CacheWriter("cache", plan, storage_options={})


def test_googles_client(made, proxy, s3, plan, reference, tmp_path):
    """obstore's GCS client, against an S3 server behind a proxy that translates the one condition: not against Google."""
    settings = {
        "config": {"base_url": proxy.endpoint, "bearer_token": SECRET},
        "client_options": {"allow_http": True},
    }
    writer = CacheWriter("gs://shelf/google", plan, storage_options=settings)
    proxy.write_fault = lambda method, path: "lost" if proxy.put[path] == 1 else None
    write(made, writer)
    writer.collect_orphans(ANY_AGE)
    write_index(writer.depot)
    assert set(proxy.conditions) == {"x-goog-if-generation-match: 0"}
    remote = open_cache("gs://shelf/google", cache_dir=tmp_path / "local", storage_options=settings)
    np.testing.assert_array_equal(remote.read(range(9)).targets.ids, reference.read(range(9)).targets.ids)
    assert_whole(s3, "s3://shelf/google", tmp_path / "copy", reference)


@pytest.mark.parametrize(
    ("address", "config", "store", "prefix"),
    [
        ("s3://shelf", {}, 'S3Store(bucket="shelf")', ""),
        ("s3a://shelf/a/", {}, 'S3Store(bucket="shelf")', "a/"),
        ("az://shelf/a/b", {"account_name": "n", "account_key": "c2VjcmV0"},
         'AzureStore(container_name="shelf", account_name="n")', "a/b/"),
    ],
)  # fmt: skip
def test_addresses(address, config, store, prefix):
    """What obstore is asked for; of Azure no more is tested than that."""
    depot = Bucket(address, storage_options={"config": config})
    assert (repr(depot._store), depot._prefix, depot.root) == (store, prefix, address.rstrip("/"))


# Several writers, and killed ones.


def worker(url, endpoint, pause_s=0.0):
    return subprocess.Popen(
        [sys.executable, str(WORKER), url, str(pause_s)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment(endpoint)},
    )  # fmt: skip


@pytest.fixture
def race(made, tmp_path):
    made.write(tmp_path / "race", made.RACE)
    return open_cache(tmp_path / "race")


def test_two_processes_write_one_cache(made, proxy, s3, url, race, tmp_path):
    writers = [worker(url, proxy.endpoint) for _ in range(2)]
    done = 0
    for process in writers:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        done += output.count("done")
    assert done >= made.RACE.shards
    writer = CacheWriter(url, made.RACE, storage_options=options(proxy.endpoint))
    assert writer.collect_orphans(ANY_AGE) == []  # the losers cleaned up after themselves
    assert_whole(s3, url, tmp_path / "copy", race)


def test_kill_9_in_mid_shard(made, proxy, s3, url, race, tmp_path):
    for at in (2, 5):
        process = worker(url, proxy.endpoint)
        name = f"/shards/{at:06d}-"
        proxy.write_fault = lambda method, path, name=name: "slow" if name in path and "/n/" in path else None
        deadline = time.monotonic() + 60
        while not [path for path in proxy.put if name in path and "/n/" in path]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    time.sleep(1.1)  # what was on its way arrives
    proxy.write_fault = lambda method, path: None
    writer = CacheWriter(url, made.RACE, storage_options=options(proxy.endpoint))
    assert writer.committed() == {0, 1, 2, 3, 4}
    before = {index: writer.record(index) for index in writer.committed()}
    assert len(writer.depot.names("shards")) == len(before) + 2
    with pytest.raises(CacheError, match="lacks 15 of 20 shards"):
        open_cache(url, cache_dir=tmp_path / "local", storage_options=options(proxy.endpoint))
    process = worker(url, proxy.endpoint)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("done") == made.RACE.shards - len(before)  # nothing is computed twice
    assert {index: writer.record(index) for index in before} == before
    assert writer.collect_orphans(3600.0) == []  # young: a living writer's, for all we know
    assert len(writer.collect_orphans(ANY_AGE)) == 2
    assert_whole(s3, url, tmp_path / "copy", race)


# The command line.


def test_from_the_command_line(teacher_folder, text_file, proxy, s3, url, tmp_path, monkeypatch, capsys):
    for name, value in environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def command(out):
        return [
            "cache", "--seq-len", "32", "--max-sequences", "12", "--sequences-per-shard", "4", "--teacher",
            str(teacher_folder), "--data", str(text_file), "--out", str(out),
        ]  # fmt: skip

    assert main([*command(url), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == url
    assert main(command(tmp_path / "disk")) == 0
    assert_whole(s3, url, tmp_path / "copy", open_cache(tmp_path / "disk"))
    assert (tmp_path / "copy/tokenizer/tokenizer.json").read_bytes() == (
        tmp_path / "disk/tokenizer/tokenizer.json"
    ).read_bytes()
    before = dict(proxy.put)
    assert main(command(url)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert dict(proxy.put) == before
    assert main(["inspect", url, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["complete"]
    assert seen["sequences"] == 12
    assert main(["verify", url]) == 2
    assert "copy it" in capsys.readouterr().err
