"""Packing: one stream on disk, the same for any number of tokenising processes, in memory that does not grow."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.pipeline.config import CorpusConfig
from stillroom.pipeline.packing import PackedCorpus, pack
from stillroom.pipeline.teacher import load_tokenizer
from stillroom.storage.errors import InputError


@pytest.fixture(scope="module")
def long_file(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five batches of documents, and then a broken line."""
    file = tmp_path_factory.mktemp("long") / "long.jsonl"
    file.write_text(text_file.read_text() * 20 + "{broken\n")
    return file


def _equal(one: PackedCorpus, other: PackedCorpus) -> bool:
    same = np.array_equal(one.tokens_SL1, other.tokens_SL1)
    return same and one.fingerprint == other.fingerprint and one.documents == other.documents


def test_fingerprint_is_the_one_of_caches_that_exist(text_file: Path, teacher_folder: Path) -> None:
    """SHA-256 of the shape as two int64, then the ids as uint32, little-endian: version 0.1 wrote manifests with it."""
    packed = pack(CorpusConfig(data=str(text_file), seq_len=16), load_tokenizer(str(teacher_folder)))
    tokens = np.array(packed.tokens_SL1)
    assert tokens.dtype == np.uint32
    told = hashlib.sha256(np.array(tokens.shape, "<i8").tobytes() + tokens.astype("<u4").tobytes()).hexdigest()
    assert packed.fingerprint == told
    assert packed.mask_SL is None


@pytest.mark.parametrize("sequences", [None, 400])
def test_worker_processes_change_nothing(long_file: Path, teacher_folder: Path, sequences: int | None) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    config = CorpusConfig(data=str(long_file), seq_len=16, max_sequences=sequences, skip_bad=0 if sequences else 1)
    here = pack(config, tokenizer)
    assert here.skipped == (0 if sequences else 1)  # what lies behind the last sequence is not asked after
    there = pack(config.model_copy(update={"tokenize_workers": 1 if sequences else 2}), tokenizer)
    assert _equal(here, there)
    assert (there.skipped, there.empty) == (here.skipped, here.empty)


def test_a_broken_line_says_the_same_with_workers(long_file: Path, teacher_folder: Path) -> None:
    config = CorpusConfig(data=str(long_file), seq_len=16, tokenize_workers=1)
    with pytest.raises(InputError, match="line 1201 of"):
        pack(config, load_tokenizer(str(teacher_folder)))


def test_a_killed_worker_is_a_sentence(tmp_path: Path, text_file: Path, teacher_folder: Path) -> None:
    file, done = tmp_path / "much.jsonl", threading.Event()
    texts = [json.loads(line)["text"] * 20 for line in text_file.read_text().splitlines()]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) * 300)

    def kill(documents: int) -> None:
        if documents >= 512 and not done.is_set():
            done.set()
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for child in children:
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    config = CorpusConfig(data=str(file), seq_len=16, tokenize_workers=1)
    with pytest.raises(InputError, match="a tokenising process died"):
        pack(config, load_tokenizer(str(teacher_folder)), on_progress=kill)
    assert done.is_set()


def test_a_packed_corpus_outlives_its_files_and_pickles(text_file: Path, teacher_folder: Path, tmp_path: Path) -> None:
    packed = pack(CorpusConfig(data=str(text_file), seq_len=16), load_tokenizer(str(teacher_folder)), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []  # no name is left behind
    assert _equal(pickle.loads(pickle.dumps(packed)), packed)


def test_a_full_disk_is_a_sentence(text_file: Path, teacher_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    tokenizer, config = load_tokenizer(str(teacher_folder)), CorpusConfig(data=str(text_file), seq_len=16)
    before, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"does not fit on its disk .* point TMPDIR at a larger one"):
            pack(config, tokenizer, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.slow
def test_a_hundred_million_tokens_pack_within_two_gigabytes(tmp_path: Path, teacher_folder: Path) -> None:
    """A process of its own, so that the peak is its own; the synthetic corpus is 400 MB of ids in Parquet."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(tmp_path / "ids.parquet", pa.schema([("ids", pa.list_(pa.uint16()))])) as writer:
        for _ in range(50):
            ids = pa.array(rng.integers(1, 300, 2_000_000, dtype=np.uint16))
            column = pa.ListArray.from_arrays(pa.array(np.arange(0, 2_000_001, 500, dtype=np.int32)), ids)
            writer.write_table(pa.table({"ids": column}))
    code = (
        "import resource, sys\n"
        "from stillroom.pipeline.config import CorpusConfig\n"
        "from stillroom.pipeline.packing import pack\n"
        "from stillroom.pipeline.teacher import load_tokenizer\n"
        "tokenizer = load_tokenizer(sys.argv[2])\n"
        "packed = pack(CorpusConfig(data=sys.argv[1], ids_column='ids', seq_len=1024), tokenizer)\n"
        "print(packed.tokens_SL1.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    start_s = time.perf_counter()
    command = [sys.executable, "-c", code, str(tmp_path / "ids.parquet"), str(teacher_folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, peak_kib = map(int, run.stdout.split())
    print(f"{tokens:,} tokens, peak {peak_kib / 1024:,.0f} MiB, {time.perf_counter() - start_s:.0f} s")
    assert tokens > 1e8
    assert peak_kib < 2 * 1024**2
