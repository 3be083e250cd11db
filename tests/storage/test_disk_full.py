"""The disk fills up in the middle of a shard: one sentence, status 2, earlier shards whole; with room again, it goes on."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stillroom.cli import main
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import CacheError
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.writer import CacheWriter

# A file-size limit of the operating system, which a shard's ids do not fit in; what comes before them does.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from stillroom.cli import main
sys.exit(main(sys.argv[2:]))
"""


def records(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (root / "commits").iterdir()}


@pytest.fixture
def command(teacher_folder, text_file):
    """The `stillroom cache` that writes into a folder."""
    return lambda out: [
        "cache", "--seq-len", "64", "--max-sequences", "24", "--sequences-per-shard", "6", "--teacher",
        str(teacher_folder), "--data", str(text_file), "--out", str(out),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_file_size_limit_through_the_command_line(command, tmp_path):
    assert main(command(tmp_path / "whole")) == 0
    out, cache = tmp_path / "out", open_cache(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", out)
    for shard in (2, 3):
        (out / f"commits/{shard:06d}.json").unlink()
        shutil.rmtree(out / cache.record(shard).path)
    before = records(out)

    sizes = {item.name: item.size_bytes for item in cache.record(2).objects}
    largest = max(sizes, key=sizes.get)
    assert largest == "id_lo/c/0/0"
    assert sizes[largest] > 4096 > max(size for name, size in sizes.items() if name.endswith("zarr.json"))
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(sizes[largest] - 1), *command(out)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert_one_sentence(run.stderr, "File too large")

    assert records(out) == before
    assert len(list((out / "shards").iterdir())) == 2  # the attempt is gone, and its bytes with it
    partial, whole = open_cache(out, partial=True), cache.read(range(12))
    assert_equal(partial.read(range(12)), whole)

    assert main(command(out)) == 0
    assert {name: records(out)[name] for name in before} == before
    assert_equal(open_cache(out).read(range(24)), cache.read(range(24)))


def assert_one_sentence(stderr: str, why: str) -> None:
    said = [line for line in stderr.splitlines() if line.startswith("stillroom: ")]
    assert len(said) == 1, stderr
    assert "Traceback" not in stderr
    assert f"the disk takes no more ({why}" in said[0]
    assert "run the same command again" in said[0]


def assert_equal(a, b) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    for field in ("offsets", "ids", "weights", "label_logp", "entropy", "logp"):
        np.testing.assert_array_equal(getattr(a.targets, field), getattr(b.targets, field))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, and a function that gives it more."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", *options, "-t", "tmpfs", "none", str(place)]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    if not mount("-o", "size=300k"):
        pytest.skip("may not mount a file system here")
    try:
        yield place, lambda: mount("-o", "remount,size=8m")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_through_the_command_line(command, small_disk, capsys):
    place, more = small_disk
    assert main(command(place / "out")) == 2
    assert_one_sentence(capsys.readouterr().err, "No space left on device")
    before = records(place / "out")
    assert 0 < len(before) < 4
    assert more()
    assert main(command(place / "out")) == 0
    after = records(place / "out")
    assert len(after) == 4
    assert {name: after[name] for name in before} == before


def test_a_full_file_system(made, small_disk, tmp_path):
    place, more = small_disk
    manifest = made.manifest(SamplerSpec(draws=20), sequences=60, sequences_per_shard=10)
    writer = CacheWriter(place / "cache", manifest)
    with pytest.raises(OSError, match="No space left"):
        made.write(place / "cache", manifest)
    before = records(place / "cache")
    there = sorted(writer.committed())
    assert 1 <= len(there) < manifest.shards
    assert len(list((place / "cache/shards").iterdir())) == len(there)
    open_cache(place / "cache", partial=True).read(range(10 * len(there)))
    with pytest.raises(CacheError, match="lacks"):
        open_cache(place / "cache")

    assert more()
    made.write(tmp_path / "undisturbed", manifest)
    made.write(place / "cache", manifest)
    after = records(place / "cache")
    assert {name: after[name] for name in before} == before
    one, two = open_cache(place / "cache"), open_cache(tmp_path / "undisturbed")
    assert [one.record(i).objects for i in one.shards] == [two.record(i).objects for i in two.shards]
