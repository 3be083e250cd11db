"""Sources of text, packing and fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.pipeline.config import CorpusConfig
from stillroom.pipeline.corpus import documents
from stillroom.pipeline.packing import pack, tokenizer_fingerprint
from stillroom.pipeline.teacher import load_tokenizer
from stillroom.storage.errors import InputError

TEXTS = ["one fish", "two fish", "red fish"]


def _sources(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    jsonl, parquet, text = folder / "a.jsonl", folder / "a.parquet", folder / "texts"
    jsonl.write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS))
    pq.write_table(pa.table({"text": TEXTS}), parquet)
    text.mkdir(exist_ok=True)
    for index, content in enumerate(TEXTS):
        (text / f"{index}.txt").write_text(content)
    return {"jsonl": jsonl, "parquet": parquet, "folder": text}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_every_kind_of_source_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    source = _sources(tmp_path / "s")[kind]
    assert list(documents(CorpusConfig(data=str(source)))) == TEXTS


def test_datasets_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `datasets` name is what `load_dataset` opens; a folder named like one, in the working directory, is a folder."""
    sources = _sources(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    sources["jsonl"].rename(tmp_path / "books" / "a.jsonl")
    assert list(documents(CorpusConfig(data="books"))) == TEXTS


def test_packing_covers_every_token_once(text_file: Path, teacher_folder: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    packed = pack(CorpusConfig(data=str(text_file), seq_len=16), tokenizer)
    stream: list[int] = []
    for line in text_file.read_text().splitlines():
        stream += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    sequences = (len(stream) - 1) // 16
    assert packed.tokens_SL1.shape == (sequences, 17)
    assert packed.documents == 60
    labels = packed.tokens_SL1[:, 1:].reshape(-1)
    np.testing.assert_array_equal(labels, stream[1 : sequences * 16 + 1])
    np.testing.assert_array_equal(packed.tokens_SL1[1:, 0], packed.tokens_SL1[:-1, -1])


def test_fingerprint_is_of_content_not_of_files(tmp_path: Path, teacher_folder: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    sources = _sources(tmp_path / "s")
    marks = {pack(CorpusConfig(data=str(path), seq_len=4), tokenizer).fingerprint for path in sources.values()}
    assert len(marks) == 1
    (tmp_path / "s" / "a.jsonl").write_text(json.dumps({"text": "one fish two fish red fish!"}) + "\n")
    assert pack(CorpusConfig(data=str(sources["jsonl"]), seq_len=4), tokenizer).fingerprint not in marks


def test_max_sequences_is_a_prefix(text_file: Path, teacher_folder: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    whole = pack(CorpusConfig(data=str(text_file), seq_len=16), tokenizer).tokens_SL1
    part = pack(CorpusConfig(data=str(text_file), seq_len=16, max_sequences=5), tokenizer).tokens_SL1
    np.testing.assert_array_equal(part, whole[:5])


def test_tokenizer_fingerprint_survives_use_and_sees_change(teacher_folder: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=False, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != before


def _expect(config: CorpusConfig, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        list(documents(config))
    for word in words:
        assert word in str(caught.value)


def test_bad_sources(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    _expect(CorpusConfig(data=str(broken)), "line 2", "not JSON")
    other = tmp_path / "other.jsonl"
    other.write_text('{"body": "x"}\n')
    _expect(CorpusConfig(data=str(other)), "'text'", "body", "--text-column")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 au lait")
    _expect(CorpusConfig(data=str(latin)), "latin.txt", "UTF-8")
    _expect(CorpusConfig(data=str(tmp_path / "missing.txt")), "does not exist")
    _expect(CorpusConfig(data="no-such-dataset"), "neither a file nor a dataset")
    (tmp_path / "empty").mkdir()
    _expect(CorpusConfig(data=str(tmp_path / "empty")), "holds no text")
    (tmp_path / "a.zip").write_bytes(b"PK")
    _expect(CorpusConfig(data=str(tmp_path / "a.zip")), ".zip", "wanted one of")
    not_parquet = tmp_path / "a.parquet"
    not_parquet.write_bytes(b"junk")
    _expect(CorpusConfig(data=str(not_parquet)), "not a Parquet file")
    numbers = tmp_path / "n.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), numbers)
    _expect(CorpusConfig(data=str(numbers)), "holds int", "wanted text")
    _expect(CorpusConfig(data=str(numbers), text_column="body"), "no column 'body'")
