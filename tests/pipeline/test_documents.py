"""Packing `documents`: every document is read as if it were alone, by the teacher and by the student."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stillroom
from stillroom.cli import main
from stillroom.pipeline.audit import audit_line
from stillroom.pipeline.config import CacheConfig, CorpusConfig, TeacherConfig
from stillroom.pipeline.packing import pack
from stillroom.pipeline.probe import probe
from stillroom.pipeline.run import build_cache
from stillroom.pipeline.teacher import Teacher, load_tokenizer
from stillroom.storage.errors import InputError
from stillroom.storage.segments import positions_of
from stillroom.storage.verify import verify
from stillroom.train.config import TrainConfig
from stillroom.train.data import CacheDataset
from stillroom.train.evaluate import evaluate
from stillroom.train.run import train_student

SMALL: dict[str, Any] = dict(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def _model(kind: str, folder: Path, teacher_folder: Path) -> Path:
    """A small random model of a family, with the tokenizer beside it."""
    import transformers as hf

    torch.manual_seed(0)
    if kind == "gpt2":  # learnt positions
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
        )
    elif kind == "gemma2":  # sliding windows and soft caps
        model = hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**SMALL, head_dim=16, sliding_window=4, attn_implementation="eager")
        )
    elif kind == "mamba":  # a state that runs on
        model = hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
        )
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    model.save_pretrained(folder)
    load_tokenizer(str(teacher_folder)).save_pretrained(folder)
    return folder


def test_positions_start_again_at_documents() -> None:
    starts = np.array([[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0]], np.bool_)
    assert positions_of(starts).tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_document_in_a_pack_is_read_as_if_alone(kind: str, teacher_folder: Path, tmp_path: Path) -> None:
    teacher = Teacher(TeacherConfig(teacher=str(_model(kind, tmp_path / kind, teacher_folder))))
    teacher.check_documents()
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(1, 300, (3, 24)))
    starts = np.zeros((3, 25), np.bool_)
    starts[0, [5, 6, 17]] = starts[1, 12] = True  # four documents, two, and one
    states = teacher.body(tokens, torch.from_numpy(positions_of(starts)))
    for row in range(3):
        bounds = [0, *np.flatnonzero(starts[row]).tolist(), 24]
        for first, stop in pairwise(bounds):
            alone = teacher.head(teacher.body(tokens[row : row + 1, first:stop])[0])
            torch.testing.assert_close(
                teacher.head(states[row, first:stop]), alone, rtol=0, atol=1e-5 * float(alone.abs().max())
            )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_mixes_documents_is_refused_by_name(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    folder = _model("mamba", tmp_path / "mamba", teacher_folder)
    config = CacheConfig(teacher=str(folder), data=str(text_file), out=tmp_path / "c", packing="documents", seq_len=16)
    with pytest.raises(InputError, match=r"mamba \(mamba\) does not read packed documents apart .*--packing concat"):
        build_cache(config)
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def made(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of short documents, several to a sequence, some cut by its end."""
    out = tmp_path_factory.mktemp("documents")
    texts = [" ".join(json.loads(line)["text"].split()[:7]) for line in text_file.read_text().splitlines()]
    texts.insert(20, " ".join(texts[:12]))  # one that fills sequences of its own
    (out / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_cache(_config(teacher_folder, out, "c", batch_size=8))
    return out


def _config(teacher_folder: Path, folder: Path, name: str, **changes: Any) -> CacheConfig:
    settings: dict[str, Any] = dict(
        teacher=str(teacher_folder), data=str(folder / "short.jsonl"), out=folder / name, packing="documents", seq_len=24,
        sequences_per_shard=4,
    )  # fmt: skip
    return CacheConfig(**{**settings, **changes})


def test_the_cache_is_that_of_documents_alone(made: Path, teacher_folder: Path) -> None:
    """Against the plain model, document by document: label log p and entropy of every row, nothing across documents."""
    from transformers import AutoModelForCausalLM

    assert verify(made / "c", hashes=True).sound
    cache = stillroom.open_cache(made / "c")
    assert cache.manifest.packing.policy == "documents"
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    for index in (0, 1, len(cache) - 1):
        (tokens, targets), starts = cache[index], cache.starts([index])
        assert starts is not None
        assert starts[0].sum() >= 2
        bounds = sorted({0, *np.flatnonzero(starts[0, :24]).tolist(), 24})
        for first, stop in pairwise(bounds):
            ids = torch.from_numpy(tokens[first : stop + 1].astype(np.int64))
            with torch.no_grad():
                logp = model(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1).numpy()
            last = (
                stop - first - 1 if starts[0, stop] else stop - first
            )  # the last row's label may be another document's
            label = logp[np.arange(stop - first), ids[1:].numpy()]
            np.testing.assert_allclose(targets.label_logp[first : first + last], label[:last], atol=0.01)
            np.testing.assert_allclose(
                targets.entropy[first : first + last], -(np.exp(logp) * logp).sum(-1)[:last], atol=0.05
            )
    assert audit_line(cache, Teacher(TeacherConfig(teacher=str(teacher_folder))), sequences=len(cache)).sound


def test_the_plan_measures_what_the_run_will_do(made: Path, teacher_folder: Path) -> None:
    teacher = Teacher(TeacherConfig(teacher=str(teacher_folder)))
    corpus = pack(_config(teacher_folder, made, "c"), load_tokenizer(str(teacher_folder)))
    one, other = (probe(teacher, corpus, batch_size=size) for size in (3, 8))
    np.testing.assert_allclose(one.logits_PV, other.logits_PV, atol=1e-4)
    targets = stillroom.open_cache(made / "c").read(range(len(corpus.tokens_SL1))).targets
    logp_P = one.logits_PV.double().log_softmax(-1)[torch.arange(len(one.logits_PV)), one.labels_P]
    place_P = one.sequence_P * 24 + one.row_P
    np.testing.assert_allclose(logp_P, targets.label_logp[place_P.numpy()], atol=0.01)


def test_same_bytes_for_any_batch_size(made: Path, teacher_folder: Path) -> None:
    """Though a batch whose sequences hold one document each would be computed another way by itself."""
    digests = []
    for name, batch_size in (("c", 8), ("one", 1), ("three", 3)):
        build_cache(_config(teacher_folder, made, name, batch_size=batch_size))
        shards = sorted(path for path in (made / name / "shards").rglob("0") if path.is_file())
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in shards])
    assert len(digests[0]) > 10
    single = positions_of(stillroom.open_cache(made / "c").starts(range(12)))[:, -1] == 23  # type: ignore[arg-type]
    assert single.any()
    assert not single.all()
    assert digests[0] == digests[1] == digests[2]


def test_packing_tells_documents_apart_in_the_fingerprint(made: Path, teacher_folder: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_folder))
    shared = {"data": str(made / "short.jsonl"), "seq_len": 24}
    apart, run_on = (pack(CorpusConfig(**shared, packing=p), tokenizer) for p in ("documents", "concat"))
    np.testing.assert_array_equal(apart.tokens_SL1, run_on.tokens_SL1)
    assert apart.fingerprint != run_on.fingerprint
    assert apart.starts_SL1 is not None
    assert apart.mask_SL is not None
    stream = apart.tokens_SL1[:, :-1].ravel()
    np.testing.assert_array_equal(apart.starts_SL1[:, :-1].ravel()[1:], stream[:-1] == tokenizer.eos_token_id)
    np.testing.assert_array_equal(apart.mask_SL, ~apart.starts_SL1[:, 1:])


def test_the_student_reads_what_the_teacher_read(made: Path, teacher_folder: Path) -> None:
    """The teacher as its own student: its log-probabilities on a training batch are those the cache keeps."""
    from transformers import AutoModelForCausalLM

    batch = CacheDataset(stillroom.open_cache(made / "c")).__getitems__([3, 0, 5])
    assert batch.positions_BL is not None
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    with torch.no_grad():
        logp_BLV = model(**batch.inputs, use_cache=False).logits.log_softmax(-1)
    label_BL = logp_BLV.gather(-1, batch.labels_BL.clamp(min=0)[..., None])[..., 0]
    assert batch.targets is not None
    kept_BL = batch.mask_BL
    assert not kept_BL.all()
    torch.testing.assert_close(
        label_BL[kept_BL], batch.targets.label_logp.view_as(label_BL)[kept_BL], atol=0.01, rtol=0
    )


@pytest.mark.parametrize("live", [False, True])
def test_training_passes_positions_to_student_and_live_teacher(
    made: Path, teacher_folder: Path, student_config: Path, tmp_path: Path, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch without its positions would train towards another loss: both are run, and differ."""
    settings: dict[str, Any] = dict(
        student=str(student_config), cache=str(made / "c"), steps=3, batch_size=4, lr=1e-3, dtype="float32",
        teacher=str(teacher_folder) if live else None,
    )  # fmt: skip
    told = train_student(TrainConfig(out=tmp_path / "told", **settings)).loss
    monkeypatch.setattr(
        "stillroom.train.data.positions_of", lambda starts: np.broadcast_to(np.arange(24), (len(starts), 24)).copy()
    )
    assert train_student(TrainConfig(out=tmp_path / "untold", **settings)).loss != told


def test_evaluate_gives_both_models_the_positions(
    made: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher as its own student: what the cache says of its labels, rows across documents left out."""
    command = ["evaluate", "--student", str(teacher_folder), "--cache", str(made / "c"), "--json"]

    def measured(*more: str) -> dict[str, Any]:
        assert main([*command, *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    cache = stillroom.open_cache(made / "c")
    targets = cache.read(range(len(cache))).targets
    kept_N = np.diff(targets.offsets) > 0
    assert not kept_N.all()
    alone, beside = measured(), measured("--teacher", str(teacher_folder))
    assert alone["rows"] == beside["rows"] == kept_N.sum()
    assert alone["lm_loss"] == pytest.approx(-targets.label_logp[kept_N].mean(), abs=1 / 256 + 1e-4)
    assert (alone["sampled"], beside["sampled"]) == (["kl", "acceptance"], [])
    assert beside["teacher_lm_loss"] == beside["lm_loss"] == pytest.approx(alone["lm_loss"])
    assert (beside["top1_agreement"], alone["top1_agreement"]) == (1, 1)
    assert beside["kl"] == pytest.approx(0, abs=1e-6)
    position_N = positions_of(cache.starts(range(len(cache)))).ravel()[kept_N]
    assert [g["rows"] for g in alone["by_position"]] == np.bincount(np.frexp(position_N)[1]).tolist()
    monkeypatch.setattr(
        "stillroom.train.data.positions_of", lambda starts: np.broadcast_to(np.arange(24), (len(starts), 24)).copy()
    )
    assert measured()["kl"] > abs(alone["kl"]) + 0.2  # untold, it is no longer the teacher
    assert main(command[:-1]) == 0
    said = capsys.readouterr().out
    assert "(estimated from sampled targets)" in said
    assert "rows whose first choice the cache keeps)" in said


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_student_that_mixes_documents_is_refused_by_name(made: Path, teacher_folder: Path, tmp_path: Path) -> None:
    folder = _model("mamba", tmp_path / "mamba", teacher_folder)
    config = TrainConfig(student=str(folder), cache=str(made / "c"), steps=1, batch_size=2, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"student .*mamba \(mamba\) does not read packed documents apart"):
        train_student(config)
    with pytest.raises(InputError, match=r"student .*mamba \(mamba\) does not read packed documents apart"):
        evaluate(folder, cache=stillroom.open_cache(made / "c"))
    assert not (tmp_path / "run").exists()
