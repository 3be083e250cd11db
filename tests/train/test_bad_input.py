"""Every bad input is one InputError that says what to do, and leaves nothing in the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from stillroom.storage.errors import CacheError, InputError
from stillroom.train.config import TrainConfig
from stillroom.train.run import train_student

Settings = Callable[..., TrainConfig]
Maker = Callable[..., Path]


@pytest.fixture
def refused(settings: Settings) -> Callable[..., None]:
    """Run a configuration, which must be refused in words that match, before anything is written."""

    def check(match: str, *, tokens_SL1: npt.NDArray[Any] | None = None, **changes: Any) -> None:
        config = settings(**changes)
        with pytest.raises(InputError, match=match) as raised:
            train_student(config, tokens_SL1=tokens_SL1)
        assert "\n" not in str(raised.value)
        assert not config.out.exists()

    return check


Refused = Callable[..., None]


def test_settings_that_contradict_each_other(
    refused: Refused, cache: Path, teacher: Path, tokens_SL1: npt.NDArray[np.uint32]
) -> None:
    refused("alpha came as 1.5, wanted 0 to 1", cache=cache, alpha=1.5)
    refused("alpha came as -0.1", cache=cache, alpha=-0.1)
    refused("drop --alpha", cache=cache, alpha=0.5, loss="ce")
    refused("forward_kl needs a teacher: give --cache", tokens_SL1=tokens_SL1)
    refused("loss ce came without text", loss="ce")
    refused("both a cache and tokens", cache=cache, tokens_SL1=tokens_SL1)
    refused("teacher came with loss ce", cache=cache, loss="ce", teacher=str(teacher))
    refused("targets of this cache sum to one: drop --missing", cache=cache, missing="tail_bucket")
    refused("alpha_end came as 2.0, wanted 0 to 1", cache=cache, alpha_end=2.0)
    refused("beta is for --loss jsd, and the loss is forward_kl: drop --beta", cache=cache, beta=0.4)
    refused("row_weight column and row_weight_file go together", cache=cache, row_weight="column")
    refused("read from a cache", tokens_SL1=tokens_SL1, teacher=str(teacher), row_weight="entropy")
    refused("atkd splits rows at a quantile", tokens_SL1=tokens_SL1, teacher=str(teacher), loss="atkd")
    refused("id_map brings a cache", cache=cache, teacher=str(teacher), id_map="map.npy")
    refused("loss ce reads no cached targets: drop --missing", cache=cache, loss="ce", missing="truncate")
    refused("fewer than the 16 parts", cache=cache, grad_accumulation=16)
    refused("do not fill one batch of 64", cache=cache, batch_size=64, steps=None)


def test_students_that_do_not_fit(refused: Refused, cache: Path, save_config: Maker, tmp_path: Path) -> None:
    refused("does not exist", cache=cache, student=str(tmp_path / "nowhere"))
    refused("does not exist", cache=cache, student="nowhere.json")
    (tmp_path / "empty").mkdir()
    refused("folder without config.json", cache=cache, student=str(tmp_path / "empty"))
    (tmp_path / "broken.json").write_text("{")
    refused("no configuration that transformers can read", cache=cache, student=str(tmp_path / "broken.json"))
    (tmp_path / "foreign.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    refused("no configuration that transformers can read", cache=cache, student=str(tmp_path / "foreign.json"))
    from transformers import T5Config

    T5Config(vocab_size=97).save_pretrained(tmp_path / "t5")
    refused("is a t5 model, wanted a causal language model", cache=cache, student=str(tmp_path / "t5"))
    small = save_config(tmp_path / "small", vocab_size=96)
    refused("has a vocabulary of 96, the teacher's is 97", cache=cache, student=str(small))
    short = save_config(tmp_path / "short", max_position_embeddings=15)
    refused("sequences have 16 positions but student .* ends at 15", cache=cache, student=str(short))


def test_damaged_weights_are_refused(refused: Refused, cache: Path, save_model: Maker, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "student")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    refused("weights that cannot be loaded", cache=cache, student=str(folder))


def test_teachers_that_do_not_fit(
    refused: Refused, cache: Path, student: Path, save_model: Maker, tokens_SL1: npt.NDArray[np.uint32], tmp_path: Path
) -> None:
    other, narrow = save_model(tmp_path / "other", vocab_size=112), save_model(tmp_path / "narrow", vocab_size=96)
    refused("teacher .* has a vocabulary of 96, the cache's is 97", cache=cache, teacher=str(narrow))
    refused(
        "student .* has a vocabulary of 97, the teacher's is 112",
        tokens_SL1=tokens_SL1,
        teacher=str(other),
    )
    refused("configuration but no weights", cache=cache, teacher=str(student))
    short = save_model(tmp_path / "short", max_position_embeddings=8)
    refused("teacher .* ends at 8", cache=cache, teacher=str(short))


def test_token_ids_beyond_the_vocabulary(refused: Refused, tokens_SL1: npt.NDArray[np.uint32]) -> None:
    refused("token ids run from 1 to 97, wanted 0 to 96", tokens_SL1=tokens_SL1 + 1, loss="ce")


def test_another_tokenizer(
    refused: Refused, make_cache: Maker, save_config: Maker, teacher_folder: Path, tmp_path: Path
) -> None:
    cache, student = make_cache(), save_config(tmp_path / "student")
    (cache / "tokenizer").mkdir()
    parsed = json.loads((teacher_folder / "tokenizer.json").read_text())
    (cache / "tokenizer" / "tokenizer.json").write_text(json.dumps(parsed))
    first, second, *_ = parsed["model"]["vocab"]
    ids = parsed["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]
    (student / "tokenizer.json").write_text(json.dumps(parsed))
    refused("numbers tokens differently", cache=cache, student=str(student))


def test_caches_that_cannot_be_read(settings: Settings, tmp_path: Path) -> None:
    config = settings(cache=tmp_path / "nowhere")
    with pytest.raises(CacheError):
        train_student(config)
    assert not config.out.exists()


@pytest.mark.parametrize("content", [None, "{", json.dumps({"settings": 3})])
def test_a_folder_that_is_no_run(settings: Settings, cache: Path, content: str | None) -> None:
    config = settings(cache=cache)
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("mine")
    if content is not None:
        (config.out / "run.json").write_text(content)
    with pytest.raises(InputError, match="no Stillroom run"):
        train_student(config)
    assert (config.out / "thesis.txt").read_text() == "mine"
    assert len(list(config.out.iterdir())) == 1 + (content is not None)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"lr": -1.0}, {"loss": "kl"}, {"steps": 0}, {"learning_rate": 1e-3}, {"warmup": 2.0}]
)
def test_values_out_of_range_and_unknown_names(settings: Settings, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        settings(**changes)


def test_a_file_is_no_run_folder(settings: Settings, cache: Path) -> None:
    config = settings(cache=cache)
    config.out.write_text("")
    with pytest.raises(InputError, match="no Stillroom run"):
        train_student(config)
