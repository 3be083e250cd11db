"""The manifest: strict JSON, versions, identity."""

from __future__ import annotations

import dataclasses
import json

import pytest

from stillroom.storage import strict
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import FormatError, InputError, NotACacheError
from stillroom.storage.manifest import Manifest
from stillroom.storage.spec import SamplerSpec


@pytest.fixture
def manifest(made):
    return made.manifest(SamplerSpec(kind="top_p", draws=64, top_p=0.9, seed=2**63), sequences=7)


def test_round_trip_and_plan(manifest):
    assert Manifest.from_json(strict.loads(strict.dumps(manifest.to_json()), "m")) == manifest
    assert manifest.shards == 3
    assert [manifest.shard_range(i) for i in range(3)] == [(0, 3), (3, 6), (6, 7)]
    with pytest.raises(InputError, match="wanted 0 to 2"):
        manifest.shard_range(3)


def test_differences_are_of_identity_only(manifest):
    replace = dataclasses.replace
    other = replace(
        manifest,
        teacher=replace(manifest.teacher, name="elsewhere", revision="main"),
        corpus=replace(manifest.corpus, name="moved"),
        created="now",
        libraries={"a": "1"},
    )
    assert manifest.differences(other) == []
    assert manifest.identity == other.identity
    other = replace(manifest, teacher=replace(manifest.teacher, fingerprint="x"), sequences=8, vocab_size=299)
    assert manifest.identity != other.identity
    assert [line.split(":")[0] for line in manifest.differences(other)] == [
        "teacher.fingerprint",
        "vocab_size",
        "sequences",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "wanted 'stillroom-cache'"),
        (lambda d: d.update(format_version=2, new_key=1), "this stillroom reads version 1: upgrade stillroom"),
        (lambda d: d.update(format_version="1"), "malformed"),
        (lambda d: d.update(format_version=True), "malformed"),
        (lambda d: d.update(surprise=1), "unknown key 'surprise'"),
        (lambda d: d.pop("sampler"), "lacks the key 'sampler'"),
        (lambda d: d["teacher"].update(path="/x"), "teacher has the unknown key 'path'"),
        (lambda d: d["teacher"].pop("revision"), "teacher lacks the key 'revision'"),
        (lambda d: d["sampler"].update(kind="best"), "sampler 'best' is unknown"),
        (lambda d: d["sampler"].update(draws="50"), "draws came as str, wanted int"),
        (lambda d: d["sampler"].pop("seed"), "lacks the key 'seed'"),
        (lambda d: d.update(sequences=0), "wanted 1 to"),
        (lambda d: d.update(sequences=True), "came as bool, wanted int"),
        (lambda d: d.update(vocab_size=1 << 25), "wanted 1 to 16777216"),
        (lambda d: d.update(libraries={"a": 1}), "libraries.a came as int, wanted str"),
        (lambda d: d.update(packing=None), "packing"),
    ],
)
def test_malformed_manifests_name_the_key(manifest, tmp_path, change, message):
    data = json.loads(strict.dumps(manifest.to_json()))
    change(data)
    (tmp_path / "manifest.json").write_text(json.dumps(strict.sealed(data)))
    with pytest.raises(FormatError, match=message):
        open_cache(tmp_path)


def test_a_changed_manifest_is_refused(manifest, tmp_path):
    # A legal value in the place of another: nothing but the seal can tell.
    for change in (
        lambda d: d["sampler"].update(draws=65),
        lambda d: d["teacher"].update(name="x"),
        lambda d: d.pop("sha256"),
    ):
        data = json.loads(strict.dumps(manifest.to_json()))
        change(data)
        (tmp_path / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(FormatError, match=r"its own checksum|lacks the key 'sha256'"):
            open_cache(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, " " * (strict.MAX_JSON_BYTES + 1), b"\xff\xfe{}"],
    ids=["empty", "cut", "list", "nan", "twice", "deep", "long", "bytes"],
)
def test_damaged_json(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=r"manifest\.json"):
        open_cache(tmp_path)


def test_not_a_cache(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(NotACacheError, match=r"holds no manifest\.json"):
            open_cache(path)
    with pytest.raises(InputError, match="reader 'tensorstore' is unknown"):
        open_cache(tmp_path, reader="tensorstore")
