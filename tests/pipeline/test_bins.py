"""Bins of token ids: the two layouts, what they mix with, and what damaged or hostile ones say."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cli import main
from stillroom.pipeline import corpus_bins
from stillroom.pipeline.config import CacheConfig, CorpusConfig
from stillroom.pipeline.corpus import documents
from stillroom.pipeline.corpus_files import Tally
from stillroom.pipeline.corpus_size import corpus_tokens
from stillroom.pipeline.packing import PackedCorpus, pack
from stillroom.pipeline.run import build_cache
from stillroom.pipeline.teacher import load_tokenizer
from stillroom.storage.errors import InputError

IDS = [[5, 6, 7, 0], [8], [299, 1, 2], [3, 4, 5, 6, 7, 8, 9, 0]]


def megatron(
    file: Path, texts: list[list[int]], *, code: int = 8, kind: str = "<u2", bounds: list[int] | None = None
) -> Path:
    """A `.bin` and its `.idx`, one sequence a text; documents are single sequences unless `bounds` says otherwise."""
    np.concatenate([np.zeros(0), *texts]).astype(kind).tofile(file)
    lengths = np.array([len(ids) for ids in texts], "<i4")
    places = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(kind).itemsize
    ends = np.array(range(len(texts) + 1) if bounds is None else bounds, "<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(texts), len(ends))
    file.with_suffix(".idx").write_bytes(head + lengths.tobytes() + places.astype("<i8").tobytes() + ends.tobytes())
    return file


def datatrove(file: Path, texts: list[list[int]], *, width: int = 2, metadata: str | None = "") -> Path:
    """A `.ds`, its `.index` and its `.metadata` (`metadata=None`: none)."""
    np.concatenate([np.zeros(0), *texts]).astype(f"<u{width}").tofile(file)
    ends = np.cumsum([len(ids) for ids in texts]).astype("<u8")
    file.with_name(f"{file.name}.index").write_bytes(ends.tobytes())
    if metadata is not None:
        said = metadata or f"some/tokenizer|{width}\n{int(ends[-1])}\n{int(ends[-1])} T"
        file.with_name(f"{file.name}.metadata").write_text(said)
    return file


def jsonl(file: Path, texts: list[list[int]]) -> Path:
    file.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in texts))
    return file


def _read(data: Path | str, tally: Tally | None = None, **settings: Any) -> list[Any]:
    found = documents(CorpusConfig(data=str(data), **settings), tally)
    return [document if isinstance(document, str) else document.tolist() for document in found]


def _packed(data: Path | str, teacher_folder: Path, **settings: Any) -> PackedCorpus:
    return pack(CorpusConfig(data=str(data), seq_len=4, **settings), load_tokenizer(str(teacher_folder)))


KINDS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@pytest.mark.parametrize("code", KINDS)
def test_every_width_of_a_megatron_bin(tmp_path: Path, code: int) -> None:
    texts = [[7, 100, 3], [], [1], [2, 2]]
    file, tally = megatron(tmp_path / "a.bin", texts, code=code, kind=KINDS[code]), Tally()
    assert _read(file, tally) == _read(tmp_path / "a") == [[7, 100, 3], [1], [2, 2]]  # its prefix names it, too
    assert tally.empty == 1
    joined = megatron(tmp_path / "b.bin", texts, code=code, kind=KINDS[code], bounds=[0, 2, 2, 4])
    assert _read(joined) == [[7, 100, 3], [1, 2, 2]]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("metadata", ["", None])
def test_both_widths_of_a_datatrove_file(tmp_path: Path, width: int, metadata: str | None) -> None:
    texts = [[7, 60_000, 3], [], [1 << (8 * width - 1)]]
    assert _read(datatrove(tmp_path / "a.ds", texts, width=width, metadata=metadata)) == [texts[0], texts[2]]


def test_indices_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_bins, "AT_A_TIME", 3)
    texts = [[i] * (i % 4) for i in range(20)]
    wanted = [ids for ids in texts if ids]
    assert _read(megatron(tmp_path / "a.bin", texts)) == _read(datatrove(tmp_path / "a.ds", texts)) == wanted


def test_a_bin_is_a_view_of_its_file(tmp_path: Path) -> None:
    """A file of 64 GiB, nearly all of it a hole: its ends are read, what lies between is not."""
    file = tmp_path / "large.ds"
    with file.open("wb") as out:
        out.write(np.array([1, 2, 3], "<u4").tobytes())
        out.truncate(1 << 36)
        out.seek((1 << 36) - 4)
        out.write(np.array([9], "<u4").tobytes())
    file.with_name("large.ds.index").write_bytes(np.array([3, (1 << 34) - 1, 1 << 34], "<u8").tobytes())
    first, hole, last = documents(CorpusConfig(data=str(file)))
    assert isinstance(first, np.ndarray)
    assert first.tolist() == [1, 2, 3]
    assert (len(hole), list(last)) == ((1 << 34) - 4, [9])


def test_the_same_ids_make_the_same_cache(teacher_folder: Path, tmp_path: Path) -> None:
    """Lines of ids, and both kinds of bins: same fingerprint, same bytes, also by documents."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(1, 300, rng.integers(1, 30)).tolist() for _ in range(40)]
    texts[3].append(0)  # closed already
    sources = {
        jsonl(tmp_path / "a.jsonl", texts): "ids",
        megatron(tmp_path / "a.bin", texts): None,
        datatrove(tmp_path / "a.ds", texts, width=4): None,
    }
    digests, identities = [], []
    for number, (file, column) in enumerate(sources.items()):
        out = tmp_path / f"c{number}"
        build_cache(
            CacheConfig(
                teacher=str(teacher_folder), data=str(file), ids_column=column, out=out, packing="documents", seq_len=16,
                sequences_per_shard=16,
            )
        )  # fmt: skip
        shards = sorted(path for path in (out / "shards").rglob("0") if path.is_file())
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in shards])
        identities.append(json.loads((out / "manifest.json").read_text())["corpus"]["fingerprint"])
    assert len(digests[0]) > 10
    assert digests[0] == digests[1] == digests[2]
    assert len(set(identities)) == 1


def test_bins_mix_with_text_and_conversations(teacher_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "the still room"}) + "\n" for _ in range(200)))
    (tmp_path / "m").mkdir()
    megatron(tmp_path / "m" / "b.bin", [[11, 12, 0]] * 150)
    datatrove(tmp_path / "m" / "c.ds", [[13, 0]] * 150)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"no corpus: it has no index")
    text = [*tokenizer("the still room")["input_ids"], 0]
    mixed = f"{tmp_path / 't.jsonl'}:0.5,{tmp_path / 'm'}:0.5"
    found = _packed(mixed, teacher_folder)
    wanted = [[0] if isinstance(d, str) else d for d in _read(mixed)]
    stream = [i for d in wanted for i in (text if d == [0] else d)]
    assert found.tokens_SL1[:, :-1].ravel().tolist() == stream[: found.tokens_SL1[:, :-1].size]
    assert {11, 13} <= set(stream)
    ahead = _packed(mixed, teacher_folder, tokenize_workers=1)
    assert ahead.fingerprint == found.fingerprint
    one_after_the_other = CorpusConfig(data=f"{tmp_path / 't.jsonl'},{tmp_path / 'm'}", seq_len=4)
    counted = corpus_tokens(one_after_the_other, tokenizer)
    assert (counted.value, counted.source) == (200 * len(text) + 150 * 5, "counted")

    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fire"}]}) + "\n"
    )
    chat = CorpusConfig(data=f"{tmp_path / 'chat.jsonl'},{tmp_path / 'm'}", messages_column="messages", seq_len=4)
    packed = pack(chat, tokenizer)
    assert packed.mask_SL is not None
    prompt = len(tokenizer("the")["input_ids"])
    masked = packed.mask_SL.ravel()
    assert not masked[: prompt - 1].any()
    assert masked[prompt - 1 :].all()


Damage = Callable[[Path], object]


def _edit(suffix: str, at: int, data: bytes) -> Damage:
    def edit(file: Path) -> None:
        path = file.with_suffix(suffix) if suffix == ".idx" else file.with_name(file.name + suffix)
        with path.open("r+b") as out:
            out.seek(at if at >= 0 else path.stat().st_size + at)
            out.write(data)

    return edit


def _cut(suffix: str, by: int) -> Damage:
    def cut(file: Path) -> None:
        path = file.with_suffix(suffix) if suffix == ".idx" else file.with_name(file.name + suffix)
        path.write_bytes(path.read_bytes()[:-by])

    return cut


HUGE, S = (1 << 64) - 1, len(IDS)
MEGATRON: dict[str, tuple[Damage, str]] = {
    "no index": (lambda f: f.with_suffix(".idx").unlink(), r"has no a\.idx beside it"),
    "magic": (_edit(".idx", 0, b"x"), r"does not begin as a Megatron-LM index does"),
    "empty": (lambda f: f.with_suffix(".idx").write_bytes(b""), r"does not begin as a Megatron-LM index does"),
    "version": (_edit(".idx", 9, b"\2"), r"version 2 with ids of kind 8"),
    "floats": (_edit(".idx", 17, b"\6"), r"ids of kind 6, wanted .* 1, 2, 3, 4, 5, 8"),
    "many sequences": (_edit(".idx", 18, struct.pack("<Q", HUGE)), rf"speaks of {HUGE} sequences"),
    "many documents": (_edit(".idx", 26, struct.pack("<Q", 1 << 61)), r"and 2305843009213693952 document bounds"),
    "cut index": (_cut(".idx", 3), r"is 119 bytes long"),
    "negative length": (_edit(".idx", 34, struct.pack("<i", -4)), r"do not follow one another within the 16 ids"),
    "length beyond": (_edit(".idx", 34, struct.pack("<i", 2**31 - 1)), r"do not follow one another"),
    "place": (_edit(".idx", 34 + 4 * S + 8, struct.pack("<q", 1 << 62)), r"do not follow one another"),
    "twice the same": (_edit(".idx", 34 + 4 * S + 8, struct.pack("<q", 0)), r"do not follow one another"),
    "bounds": (_edit(".idx", -24, struct.pack("<q", 0)), r"document bounds that do not ascend"),
    "bound beyond": (_edit(".idx", -24, struct.pack("<q", 1 << 40)), r"document bounds that do not ascend"),
    "last bound": (_edit(".idx", -8, struct.pack("<q", 3)), r"the documents end at sequence 3"),
    "cut bin": (_cut("", 2), r"do not follow one another within the 15 ids"),
    "half an id": (_cut("", 1), r"is 31 bytes long, wanted a multiple of 2"),
    "longer bin": (lambda f: f.write_bytes(f.read_bytes() + b"\0\0"), r"accounts for 16 ids in 4 sequences, a\.bin holds 17"),
    "vocabulary": (_edit("", 0, b"\x2c\1"), r"holds the token id 300, the teacher's tokenizer has 300"),
}  # fmt: skip
DATATROVE: dict[str, tuple[Damage, str]] = {
    "no index": (lambda f: f.with_name("a.ds.index").unlink(), r"has no a\.ds\.index beside it"),
    "cut index": (_cut(".index", 1), r"is 31 bytes long, wanted 8 for each document"),
    "missing end": (_cut(".index", 8), r"ends at id 8, a\.ds is 32 bytes long, its \.metadata speaks of 16 ids of 2"),
    "end beyond": (_edit(".index", -8, struct.pack("<Q", HUGE)), rf"ends at id {HUGE}, a\.ds is 32 bytes"),
    "ends descend": (_edit(".index", 0, struct.pack("<Q", 6)), r"document ends that do not ascend"),
    "an end beyond": (_edit(".index", 16, struct.pack("<Q", HUGE)), r"document ends that do not ascend"),
    "cut": (_cut("", 2), r"ends at id 16, a\.ds is 30 bytes long"),
    "metadata": (_edit(".metadata", 0, b"\xff\n"), r"does not say `TOKENIZER\|BYTES`"),
    "vocabulary": (_edit("", 2, b"\xff\xff"), r"holds the token id 65535, the teacher's tokenizer has 300"),
}  # fmt: skip


@pytest.mark.parametrize("what", MEGATRON)
def test_damaged_megatron_bins(what: str, teacher_folder: Path, tmp_path: Path) -> None:
    damage, words = MEGATRON[what]
    damage(megatron(tmp_path / "a.bin", IDS))
    with pytest.raises(InputError, match=words):
        _packed(tmp_path / "a.bin", teacher_folder)


@pytest.mark.parametrize("what", DATATROVE)
def test_damaged_datatrove_files(what: str, teacher_folder: Path, tmp_path: Path) -> None:
    damage, words = DATATROVE[what]
    damage(datatrove(tmp_path / "a.ds", IDS))
    with pytest.raises(InputError, match=words):
        _packed(tmp_path / "a.ds", teacher_folder)


def test_negative_ids_are_refused(teacher_folder: Path, tmp_path: Path) -> None:
    megatron(tmp_path / "a.bin", [[5, -100, 7]], code=4, kind="<i4")
    with pytest.raises(InputError, match="holds the token id -100"):
        _packed(tmp_path / "a.bin", teacher_folder)


def test_the_command_says_one_sentence(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare.bin").write_bytes(b"\0" * 64)
    arguments = ["cache", "--teacher", str(teacher_folder), "--seq-len", "8", "--out", str(tmp_path / "c")]
    assert main([*arguments, "--data", str(tmp_path / "bare.bin")]) == 2
    said = capsys.readouterr().err
    assert "has no bare.idx beside it" in said
    assert "Traceback" not in said
