"""Several caches as one source, a smaller vocabulary, a column of weights: what a run reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.targets import SparseTargets
from stillroom.train.around import ReducedVocabulary, WithColumn
from stillroom.train.batch import Batch
from stillroom.train.config import TrainConfig
from stillroom.train.data import CacheDataset, TokenDataset
from stillroom.train.mixing import ChainedDataset, MixedDataset, mixed
from stillroom.train.run import train_student

Settings = Callable[..., TrainConfig]
Maker = Callable[..., Path]
VOCAB = 97


def dense(targets: Any) -> torch.Tensor:
    """Weights of rows over the whole vocabulary."""
    full = torch.zeros(targets.rows, VOCAB, dtype=torch.float64)
    row_E = torch.repeat_interleave(torch.arange(targets.rows), torch.as_tensor(np.diff(np.asarray(targets.offsets))))
    full[row_E, torch.as_tensor(np.asarray(targets.ids)).long()] = torch.as_tensor(np.asarray(targets.weights)).double()
    return full


@pytest.fixture(scope="module")
def draws(make_cache: Maker) -> tuple[Path, Path]:
    """Two independent draws of one teacher."""
    return make_cache(seed=0), make_cache(seed=1)


def test_a_mixture_is_linear_and_keeps_what_is_known(draws: tuple[Path, Path]) -> None:
    one, other = (open_cache(path) for path in draws)
    source, indices = MixedDataset([one, other], [3.0, 1.0]), [7, 0, 31]
    batch = source.__getitems__(indices)
    parts = [CacheDataset(cache).__getitems__(indices) for cache in (one, other)]
    assert batch.targets is not None
    for part in parts:
        assert torch.equal(part.tokens_BL, batch.tokens_BL)
    found = [part.targets for part in parts]
    assert found[0] is not None
    assert found[1] is not None
    torch.testing.assert_close(dense(batch.targets), 0.75 * dense(found[0]) + 0.25 * dense(found[1]), atol=1e-7, rtol=0)
    assert source.kind == "threshold"
    assert batch.targets.logp is not None
    assert torch.equal(batch.targets.entropy, found[0].entropy)
    torch.testing.assert_close(batch.targets.label_logp, found[0].label_logp, atol=1e-5, rtol=0)
    row_E = batch.targets.entry_rows()
    within = row_E[1:] == row_E[:-1]
    assert (batch.targets.weights.diff()[within] <= 0).all()
    assert source.fingerprint != MixedDataset([one, other], [1.0, 1.0]).fingerprint
    assert MixedDataset([one, other], [1, 1], with_targets=False).__getitems__([3]).targets is None


def test_several_teachers_mix_and_lose_log_probabilities() -> None:
    parts = [
        SparseTargets(
            np.array([0, 2]), np.array(ids, np.int32), np.array(w, np.float32), np.array([np.log(p)], np.float32),
            np.array([1.0], np.float32), np.log(np.array(w, np.float32)),
        )
        for ids, w, p in (([5, 2], [0.75, 0.25], 0.75), ([2, 9], [0.5, 0.5], 0.25))
    ]  # fmt: skip
    found = mixed(parts, [0.5, 0.5], one_teacher=False)
    assert found.ids.tolist() == [2, 5, 9]  # 2 and 5 weigh the same: by id
    assert found.weights.tolist() == [0.375, 0.375, 0.25]
    assert found.label_logp[0] == pytest.approx(np.log(0.5))
    assert found.logp is None
    assert np.isnan(found.entropy[0])


def test_chained_caches_are_read_in_one_order(make_cache: Maker, draws: tuple[Path, Path]) -> None:
    first, second = open_cache(draws[0]), open_cache(make_cache(kind="systematic", draws=20))
    source = ChainedDataset([first, second])
    assert len(source) == len(first) + len(second)
    assert source.lengths == first.lengths + second.lengths
    assert source.kind == "counts with log p"
    batch = source.__getitems__([41, 3, 40 + 39, 0])
    singles = [CacheDataset(cache)[index] for cache, index in ((second, 1), (first, 3), (second, 39), (first, 0))]
    assert batch.targets is not None
    for number, single in enumerate(singles):
        assert torch.equal(batch.tokens_BL[number], single.tokens_BL[0])
        assert single.targets is not None
        rows = slice(number * 16, number * 16 + 16)
        assert torch.equal(dense(batch.targets)[rows], dense(single.targets))


def test_caches_train_together(settings: Settings, draws: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = map(str, draws)
    for number, cache in enumerate((f"{one},{other}", f"{one}:0.5,{other}:0.5")):
        result = train_student(settings(cache=cache, out=tmp_path / str(number)))
        assert np.isfinite(result.loss)
    assert "fingerprint" in (tmp_path / "1" / "README.md").read_text()


def test_caches_that_do_not_go_together(
    settings: Settings, draws: tuple[Path, Path], make_cache: Maker, save_model: Maker, tmp_path: Path
) -> None:
    one, other = map(str, draws)
    refusals = [
        (dict(cache=f"{one}:0.5,{other}"), "some have a share and some have none"),
        (dict(cache=f"{one}:0.0,{other}:1"), "wanted a positive number for each"),
        (dict(cache=f"{one}:1,{make_cache(kind='systematic', keep_logp='none')}:1", loss="jsd"), "keep-logp all"),
    ]
    for changes, words in refusals:
        with pytest.raises(InputError, match=words):
            train_student(settings(**changes))
    damaged = open_cache(make_cache())
    object.__setattr__(damaged.manifest.corpus, "fingerprint", "d" * 64)
    with pytest.raises(InputError, match=r"differ in corpus\.fingerprint .* only caches of the same tokens"):
        MixedDataset([open_cache(one), damaged], [1, 1])


@pytest.fixture
def id_map(tmp_path: Path) -> Path:
    """A student with the teacher's ids 0 to 59 in the opposite order."""
    map_W = np.full(VOCAB, -1)
    map_W[:60] = np.arange(60)[::-1]
    np.save(tmp_path / "map.npy", map_W)
    return tmp_path / "map.npy"


def test_a_smaller_vocabulary(
    settings: Settings, cache: Path, id_map: Path, save_config: Maker, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    plain = CacheDataset(open_cache(cache))
    source = ReducedVocabulary(plain, id_map, unknown=0, vocab_size=VOCAB, student_ids=61)
    batch, whole = source[0], plain[0]
    assert batch.targets is not None
    assert whole.targets is not None
    known = whole.labels_BL < 60
    assert torch.equal(batch.mask_BL, known)
    assert torch.equal(batch.labels_BL[known], 59 - whole.labels_BL[known])
    assert (batch.labels_BL[~known] == -100).all()
    kept_NV = dense(whole.targets)[:, :60]
    mass_N = kept_NV.sum(1)
    torch.testing.assert_close(
        dense(batch.targets)[mass_N > 0, :60].flip(1), (kept_NV / mass_N[:, None])[mass_N > 0], atol=1e-6, rtol=0
    )
    rows, mass = source.lost()
    all_labels = np.concatenate([plain[i].labels_BL.numpy() for i in range(40)])
    assert rows == pytest.approx((all_labels >= 60).mean())
    assert 0.0 < mass < 1.0
    student = save_config(tmp_path / "small", vocab_size=61)
    result = train_student(settings(cache=cache, student=str(student), id_map=id_map))
    assert np.isfinite(result.loss)
    assert any("the student's vocabulary lacks ids" in note for note in result.notes)
    with pytest.raises(InputError, match="not defined on what a smaller vocabulary keeps"):
        train_student(settings(cache=cache, student=str(student), id_map=id_map, loss="jsd", out=tmp_path / "other"))


@pytest.mark.parametrize(
    ("map_W", "words"),
    [
        (np.arange(96), r"wanted integers \[97\]"),
        (np.zeros(97, np.int64), "of them different"),
        (np.arange(97) + 5, "runs from 5 to 101"),
        (np.zeros(97), "wanted integers"),
    ],
)
def test_maps_that_are_none(cache: Path, map_W: npt.NDArray[Any], words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "map.npy", map_W)
    with pytest.raises(InputError, match=words):
        ReducedVocabulary(
            CacheDataset(open_cache(cache)), tmp_path / "map.npy", unknown=0, vocab_size=VOCAB, student_ids=VOCAB
        )


def test_a_column_of_weights(settings: Settings, cache: Path, tmp_path: Path) -> None:
    plain = CacheDataset(open_cache(cache))
    column_SL = np.random.default_rng(0).random((40, 16), np.float32)
    np.save(tmp_path / "w.npy", column_SL)
    source = WithColumn(plain, tmp_path / "w.npy")
    batch = source.__getitems__([4, 9])
    assert isinstance(batch, Batch)
    assert batch.weight_BL is not None
    assert np.array_equal(batch.weight_BL.numpy(), column_SL[[4, 9]])
    assert source.mean_power(2.0) == pytest.approx(float((column_SL.astype(np.float64) ** 2).mean()))
    common = dict(cache=cache, row_weight="column", row_weight_file=tmp_path / "w.npy")
    weighted = train_student(settings(**common))
    plain_run = train_student(settings(cache=cache, out=tmp_path / "plain"))
    assert weighted.loss != plain_run.loss
    for wrong, words in ((column_SL[:39], "wanted floats"), (column_SL - 1, "negative"), (column_SL * 0, "all 0")):
        np.save(tmp_path / "w.npy", wrong)
        with pytest.raises(InputError, match=words):
            WithColumn(plain, tmp_path / "w.npy")


def test_the_map_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/reuse.md, as printed: a student with half of 1,000 ids."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "reuse.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/reuse.md", "exec"), {})
    tokens_SL1 = np.array([[0, 2, 998, 4]], np.uint32)
    reduced = ReducedVocabulary(
        TokenDataset(tokens_SL1), tmp_path / "map.npy", unknown=0, vocab_size=1000, student_ids=500
    )
    assert reduced[0].tokens_BL.tolist() == [[0, 1, 499]]
    assert reduced.map_W[1::2].tolist() == [-1] * 500
