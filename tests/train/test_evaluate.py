from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import stillroom
from stillroom.storage.codes import ENTROPY_STEP, LABEL_LOGP_STEP
from stillroom.storage.errors import InputError
from stillroom.train import held_out as module
from stillroom.train.evaluate import evaluate
from stillroom.train.views import Bin, calibration_error


def _probabilities(folder: Path, tokens_SL1: npt.NDArray[np.uint32], width: int) -> npt.NDArray[np.float64]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens_SL1[:, :-1].astype(np.int64))).logits
    z = logits.flatten(0, 1)[:, :width].double().numpy()
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("chunk", [1 << 22, 97 * 7])
@pytest.mark.parametrize("student_width", [97, 112])
def test_figures_are_their_definitions(
    save_model: Callable[..., Path],
    teacher: Path,
    tokens_SL1: npt.NDArray[np.uint32],
    tmp_path: Path,
    chunk: int,
    student_width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    student = save_model(tmp_path / "student", vocab_size=student_width, seed=5)
    seen: list[tuple[int, int]] = []
    result = evaluate(
        student, tokens_SL1=tokens_SL1, teacher=teacher, batch_size=7, on_progress=lambda *at: seen.append(at)
    )
    q, p = (_probabilities(m, tokens_SL1, 97) for m in (student, teacher))
    labels = tokens_SL1[:, 1:].flatten()
    rows = np.arange(len(labels))
    lm_loss = -np.log(q[rows, labels]).mean()
    assert result.rows == len(labels)
    assert result.lm_loss == pytest.approx(lm_loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(lm_loss), rel=1e-4)
    assert result.teacher_lm_loss == pytest.approx(-np.log(p[rows, labels]).mean(), rel=1e-5)
    assert result.kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-4)
    assert result.acceptance == pytest.approx(np.minimum(p, q).sum(1).mean(), rel=1e-5)
    assert result.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    confidence, hit = q.max(1), q.argmax(1) == labels
    ece = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    assert result.ece == pytest.approx(ece, rel=1e-4)
    assert seen[0] == (7, len(tokens_SL1))
    assert seen[-1] == (len(tokens_SL1), len(tokens_SL1))


def test_a_model_agrees_with_itself(teacher: Path, tokens_SL1: npt.NDArray[np.uint32]) -> None:
    result = evaluate(str(teacher), tokens_SL1=tokens_SL1, teacher=teacher, rows=33)
    assert result.rows == 48  # three whole sequences of 16
    assert result.kl == pytest.approx(0.0, abs=1e-6)
    assert result.acceptance == pytest.approx(1.0, abs=1e-5)
    assert result.top1_agreement == 1.0
    assert result.lm_loss == result.teacher_lm_loss
    alone = evaluate(teacher, tokens_SL1=tokens_SL1, rows=33)
    assert (alone.lm_loss, alone.ece, alone.kl) == (result.lm_loss, result.ece, None)


def test_calibration_error_by_hand() -> None:
    """Ten rows at 0.9 of which 6 hit, thirty at 0.2 of which 9 hit: (10 * 0.3 + 30 * 0.1) / 40."""
    bins = [Bin(0.8, 0.9, 10, 0.9, 0.6), Bin(0.1, 0.2, 30, 0.2, 0.3), Bin(0.9, 1.0, 0, None, None)]
    assert calibration_error(bins) == pytest.approx(0.15)


def test_what_cannot_be_evaluated(
    student: Path, teacher: Path, tokens_SL1: npt.NDArray[np.uint32], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no weights"):
        evaluate(student, tokens_SL1=tokens_SL1)
    with pytest.raises(InputError, match="token ids run from"):
        evaluate(teacher, tokens_SL1=tokens_SL1 + 1)
    with pytest.raises(InputError, match="ends at 16"):
        evaluate(teacher, tokens_SL1=np.tile(tokens_SL1, 2))
    with pytest.raises(InputError, match="does not exist"):
        evaluate(teacher, tokens_SL1=tokens_SL1, teacher=tmp_path / "nowhere")


@pytest.fixture(scope="module")
def near(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student half like the teacher: its weights, with noise."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher)
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("near")
    model.save_pretrained(folder)
    return folder


# Means over 640 rows that were drawn apart: within 4.5 standard errors but for 7 in a million. What rounding adds is bounded.
ERRORS, DRAWS = 4.5, 12
TAIL_RATIO = math.exp(18 / 63)  # of two levels of log p below 1/N; a p between them goes to either, in the mean to p
TOO_LOW, TOO_HIGH = (
    (TAIL_RATIO - 1) / (4 * TAIL_RATIO),
    (1 + TAIL_RATIO) ** 2 / (4 * TAIL_RATIO) - 1,
)  # of the tail's mass
HEAD_RATIO = DRAWS ** (1 / 191)


@pytest.mark.parametrize(
    "sampler",
    [
        {}, {"keep_logp": "head"}, {"kind": "random"}, {"kind": "systematic", "keep_logp": "none"},
        {"kind": "random", "exponent": 0.7},
    ],
)  # fmt: skip
def test_a_cache_stands_in_for_the_teacher(
    make_cache: Callable[..., Path],
    near: Path,
    teacher: Path,
    tokens_SL1: npt.NDArray[np.uint32],
    sampler: dict[str, Any],
) -> None:
    cache = stillroom.open_cache(make_cache(**sampler))
    found = evaluate(near, cache=cache, batch_size=7)
    exact = evaluate(near, cache=cache, teacher=teacher)
    assert (exact.sampled, exact.top1_rows) == ((), None)
    assert (found.lm_loss, found.ece, found.rows) == pytest.approx((exact.lm_loss, exact.ece, exact.rows))
    assert found.teacher_lm_loss == pytest.approx(exact.teacher_lm_loss, abs=LABEL_LOGP_STEP / 2 + 1e-6)
    if not sampler:
        assert exact == evaluate(near, tokens_SL1=tokens_SL1, teacher=teacher)

    q, p = (_probabilities(m, tokens_SL1, 97) for m in (near, teacher))
    targets = cache.read(range(len(cache))).targets
    row_E = np.repeat(np.arange(len(q)), np.diff(targets.offsets))
    at = row_E, targets.ids

    def sampling(f_NV: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Of sum p f, row by row: the estimate less the truth."""
        error_N: npt.NDArray[np.float64] = np.bincount(row_E, targets.weights * f_NV[at], len(q)) - (p * f_NV).sum(1)
        return error_N

    error_N = sampling(-np.log(q))
    assert found.kl is not None
    assert exact.kl is not None
    allowed = ERRORS * error_N.std(ddof=1) / math.sqrt(len(q))
    if sampler == {"kind": "random"}:  # its variance is known: that of one draw over N
        variance_N = (p * np.log(q) ** 2).sum(1) - (p * np.log(q)).sum(1) ** 2
        allowed = ERRORS * math.sqrt(variance_N.sum() / DRAWS) / len(q)
    assert found.kl - exact.kl == pytest.approx(error_N.mean(), abs=ENTROPY_STEP / 2 + 1e-5)
    assert abs(error_N.mean()) <= allowed
    assert allowed < 0.2 * exact.kl  # it can tell

    assert found.sampled == (("kl", "acceptance") if sampler.get("keep_logp", "all") == "all" else ("kl",))
    if found.acceptance is not None:
        assert exact.acceptance is not None
        error_N = sampling(np.minimum(1, q / p))
        allowed = ERRORS * error_N.std(ddof=1) / math.sqrt(len(q))
        tail = float(np.where(p < 1 / DRAWS, p, 0).sum(1).mean())
        head = (HEAD_RATIO - 1) * (1 - tail)
        assert -allowed - TOO_LOW * tail - head <= found.acceptance - exact.acceptance
        assert found.acceptance - exact.acceptance <= allowed + TOO_HIGH * tail + head
        assert allowed < 0.1 * min(exact.acceptance, 1 - exact.acceptance)

    has_head_N = p.max(1) >= 1 / DRAWS
    if sampler.get("kind", "threshold") == "threshold":
        assert found.top1_rows == has_head_N.sum() < found.rows
        assert found.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1))[has_head_N].mean())
    else:
        assert found.top1_agreement is None


def test_what_a_partial_cache_can_say(make_cache: Callable[..., Path], near: Path, teacher: Path) -> None:
    """The teacher's first choice is there, its mass is not: no divergence."""
    cache = stillroom.open_cache(make_cache(kind="top_k", hole=True))
    found, exact = evaluate(near, cache=cache), evaluate(near, cache=cache, teacher=teacher)
    assert (found.kl, found.acceptance, found.sampled) == (None, None, ())
    assert found.rows == found.top1_rows == exact.rows == len(cache) * 16 - 1  # the hole does not count
    assert found.top1_agreement == exact.top1_agreement
    bare = evaluate(near, cache=stillroom.open_cache(cache.path, columns=("tokens",)), rows=20)
    assert (bare.teacher_lm_loss, bare.top1_agreement is None, bare.rows) == (None, False, 31)


def test_rows_without_targets_do_not_count(
    make_cache: Callable[..., Path], cache: Path, near: Path, teacher: Path
) -> None:
    holed, whole = stillroom.open_cache(make_cache(hole=True)), stillroom.open_cache(cache)
    for beside in (None, teacher):
        found = evaluate(near, cache=holed, teacher=beside, rows=16)
        every = evaluate(near, cache=whole, teacher=beside, rows=16)
        assert (found.rows, every.rows) == (15, 16)
        assert found.lm_loss != every.lm_loss


def test_what_does_not_fit_a_cache(
    cache: Path, save_model: Callable[..., Path], tokens_SL1: npt.NDArray[np.uint32], near: Path, tmp_path: Path
) -> None:
    opened = stillroom.open_cache(cache)
    narrow = save_model(tmp_path / "narrow", vocab_size=90)
    with pytest.raises(InputError, match=r"student .* has a vocabulary of 90, the cache's is 97"):
        evaluate(narrow, cache=opened)
    wide = save_model(tmp_path / "wide", vocab_size=112)
    with pytest.raises(InputError, match=r"teacher .* has a vocabulary of 90, the cache's is 97"):
        evaluate(wide, cache=opened, teacher=narrow)
    assert evaluate(wide, cache=opened, rows=16).rows == 16
    with pytest.raises(InputError, match="with tokens and a cache, or with neither"):
        evaluate(near, cache=opened, tokens_SL1=tokens_SL1)
