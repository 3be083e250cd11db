"""Every kind of source, mixtures of them, and what broken ones say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cli import main
from stillroom.pipeline.config import CorpusConfig
from stillroom.pipeline.corpus import documents, sources
from stillroom.pipeline.corpus_files import Tally
from stillroom.pipeline.packing import pack
from stillroom.pipeline.teacher import load_tokenizer
from stillroom.storage.errors import InputError

TEXTS = ["one fish", "two fish", "red fish"]


def _read(data: Path | str, tally: Tally | None = None, **settings: Any) -> list[Any]:
    return list(documents(CorpusConfig(data=str(data), **settings), tally))


def _jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def _arrow(file: Path, table: pa.Table, *, stream: bool) -> Path:
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_arrow_files_and_streams(tmp_path: Path, stream: bool, kind: pa.DataType) -> None:
    table = pa.table({"n": [1, 2, 3, 4], "text": pa.array([*TEXTS, None], kind)})
    assert _read(_arrow(tmp_path / "a.arrow", table, stream=stream)) == TEXTS


def test_what_datasets_saved_is_a_folder_of_arrow_files(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert _read(tmp_path / "saved") == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    """The name is looked up without a network: the library's own reader of local files stands in for the hub."""
    file, load, asked = _jsonl(tmp_path / "a.jsonl", TEXTS), datasets.load_dataset, []

    def local(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options))
        return load("json", data_files=str(file), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    settings = {"subset": "small", "split": "train", "streaming": streaming}
    assert _read("owner/books", **settings) == TEXTS
    assert asked == [("owner/books", "small", {"split": "train", "streaming": streaming})]
    with pytest.raises(InputError, match=r"no column 'body' \(it has: text\): name one with --text-column"):
        _read("owner/books", text_column="body", **settings)


def test_sources_one_after_the_other(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    (tmp_path / "b.txt").write_text(TEXTS[2])
    assert _read(f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.txt'}") == TEXTS
    odd = _jsonl(tmp_path / "x,y:0.5.jsonl", TEXTS)  # a file that is there is one source, whatever its name
    assert _read(odd) == TEXTS


def test_weighted_sources_keep_their_shares_and_order(tmp_path: Path) -> None:
    a = _jsonl(tmp_path / "a.jsonl", [f"a{i}" for i in range(900)])
    b = _jsonl(tmp_path / "b.jsonl", [f"b{i}" for i in range(900)])
    read = _read(f"{a}:0.7,{b}:0.3")
    assert read == _read(f"{a}:7,{b}:3")
    share = Counter(text[0] for text in read)
    # Until `a` ends its 900 documents: `b` has a negative binomial number, mean 900*3/7, variance mean / 0.7; 5 sigma.
    assert share["a"] == 900
    assert abs(share["b"] - 900 * 3 / 7) < 5 * (900 * 3 / 7 / 0.7) ** 0.5
    for letter in "ab":
        assert [t for t in read if t[0] == letter] == [f"{letter}{i}" for i in range(share[letter])]
    assert "".join(t[0] for t in read[:24]) == "aaaaaaabaaaabaaababaabba", "the draws never change"


def test_sources_that_make_no_sense() -> None:
    for data, word in (
        ("a:0.5,b", "some have none"),
        ("a:0,b:1", "above 0"),
        ("a:nan,b:1", "above 0"),
        ("a,,b", "NAME:WEIGHT"),
    ):
        with pytest.raises(InputError, match=word):
            sources(data)


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 2)])
def test_ids_column(tmp_path: Path, teacher_folder: Path, kind: pa.DataType) -> None:
    rows = [[5, 6], [7, 8], None, [9, 10], [11, 12]]
    table = pa.table({"ids": pa.array(rows, kind)})
    pq.write_table(table.slice(1), tmp_path / "a.parquet")
    _arrow(tmp_path / "a.arrow", table.slice(1), stream=False)
    for file in sorted(tmp_path.glob("a.*")):
        packed = pack(CorpusConfig(data=str(file), ids_column="ids", seq_len=4), load_tokenizer(str(teacher_folder)))
        assert packed.tokens_SL1.tolist() == [[7, 8, 0, 9, 10], [10, 0, 11, 12, 0]]
        assert (packed.documents, packed.empty) == (3, 1)


def test_ids_of_text_give_the_cache_of_the_text(tmp_path: Path, teacher_folder: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    with (tmp_path / "ids.jsonl").open("w") as lines:
        lines.writelines(json.dumps({"ids": ids}) + "\n" for ids in tokenizer(texts)["input_ids"])
    of_text = pack(CorpusConfig(data=str(text_file), seq_len=16), tokenizer)
    of_ids = pack(CorpusConfig(data=str(tmp_path / "ids.jsonl"), ids_column="ids", seq_len=16), tokenizer)
    assert of_ids.fingerprint == of_text.fingerprint


def test_bad_ids(tmp_path: Path, teacher_folder: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    for column, word in (
        (pa.array([[1, 300]]), "token id 300, the teacher's tokenizer has"),
        (pa.array([[1, -2]]), "from -2 to 1"),
        (pa.array([[1, None]]), "a null among its ids"),
        (pa.array(["text"]), "holds string, wanted a list of token ids"),
    ):
        pq.write_table(pa.table({"ids": column}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=word):
            pack(CorpusConfig(data=str(tmp_path / "a.parquet"), ids_column="ids", seq_len=2), tokenizer)
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2.5]}\n')
    with pytest.raises(InputError, match=r"line 1 of .*a.jsonl has no list of token ids in 'ids'"):
        _read(tmp_path / "a.jsonl", ids_column="ids")


BROKEN = (
    b'{"text": "one fish"}\n{"text": \n\n{"text": "caf\xe9"}\n{"body": "x"}\n'
    b'{"text": "\\ud800"}\n{"text": " "}\n{"text": "two fish"}\n'
)


def test_broken_lines_are_named_or_skipped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(BROKEN)
    for allowed, complaint in enumerate(("line 2 .* not JSON", "line 4 .* not UTF-8", "line 5 .*body", "line 6 .*")):
        with pytest.raises(InputError, match=complaint + ".*--skip-bad") as caught:
            _read(file, skip_bad=allowed)
        assert ("before it were skipped" in str(caught.value)) == (allowed > 0)
    tally = Tally(4)
    assert _read(file, tally) == ["one fish", "two fish"]
    assert (tally.skipped, tally.empty) == (4, 1)


def test_damaged_tables(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS * 500})
    for file in (_arrow(tmp_path / "a.arrow", table, stream=False), tmp_path / "b.parquet"):
        if file.suffix == ".parquet":
            pq.write_table(table, file)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"is not an? (Arrow|Parquet) file that can be read"):
            _read(file)
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 4], "<i4")), pa.py_buffer(b"caf\xe9")])
    with pytest.raises(InputError, match=r"UTF-?8"):
        _read(_arrow(tmp_path / "c.arrow", pa.table({"text": bad}), stream=True))


def test_the_command_says_one_sentence(
    tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(BROKEN)
    words = ["cache", "--teacher", str(teacher_folder), "--data", str(file), "--out", str(tmp_path / "c")]
    words += ["--seq-len", "2"]
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"stillroom: line 2 of {file} is not JSON")
    assert main([*words, "--skip-bad", "4", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["stats"]["notes"]
    assert notes == ["4 broken records passed over (--skip-bad)", "1 empty document passed over (nothing in them)"]
    assert main([*words, "--ids-column", "a", "--messages-column", "b"]) == 2
    assert "drop one" in capsys.readouterr().err
