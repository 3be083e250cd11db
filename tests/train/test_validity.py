"""Which loss may use which cache: every cell of the table, and through the door."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from stillroom.storage.errors import InputError
from stillroom.storage.spec import SamplerSpec
from stillroom.train.config import LossName, TrainConfig
from stillroom.train.run import train_student
from stillroom.train.validity import TABLE, Kind, kind_of, settle, verdict

Settings = Callable[..., TrainConfig]
Maker = Callable[..., Path]


def test_the_table_has_every_cell() -> None:
    assert set(TABLE) == set(get_args(LossName)) - {"ce"}
    for loss, kinds in TABLE.items():
        assert set(kinds) == set(get_args(Kind)), loss
    assert kind_of(SamplerSpec("top_p", 50, top_p=0.9)) == "top"
    assert kind_of(SamplerSpec("threshold", keep_logp="head")) == "threshold, head only"
    assert kind_of(SamplerSpec("random", keep_logp="head")) == "counts"
    assert kind_of(SamplerSpec("stratified")) == "counts with log p"


def test_what_the_conventions_and_the_temperature_change() -> None:
    assert verdict("forward_kl", "top", missing="tail_bucket") == "bounded bias"
    assert verdict("forward_kl", "top", missing="renormalise_teacher") == "badly biased"
    assert verdict("forward_kl", "top", missing="tail_bucket", tempered=True) == "badly biased"
    assert verdict("forward_kl", "counts", tempered=True) == "undefined"
    assert verdict("jsd", "threshold", tempered=True) == "small bias"
    assert verdict("jsd", None, tempered=True) == "exact"
    assert settle("forward_kl", "threshold", missing=None, tempered=False, allow_biased=False) == ("truncate", ())
    missing, notes = settle("reverse_kl", "threshold", missing=None, tempered=False, allow_biased=False)
    assert missing == "truncate"
    assert "skew_reverse_kl is the safe stand-in" in notes[0]


@pytest.mark.parametrize(
    ("sampler", "changes", "words"),
    [
        (dict(kind="systematic", keep_logp="none"), dict(loss="jsd"), "make it with --keep-logp all"),
        (dict(keep_logp="head"), dict(loss="taid"), "threshold, head only"),
        (dict(keep_logp="head"), dict(temperature=2.0), "at a temperature other than 1 needs the teacher's log-probability"),
        (dict(kind="systematic"), dict(loss="tail_aware"), "make the cache with --sampler threshold"),
        (dict(), dict(loss="dkd", temperature=2.0), "has no temperature"),
        (dict(kind="top_k"), dict(), "name it with --missing"),
        (dict(kind="top_k"), dict(missing="truncate"), "--allow-biased trains all the same"),
        (dict(kind="top_k"), dict(loss="atkd", missing="renormalise_both"), "whole vocabulary"),
    ],
)  # fmt: skip
def test_targets_that_cannot_carry_a_loss(
    settings: Settings, make_cache: Maker, sampler: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    config = settings(cache=make_cache(**sampler), **changes)
    with pytest.raises(InputError, match=words) as raised:
        train_student(config)
    assert "\n" not in str(raised.value)
    assert not config.out.exists()


@pytest.mark.parametrize("loss", [loss for loss in get_args(LossName) if loss != "ce"])
def test_every_loss_trains_from_a_threshold_cache(settings: Settings, cache: Path, loss: str) -> None:
    result = train_student(settings(cache=cache, loss=loss, alpha=0.1, steps=3))
    assert np.isfinite(result.loss)


def test_biased_by_wish(settings: Settings, make_cache: Maker) -> None:
    result = train_student(
        settings(cache=make_cache(kind="top_k"), missing="truncate", allow_biased=True, steps=2, row_weight="entropy")
    )
    assert any("badly biased" in note for note in result.notes)


def test_what_is_not_to_be_had_yet(settings: Settings) -> None:
    with pytest.raises(ValueError, match="is not to be had yet: a student with another tokenizer"):
        settings(loss="uld")


def test_hard_rows_and_schedules_through_the_door(settings: Settings, cache: Path) -> None:
    result = train_student(
        settings(
            cache=cache, steps=4, hard_weight=2.0, hard_share=0.3, alpha=0.0, alpha_end=0.5, alpha_schedule="cosine",
            temperature=2.0, temperature_end=1.0, row_weight="surprise", row_weight_power=0.5,
        )
    )  # fmt: skip
    assert np.isfinite(result.loss)
    assert any("O(1/N)" in note for note in result.notes)
