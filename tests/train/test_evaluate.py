from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stillroom.storage.errors import InputError
from stillroom.train import evaluate as module
from stillroom.train.evaluate import calibration_error, evaluate


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
    assert calibration_error(np.array([[10.0, 30.0, 0.0], [9.0, 6.0, 0.0], [6.0, 9.0, 0.0]])) == pytest.approx(0.15)


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
