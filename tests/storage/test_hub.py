"""Caches and exports in a dataset repository: the real client of the hub library, against a hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from huggingface_hub import HfApi, constants, snapshot_download

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import CacheError, DamagedError, InputError, NotACacheError
from stillroom.storage.index import write_index
from stillroom.storage.interchange.reading import import_cache
from stillroom.storage.interchange.writing import MOST_FILES, default_shards_per_file, export_cache
from stillroom.storage.remote import cache as remote_cache
from stillroom.storage.remote.retry import RetryPolicy
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.verify import verify

NAME = "someone/shelf"


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    """The tests' hub library is offline; here it may ask the hub on loopback, which every call names."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture(scope="module")
def cache(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub") / "cache"
    made.write(root, made.manifest(SamplerSpec(draws=20), sequences=9))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    write_index(root)
    return root


@pytest.fixture
def repository(hub, stores, cache, tmp_path, monkeypatch):
    """A dataset repository that holds the cache in its folder `cache`."""
    monkeypatch.setattr(remote_cache, "DEFAULT_RETRY", RetryPolicy(attempts=2, base_s=0.01))
    shutil.copytree(cache, tmp_path / "repository" / "cache")
    server = hub.Hub(tmp_path / "repository", NAME)
    with stores.serving(server):
        yield server


def assert_same(one, two):
    ours, theirs = one.read(range(len(one))), two.read(range(len(two)))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    for name in ("offsets", "ids", "weights", "logp", "label_logp", "entropy"):
        np.testing.assert_array_equal(getattr(ours.targets, name), getattr(theirs.targets, name))


def settings(server, tmp_path):
    fsspec.get_filesystem_class("hf").clear_instance_cache()  # it remembers listings
    return {"cache_dir": tmp_path / "local", "storage_options": {"endpoint": server.endpoint, "token": False}}


def test_a_cache_opens_from_a_repository(repository, cache, tmp_path):
    remote = open_cache(f"hf://datasets/{NAME}/cache", **settings(repository, tmp_path))
    assert_same(remote, open_cache(cache))
    assert (remote.path / "tokenizer/tokenizer.json").read_text() == "{}"
    assert not [path for path in repository.asked if "/resolve/" in path and "/commits/" in path]
    links = [path for path in (tmp_path / "local").rglob("*") if path.is_symlink()]
    assert links == []  # what is read lies in our own directory, whole, its hashes checked


def test_without_an_index_the_records_are_listed(repository, cache, tmp_path):
    (repository.folder / "cache/index.arrow").unlink()
    assert_same(open_cache(f"hf://datasets/{NAME}/cache", **settings(repository, tmp_path)), open_cache(cache))


def test_what_is_wrong_in_a_repository_is_said(repository, tmp_path):
    url = f"hf://datasets/{NAME}/cache"
    with pytest.raises(NotACacheError, match=f"hf://datasets/{NAME}/elsewhere holds no manifest"):
        open_cache(f"hf://datasets/{NAME}/elsewhere", **settings(repository, tmp_path))
    with pytest.raises(NotACacheError, match="hf://datasets/nobody/nothing/cache holds no manifest"):
        open_cache("hf://datasets/nobody/nothing/cache", **settings(repository, tmp_path))
    object_ = next(repository.folder.glob("cache/shards/000001-*/n/c/0/0"))
    object_.write_bytes(bytes([object_.read_bytes()[0] ^ 1]) + object_.read_bytes()[1:])
    with pytest.raises(DamagedError, match="its SHA-256 differs"):
        open_cache(url, **settings(repository, tmp_path)).read([3])
    (repository.folder / "cache/index.arrow").unlink()
    (repository.folder / "cache/commits/000001.json").unlink()
    with pytest.raises(CacheError, match="lacks 1 of 3 shards"):
        open_cache(url, **settings(repository, tmp_path))


def test_a_snapshot_is_a_folder_of_links_and_says_what_to_do(repository, cache, tmp_path):
    snapshot = snapshot_download(
        NAME, repo_type="dataset", endpoint=repository.endpoint, token=False, cache_dir=tmp_path / "home"
    )
    folder = os.path.join(snapshot, "cache")
    assert os.readlink(os.path.join(folder, "manifest.json")).startswith("../../../blobs/")
    with pytest.raises(InputError, match=r"is a snapshot of the hub library.*open the hf:// URL"):
        open_cache(folder)
    # As a URL it is a store like any other: copied into our directory, hashes checked.
    assert_same(open_cache(f"file://{folder}", cache_dir=tmp_path / "local"), open_cache(cache))
    plain = snapshot_download(
        NAME, repo_type="dataset", endpoint=repository.endpoint, token=False, local_dir=tmp_path / "plain"
    )
    assert_same(open_cache(os.path.join(plain, "cache")), open_cache(cache))
    assert verify(os.path.join(plain, "cache"), hashes=True).sound


def test_a_link_of_another_kind_is_still_refused(cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    linked = next(copy.glob("shards/000000-*/n/c/0/0"))
    shutil.copy(linked, tmp_path / "elsewhere")
    linked.unlink()
    linked.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="leads out of the cache"):
        open_cache(copy).read([0])


@pytest.mark.parametrize("kind", ["cache", "export"])
def test_a_folder_is_pushed_and_read_again(kind, hub, stores, cache, tmp_path):
    """`upload_folder` takes both kinds as they are."""
    if kind == "export":
        export_cache(cache, tmp_path / "rows", shards_per_file=2)
    folder, server = (cache if kind == "cache" else tmp_path / "rows"), hub.Hub(tmp_path / "repository", NAME)
    with stores.serving(server):
        HfApi(endpoint=server.endpoint, token=False).upload_folder(
            repo_id=NAME, repo_type="dataset", folder_path=folder, commit_message="a shelf"
        )
        assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
            p.relative_to(server.folder): p.read_bytes() for p in server.folder.rglob("*") if p.is_file()
        }
        if kind == "cache":
            assert_same(open_cache(f"hf://datasets/{NAME}", **settings(server, tmp_path)), open_cache(cache))
            return
        snapshot = snapshot_download(
            NAME, repo_type="dataset", endpoint=server.endpoint, token=False, cache_dir=tmp_path / "home"
        )
        assert import_cache(snapshot, tmp_path / "again").identical == 3
        assert_same(open_cache(tmp_path / "again"), open_cache(cache))
        done = subprocess.run(
            [sys.executable, "-c", LOAD, NAME, str(tmp_path / "datasets")], capture_output=True, text=True, timeout=120,
            env={**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "other"), "HF_HUB_OFFLINE": "0",
                 "HF_HUB_DISABLE_TELEMETRY": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows["loaded"] == rows["streamed"] == open_cache(cache).read(range(9)).tokens.tolist()


LOAD = """
import json, sys
import datasets
datasets.disable_progress_bars()
rows = datasets.load_dataset(sys.argv[1], split="train", cache_dir=sys.argv[2])
stream = datasets.load_dataset(sys.argv[1], split="train", streaming=True)
print(json.dumps({"loaded": rows["tokens"][:], "streamed": [row["tokens"] for row in stream]}))
"""


def test_no_folder_of_an_export_outgrows_a_hub():
    for shards in (1, 7, 9_000, 9_001, 12_000, 1_000_000):
        for mean_bytes in (1.0, 226e6, 1e9):
            per_file = default_shards_per_file(mean_bytes, shards)
            assert 1 <= per_file <= shards
            assert -(-shards // per_file) <= MOST_FILES < 10_000
    assert default_shards_per_file(64e6, 1000) == 4
