from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import stillroom
from stillroom.__main__ import main
from stillroom.storage.errors import InputError
from stillroom.train.evaluate import evaluate
from stillroom.train.tasks import run_tasks
from stillroom.train.token_bytes import bits_per_byte, token_bytes
from stillroom.train.views import Group

Tokens = npt.NDArray[np.uint32]
MEANS = ("lm_loss", "kl", "top1_agreement", "acceptance", "teacher_lm_loss")


@pytest.fixture(scope="module")
def other(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with weights."""
    return save_model(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture(scope="module")
def truth(teacher: Path, other: Path, tokens_SL1: Tokens) -> dict[str, npt.NDArray[np.float64]]:
    """Every figure of every row, by definition; and the student's first choice."""
    from transformers import AutoModelForCausalLM

    logp = []
    for folder in (other, teacher):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            z = model(input_ids=torch.from_numpy(tokens_SL1[:, :-1].astype(np.int64))).logits.flatten(0, 1).double()
        logp.append(z.log_softmax(-1).numpy())
    logq, logp_T = logp
    labels = tokens_SL1[:, 1:].ravel()
    rows = np.arange(len(labels))
    return {
        "lm_loss": -logq[rows, labels],
        "kl": (np.exp(logp_T) * (logp_T - logq)).sum(1),
        "top1_agreement": (logq.argmax(1) == logp_T.argmax(1)).astype(float),
        "acceptance": np.minimum(np.exp(logq), np.exp(logp_T)).sum(1),
        "teacher_lm_loss": -logp_T[rows, labels],
        "confidence": np.exp(logq.max(1)),
        "hit": (logq.argmax(1) == labels).astype(float),
    }


def _is_mean(group: Group, truth: dict[str, npt.NDArray[np.float64]], inside: npt.NDArray[np.bool_]) -> None:
    assert group.rows == inside.sum() > 0
    for name in MEANS:
        assert getattr(group, name) == pytest.approx(truth[name][inside].mean(), rel=1e-4, abs=1e-6), name


def test_views_are_means_over_their_rows(
    teacher: Path, other: Path, tokens_SL1: Tokens, truth: dict[str, npt.NDArray[np.float64]], cache: Path
) -> None:
    found = evaluate(other, tokens_SL1=tokens_SL1, teacher=teacher, batch_size=7)
    labels, position = tokens_SL1[:, 1:].ravel(), np.tile(np.arange(16), len(tokens_SL1))

    assert [(g.first, g.last) for g in found.by_position] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    for group in found.by_position:
        _is_mean(group, truth, (position >= group.first) & (position <= group.last))

    assert len(found.reliability) == 15
    for b, one in enumerate(found.reliability):
        inside = (truth["confidence"] > b / 15) & (truth["confidence"] <= (b + 1) / 15)
        assert one.rows == inside.sum()
        if one.rows:
            assert one.confidence == pytest.approx(truth["confidence"][inside].mean(), rel=1e-5)
            assert one.hit_rate == pytest.approx(truth["hit"][inside].mean())
    gaps = [b.rows * abs(b.confidence - b.hit_rate) for b in found.reliability if b.rows]  # type: ignore[operator]
    assert found.ece == pytest.approx(sum(gaps) / found.rows)

    # Occurrences in what is evaluated; then of half of it, in a cache of the whole.
    count_V = np.bincount(labels, minlength=97)
    for result, occurs_N in (
        (found, count_V[labels]),
        (
            evaluate(
                other, tokens_SL1=tokens_SL1[:20], teacher=teacher,
                frequency_cache=stillroom.open_cache(cache, columns=("tokens",)),
            ),
            count_V[labels[: 20 * 16]],
        ),
    ):  # fmt: skip
        assert result.counted_tokens == len(labels)
        at = 0
        for group in result.by_frequency:
            inside = np.zeros(len(labels), np.bool_)
            inside[: len(occurs_N)] = (occurs_N >= group.first) & (occurs_N <= group.last)
            _is_mean(group, truth, inside)
            assert {group.first, group.last} <= set(occurs_N)
            at += group.rows
        assert at == result.rows == len(occurs_N)


def test_a_tenth_of_the_rows_each(other: Path) -> None:
    """Labels at about sixteen frequencies: groups as their definition has them."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(16), np.arange(1, 17))
    tokens_SL1 = np.concatenate([rng.permutation(labels), [0]])[: 8 * 17].reshape(8, 17).astype(np.uint32)
    seen = np.bincount(tokens_SL1[:, 1:].ravel(), minlength=97)
    result = evaluate(other, tokens_SL1=tokens_SL1)
    rows = tokens_SL1[:, 1:].size
    expected: dict[int, list[int]] = {}
    for frequency in sorted(set(seen[seen > 0])):
        below, at = seen[(seen > 0) & (seen < frequency)].sum(), seen[seen == frequency].sum()
        expected.setdefault(int(10 * (below + at / 2) / rows), []).append(int(frequency))
    assert [(g.first, g.last) for g in result.by_frequency] == [(f[0], f[-1]) for f in expected.values()]
    assert (result.by_frequency[0].kl, result.sampled, result.tasks) == (None, (), None)


def test_views_from_a_cache_alone(cache: Path, other: Path) -> None:
    """Groups of estimates have the mean of their rows' estimates: together they give the figure of all rows."""
    found = evaluate(other, cache=stillroom.open_cache(cache))
    for groups in (found.by_frequency, found.by_position):
        for name in ("lm_loss", "kl", "acceptance", "teacher_lm_loss"):
            mean = sum(g.rows * getattr(g, name) for g in groups) / found.rows
            assert mean == pytest.approx(getattr(found, name), rel=1e-6)
        assert sum(g.top1_rows or g.rows for g in groups if g.top1_agreement is not None) == found.top1_rows
    assert json.loads(json.dumps(asdict(found)))["by_position"][0]["rows"] == 40


TEXT = "the still room, naïve façade — 蒸留 \n\t 42 the room"


def _trained(model: Any, trainer: Any, pre: Any, decoder: Any, folder: Path) -> tuple[Tokenizer, Path]:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer, folder / "tokenizer.json"


def _spelt(tokenizer: Tokenizer, file: Path, text: str) -> float:
    bytes_V = token_bytes(file)
    assert bytes_V is not None
    assert len(bytes_V) == tokenizer.get_vocab_size()
    return float(bytes_V[tokenizer.encode(text).ids].sum())


def test_bytes_of_tokens(tmp_path: Path) -> None:
    size = len(TEXT.encode())
    byte_level, file = _trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), tmp_path / "byte-level",
    )  # fmt: skip
    assert _spelt(byte_level, file, TEXT) == size
    assert _spelt(byte_level, file, "übrig <|end|>") == len("übrig ".encode())
    bytes_V = token_bytes(file)
    assert bytes_V is not None
    rows_V = np.zeros(len(bytes_V))
    np.add.at(rows_V, byte_level.encode(TEXT).ids, 1)
    loss = math.log(256) * size / rows_V.sum()  # a uniform guess of every byte
    assert bits_per_byte(loss, rows_V, bytes_V) == pytest.approx(8.0)

    pieces = {"<unk>": 0, "\u2581the": 1, "\u2581": 2, "r": 3, "oom": 4, **{f"<0x{b:02X}>": 5 + b for b in range(256)}}
    sentence = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    sentence.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    sentence.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )  # as Llama 2's
    sentence.save(str(tmp_path / "sentence.json"))
    assert _spelt(sentence, tmp_path / "sentence.json", "r é蒸 r") == len("r é蒸 r".encode())

    unigram, file = _trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=40, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never"), tmp_path / "unigram",
    )  # fmt: skip
    assert _spelt(unigram, file, "the room") == len("the room")
    bytes_V = token_bytes(file)
    assert bytes_V is not None
    unknown = np.bincount(unigram.encode("the Ж").ids, minlength=len(bytes_V))
    assert bits_per_byte(1.0, unknown, bytes_V) is None  # nobody knows what an unknown token stood for

    _, file = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False),
        pre_tokenizers.Whitespace(), decoders.WordPiece(), tmp_path / "word-piece",
    )  # fmt: skip
    assert token_bytes(file) is None  # its spaces are lost


def test_evaluate_shows_views_and_bits_per_byte(
    teacher_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--student", str(teacher_folder), "--data", str(text_file), "--seq-len", "16"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    ids = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    labels = ids[1 : found["rows"] + 1]
    size = len(tokenizer.decode(labels, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
    assert found["bits_per_byte"] == pytest.approx(found["lm_loss"] * found["rows"] / math.log(2) / size)
    assert main([*command, "--views"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("hit rate", "by how often the label occurs in the evaluated text", "by position", "8 to 15"):
        assert words in said


def test_tasks_without_lm_eval(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else there(name))
    assert main(["evaluate", "--student", str(teacher), "--tasks", "hellaswag,arc_easy"]) == 2
    said = capsys.readouterr().err
    assert "tasks (hellaswag, arc_easy) need lm-eval, which is not installed: pip install" in said
    assert "Traceback" not in said


def test_tasks_of_a_folder(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Needs lm-eval, which no default installation has."""
    pytest.importorskip("lm_eval", reason="pip install 'stillroom[lm-eval]'")
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {text_file}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    found = run_tasks(str(teacher_folder), [], folder=tmp_path, limit=4)
    assert found["rolling"]["bits_per_byte"] > 0
    with pytest.raises(InputError, match="nope is no task in"):
        run_tasks(str(teacher_folder), ["nope"], folder=tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        run_tasks(str(teacher_folder), ["nope"], folder=tmp_path / "nowhere")
