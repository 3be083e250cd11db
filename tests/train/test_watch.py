"""Held-out figures while training, and the watch for teacher hacking."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

import stillroom
from stillroom.storage.errors import InputError, NotACacheError
from stillroom.train.config import TrainConfig
from stillroom.train.evaluate import evaluate
from stillroom.train.run import train_student
from stillroom.train.watch import Seen, change, hacked
from tests.train import fleet

Settings = Callable[..., TrainConfig]
Maker = Callable[..., Path]
KEYS = ("lm_loss", "kl", "top1_agreement", "acceptance")


@pytest.fixture(scope="module")
def held_out(make_cache: Maker) -> Path:
    """A cache that goes by another corpus."""
    return make_cache(corpus="d", seed=7)


def _metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_error_of_a_change_by_hand() -> None:
    """Changes 2, 0, 4 over 1, 1, 2 rows, and a sequence without rows: D = 6/4; d - D n = 0.5, -1.5, 1."""
    found = change(np.array([1.0, 1.0, 1.0, 9.0]), np.array([3.0, 1.0, 5.0, 9.0]), np.array([1.0, 1.0, 2.0, 0.0]))
    assert (found.mean, found.error) == (1.5, pytest.approx(math.sqrt(3 / 2 * (0.25 + 2.25 + 1.0)) / 4))
    assert change(np.ones(1), np.zeros(1), np.ones(1)).error == math.inf  # one sequence tells nothing of others


def _triple(rng: np.random.Generator, kl: float, ce: float) -> list[Seen]:
    """Three evaluations of 64 sequences of 1 to 16 rows; each change has the given mean a row, a deviation of 1 that the rows
    of a sequence share, and rounding's of 0.1 a row.
    """
    rows_S = rng.integers(1, 17, 64).astype(float)
    sums = np.zeros((3, 2, 64))
    for at in (1, 2):
        noise_2S = rng.normal(size=(2, 64)) * rows_S + 0.1 * rng.normal(size=(2, 64)) * np.sqrt(rows_S)
        sums[at] = sums[at - 1] + np.array([[kl], [ce]]) * rows_S + noise_2S
    return [Seen(100 * at, rows_S, *sums[at]) for at in range(3)]


def test_the_rule() -> None:
    rng = np.random.default_rng(0)
    # Of one interval the standard error is sqrt(sum n**2) / sum n = 0.14 at n of 1 to 16, of both 0.2.
    still = [_triple(rng, 0.0, 0.0) for _ in range(2000)]
    wide = [abs(c.mean) > 2 * c.error for s in still for c in [change(s[0].kl_S, s[2].kl_S, s[2].rows_S)]]
    # 0.0455 by the normal law. Of unequal sequences D takes up some of the noise that its error is told by, which puts the error
    # too low by sum n**4 / (sum n**2)**2, 3 %; and 64 are Student's: 0.054. 4.5 deviations of the count are 0.023.
    assert 0.022 < np.mean(wide) < 0.077
    # Both by chance, one-sided: 0.027**2 of 2000 are 1.5, fewer since each interval must agree. More than 8: once in 40,000.
    assert sum(hacked(s) is not None for s in still) <= 8
    # Five standard errors of both figures, 3.5 of each interval: 2 P(z < -3) + 4 P(z < -3.5) = 0.0036 stay silent, 0.7 of 200.
    assert sum(hacked(_triple(rng, -0.5, 0.5)) is not None for _ in range(200)) >= 193
    for kl, ce in ((-0.5, -0.5), (0.5, 0.5), (0.5, -0.5)):  # learning, overfitting, and the other way round
        assert not any(hacked(_triple(rng, kl, ce)) for _ in range(200))
    bad = _triple(rng, -2.0, 2.0)
    assert hacked(bad) is not None
    assert hacked(bad[1:]) is None
    assert hacked([bad[1], bad[0], bad[2]]) is None  # not each time
    assert hacked([*_triple(rng, 2.0, 0.0), *bad]) is not None  # only the last count


def test_evaluating_changes_nothing_and_measures_what_evaluate_does(
    settings: Settings, cache: Path, held_out: Path, save_config: Maker, tmp_path: Path
) -> None:
    """A student with dropout, whose random numbers an evaluation must not use up."""
    student = save_config(tmp_path / "dropout", attention_dropout=0.2)
    common = dict(cache=cache, student=str(student), steps=5, grad_accumulation=2)
    plain = settings(**common, out=tmp_path / "plain")
    watched = settings(**common, out=tmp_path / "watched", eval_cache=str(held_out), eval_every=2, eval_rows=300)
    told: list[dict[str, Any]] = []
    train_student(plain)
    train_student(watched, on_progress=lambda done, total, metrics: told.append(metrics))
    a, b = (load_file(config.out / "model.safetensors") for config in (plain, watched))
    assert all(np.array_equal(a[key], b[key]) for key in a)
    lines = _metrics(watched.out)
    assert [m["step"] for m in lines if "heldout_kl" in m] == [2, 4, 5]
    assert [m["loss"] for m in lines] == [m["loss"] for m in _metrics(plain.out)]
    found = evaluate(watched.out, cache=stillroom.open_cache(held_out), rows=300)
    for key in KEYS:
        assert lines[-1][f"heldout_{key}"] == pytest.approx(getattr(found, key), rel=1e-5), key
    assert told[-1].items() >= lines[-1].items()
    assert [m.get("heldout_kl") for m in told][:2] == [None, None]


def test_with_a_live_teacher_and_text(
    settings: Settings, cache: Path, held_out: Path, teacher: Path, tokens_SL1: npt.NDArray[np.uint32], tmp_path: Path
) -> None:
    live = settings(
        cache=cache, teacher=str(teacher), eval_cache=str(held_out), out=tmp_path / "live", steps=3, log_every=10
    )
    train_student(live)
    (line,) = _metrics(live.out)
    found = evaluate(live.out, cache=stillroom.open_cache(held_out), teacher=teacher)
    for key in KEYS:
        assert line[f"heldout_{key}"] == pytest.approx(getattr(found, key), rel=1e-5), key
    text = settings(cache=cache, loss="ce", out=tmp_path / "text", steps=3, eval_data="named")
    train_student(text, eval_tokens_SL1=tokens_SL1[:9])
    heldout = {key: value for key, value in _metrics(text.out)[-1].items() if key.startswith("heldout")}
    assert heldout == {
        "heldout_lm_loss": pytest.approx(evaluate(text.out, tokens_SL1=tokens_SL1[:9]).lm_loss, rel=1e-5)
    }


def test_a_student_that_unlearns_the_text_is_told_of_once(
    settings: Settings, cache: Path, held_out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """First the text, then a teacher that knows nothing of it: nearer to the teacher, farther from the text."""
    learnt = settings(cache=cache, loss="ce", steps=60, log_every=60, out=tmp_path / "text", eval_cache=str(held_out))
    with caplog.at_level(logging.WARNING, logger="stillroom.train.run"):
        train_student(learnt)
        assert "teacher hacking" not in caplog.text
        train_student(
            settings(
                cache=cache, student=str(learnt.out), eval_cache=str(held_out), eval_every=5, steps=40, out=tmp_path / "kd"
            )
        )  # fmt: skip
    said = [record.getMessage() for record in caplog.records if "teacher hacking" in record.getMessage()]
    assert len(said) == 1
    assert "held-out KL to the teacher fell by" in said[0]
    lines = [m for m in _metrics(tmp_path / "kd") if "heldout_kl" in m]
    assert lines[-1]["heldout_kl"] < lines[0]["heldout_kl"]
    assert lines[-1]["heldout_lm_loss"] > lines[0]["heldout_lm_loss"]


def test_what_can_not_be_held_out(
    settings: Settings,
    cache: Path,
    held_out: Path,
    tokens_SL1: npt.NDArray[np.uint32],
    make_cache: Maker,
    tmp_path: Path,
) -> None:
    def refused(match: str, *, tokens: npt.NDArray[np.uint32] | None = None, **changes: Any) -> None:
        with pytest.raises(InputError, match=match):
            train_student(settings(cache=cache, **changes), eval_tokens_SL1=tokens)
        assert not (tmp_path / "out").exists()

    refused("holds the text the run trains on", eval_cache=str(cache))
    refused("holds the text the run trains on", eval_cache=str(make_cache(draws=5)))
    refused("eval_cache and as eval_data", eval_cache=str(held_out), eval_data="text.txt")
    refused("which the command `stillroom train` packs", eval_data="text.txt")
    refused("held-out token ids run from 1 to 97, wanted 0 to 96", eval_data="text.txt", tokens=tokens_SL1 + 1)
    with pytest.raises(NotACacheError, match=r"nowhere holds no manifest\.json"):
        train_student(settings(cache=cache, eval_cache=str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_processes_evaluate_their_shares(
    settings: Settings, cache: Path, held_out: Path, student: Path, tmp_path: Path
) -> None:
    """Seven sequences in batches of two over three processes: in the second turn two have nothing to count. A checkpoint after
    each evaluation, weights as without one, figures as of one process.
    """
    common: dict[str, Any] = dict(steps=4, lr=2e-3, batch_size=6, log_every=1, dtype="float32")
    watched: dict[str, Any] = dict(eval_cache=str(held_out), eval_every=2, eval_rows=7 * 16)
    one = settings(cache=cache, **{**common, **watched})
    train_student(one)
    figures = [[m.get(f"heldout_{key}") for key in KEYS] for m in _metrics(one.out)]
    for parallel in ("ddp", "fsdp"):
        for name, more in (("plain", {}), ("watched", watched)):
            out = tmp_path / f"{parallel}-{name}"
            given = dict(cache=cache, student=student, out=out, save_every=2, parallel=parallel, **common, **more)
            assert [status for status, _, _ in fleet.run(3, given)] == [0, 0, 0]
        lines = _metrics(tmp_path / f"{parallel}-watched")
        for found, wanted in zip(lines, figures, strict=True):
            assert [found.get(f"heldout_{key}") for key in KEYS] == pytest.approx(wanted, abs=1e-4)
        for kept in ("checkpoint-2/model.safetensors", "model.safetensors"):
            a, b = (load_file(tmp_path / f"{parallel}-{name}" / kept) for name in ("plain", "watched"))
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[key], b[key]) for key in a), (parallel, kept)
