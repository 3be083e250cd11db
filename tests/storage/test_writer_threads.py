"""The writer's thread: same bytes, bounded memory, errors that surface, shards that are not lost."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from stillroom.storage.background import Background
from stillroom.storage.cache import open_cache
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.writer import CacheWriter

SPEC = SamplerSpec(draws=20)


def objects(root):
    return [open_cache(root).record(i).objects for i in range(3)]


@pytest.fixture
def plan(made):
    return made.manifest(SPEC, sequences=9)


def test_same_bytes_as_the_synchronous_call(made, plan, tmp_path):
    made.write(tmp_path / "one", plan)
    with CacheWriter(tmp_path / "other", plan) as writer:
        for index in range(plan.shards):
            writer.submit(index, *made.shard_data(plan, index))
    assert writer.committed() == {0, 1, 2}
    assert objects(tmp_path / "one") == objects(tmp_path / "other")


def test_submit_checks_shapes_at_once_and_values_at_the_next_call(made, plan, tmp_path):
    tokens, targets, rounding = made.shard_data(plan, 0)
    writer = CacheWriter(tmp_path, plan)
    with pytest.raises(ValueError, match="tokens_SL1"):
        writer.submit(0, tokens[:1], targets, rounding)
    targets.weights[:] *= 2
    writer.submit(0, tokens, targets, rounding)
    with pytest.raises(ValueError, match="sum to 1"):
        writer.close()
    assert writer.committed() == set()
    writer.submit(1, *made.shard_data(plan, 1))  # usable again
    writer.close()
    assert writer.committed() == {1}


def test_an_error_of_the_disk_surfaces_and_drops_what_follows(made, plan, tmp_path, monkeypatch):
    writer = CacheWriter(tmp_path, plan)
    done = threading.Event()

    def full(*args):
        done.wait(5)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_blocks", full)
    writer.submit(0, *made.shard_data(plan, 0))
    writer.submit(1, *made.shard_data(plan, 1))
    done.set()
    with pytest.raises(OSError, match="No space"):
        writer.close()
    monkeypatch.undo()
    assert writer.committed() == set()


def test_the_callers_error_is_not_masked(made, plan, tmp_path):
    writer = CacheWriter(tmp_path, plan)

    def work():
        with writer:
            writer.submit(0, *made.shard_data(plan, 0))
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert writer.committed() <= {0}
    assert all(t.name != "cache writer" for t in threading.enumerate())


@pytest.mark.parametrize("waiting", [1, 3])
def test_the_queue_is_bounded(waiting):
    gate, begun, submitted = threading.Event(), threading.Event(), []
    work = Background(waiting)

    def job():
        begun.set()
        gate.wait(10)

    def caller():
        for number in range(waiting + 4):
            work.submit(job)
            submitted.append(number)

    thread = threading.Thread(target=caller)
    thread.start()
    assert begun.wait(5)
    deadline = time.monotonic() + 5
    while len(submitted) < waiting + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(submitted) == waiting + 1  # one being done, `waiting` that wait
    gate.set()
    thread.join(5)
    work.close()
    assert len(submitted) == waiting + 4


def test_jobs_after_a_failure_are_dropped_until_the_error_was_seen():
    work, seen = Background(4), []
    work.submit(lambda: 1 / 0)

    def submit_many():
        for _ in range(500):
            work.submit(lambda: seen.append(1))
            time.sleep(0.01)

    with pytest.raises(ZeroDivisionError):
        submit_many()
    work.close()
    assert seen == []


def test_a_caller_goes_on_while_a_shard_is_written(made, plan, tmp_path, monkeypatch):
    writer, gate = CacheWriter(tmp_path, plan), threading.Event()
    real = writer.write_blocks
    monkeypatch.setattr(writer, "write_blocks", lambda *args: gate.wait(10) and real(*args))
    writer.submit(0, *made.shard_data(plan, 0))
    assert writer.committed() == set()  # we are here, the shard is not
    gate.set()
    writer.close()
    assert writer.committed() == {0}
    np.testing.assert_array_equal(open_cache(tmp_path, partial=True).read([0]).tokens, made.shard_data(plan, 0)[0][:1])
