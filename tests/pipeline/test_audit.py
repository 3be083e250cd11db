"""`stillroom audit` through the door: a sound cache passes, another teacher is found, bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stillroom.cli import main
from stillroom.pipeline.audit import nulls
from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.run import build_cache
from stillroom.storage.cache import open_cache
from stillroom.storage.targets import SparseTargets
from stillroom.storage.writer import CacheWriter


@pytest.fixture(scope="module")
def made(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit") / "c"
    build_cache(
        CacheConfig(
            teacher=str(teacher_folder), data=str(text_file), out=out, seq_len=32, sequences_per_shard=8, batch_size=4,
            dtype="float32", draws=12, max_sequences=48,
        )
    )  # fmt: skip
    return out


def audit(*words: Any) -> int:
    return main(["audit", *map(str, words), "--rows", "512"])


def test_a_sound_cache_passes(made: Path, teacher_folder: Path, tmp_path: Path) -> None:
    assert audit(made, "--teacher", teacher_folder, "--out", tmp_path / "report") == 0
    told = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert told["findings"] == []
    assert len(told["tests"]) > 10
    assert audit(made, "--no-teacher") == 0


def test_another_teacher_is_found(
    made: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "other")
    assert audit(made, "--teacher", tmp_path / "other") == 1
    assert "not sound" in capsys.readouterr().out


def test_what_can_not_be_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(tmp_path / "nowhere", "--no-teacher") == 2
    assert "Traceback" not in capsys.readouterr().err


Edit = Callable[[SparseTargets], SparseTargets]


def planted(made: Path, out: Path, edit: Edit) -> Path:
    """The cache again, each sequence's targets edited."""
    cache = open_cache(made)
    with CacheWriter(out, cache.manifest) as writer:
        for shard in cache.shards:
            items = [cache[index] for index in range(*cache.manifest.shard_range(shard))]
            parts = [edit(item.targets) for item in items]
            rounding = np.random.default_rng(shard).random((sum(part.rows for part in parts), 3))
            writer.submit(shard, np.stack([item.tokens for item in items]), SparseTargets.concat(parts), rounding, None)
        writer.close()
    return out


def taken(targets: SparseTargets, place_N: npt.NDArray[np.int64]) -> SparseTargets:
    many_N = np.diff(targets.offsets)[place_N]
    place_E = np.concatenate([np.arange(targets.offsets[place], targets.offsets[place + 1]) for place in place_N])
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(many_N)]).astype(np.int64),
        ids=targets.ids[place_E],
        weights=targets.weights[place_E],
        label_logp=targets.label_logp[place_N],
        entropy=targets.entropy[place_N],
        logp=None if targets.logp is None else targets.logp[place_E],
    )


def next_rows(targets: SparseTargets) -> SparseTargets:
    return taken(targets, np.minimum(np.arange(targets.rows) + 1, targets.rows - 1))


def next_labels(targets: SparseTargets) -> SparseTargets:
    return replace(targets, label_logp=np.roll(targets.label_logp, -1))


def first_row_elsewhere(targets: SparseTargets) -> SparseTargets:
    return taken(targets, np.array([targets.rows // 2, *range(1, targets.rows)]))


@pytest.mark.parametrize(
    ("edit", "first"),
    [(next_rows, "alignment.targets[+1]"), (next_labels, "alignment.label_row[+1]"), (first_row_elsewhere, None)],
)
def test_planted_faults_are_found(
    edit: Edit, first: str | None, made: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = planted(made, tmp_path / "c", edit)
    assert audit(cache, "--teacher", teacher_folder, "--measures", "no", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    names = [test["name"] for test in told["tests"] if test["found"]]
    assert told["findings"] == names
    assert first is None or names[0] == first
    assert "drift.label" in names
    assert all(test["p"] <= test["threshold"] for test in told["tests"] if test["found"])


def test_without_a_teacher_a_shift_of_labels_is_found(made: Path, tmp_path: Path) -> None:
    assert audit(planted(made, tmp_path / "c", next_labels), "--no-teacher") == 1


def test_damage_is_said_and_the_rest_audited(
    made: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Path(shutil.copytree(made, tmp_path / "c"))
    record = json.loads((cache / "commits/000001.json").read_text())
    path = cache / record["path"] / "n/c/0/0"
    path.write_bytes(path.read_bytes()[:-1])
    assert audit(cache, "--teacher", teacher_folder, "--measures", "no", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["findings"] == ["record.damaged"]
    assert told["rows"] == 512


def test_a_killed_audit_goes_on_and_other_folders_are_left_alone(
    made: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    words = (made, "--teacher", teacher_folder, "--measures", "no", "--out", out)
    assert audit(*words) == 0
    first = json.loads((out / "audit.json").read_text())
    kept = sorted((out / "rows").iterdir())
    kept[0].unlink()  # as if killed before it
    before = kept[1].stat().st_mtime_ns
    assert audit(*words) == 0
    again = json.loads((out / "audit.json").read_text())
    assert again["tests"] == first["tests"]
    assert kept[1].stat().st_mtime_ns == before
    capsys.readouterr()
    assert audit(*words, "--seed", "1") == 2
    assert "another audit" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert audit(made, "--teacher", teacher_folder, "--out", tmp_path / "full") == 2
    assert "new or empty folder" in capsys.readouterr().err


def test_a_teacher_of_another_vocabulary_or_none_is_one_sentence(
    made: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(teacher_folder)
    settings.vocab_size = 200
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "narrow")
    assert audit(made, "--teacher", tmp_path / "narrow") == 2
    assert "200 ids, the cache was made with 300" in capsys.readouterr().err
    assert audit(made, "--teacher", tmp_path / "nowhere") == 2
    assert "--no-teacher" in capsys.readouterr().err
    assert main(["audit", str(made), "--no-teacher", "--rows", "100000"]) == 0
    assert "the cache holds" in capsys.readouterr().err


def test_nulls() -> None:
    rng = np.random.default_rng(0)
    # the chance that the k largest of n + c exchangeable numbers are all of the first n
    n, c, k, trials = 6, 4, 2, 20_000
    largest = np.argsort(-rng.random((trials, n + c)), axis=1)[:, :k]
    share = float((largest < n).all(1).mean())
    exact = nulls.most_deviant(k, n, c)
    assert abs(share - exact) < 4 * (exact * (1 - exact) / trials) ** 0.5
    assert nulls.binomial_tail(8, 10, 0.5) == pytest.approx(56 / 1024)
    assert nulls.binomial_tail(9000, 15_000, 0.5) >= 1e-140
    assert nulls.conditional(3, 0, 4) == pytest.approx(1 / 125)
    assert nulls.bernstein(0.0, 1.0, 1.0) == 1.0
    assert nulls.bernstein(10.0, 1.0, 0.0) == pytest.approx(2 * np.exp(-50))
    assert nulls.e_value(np.array([2.0, 4.0])) == (pytest.approx(np.log(8)), pytest.approx(1 / 8))
    assert nulls.holm([0.02, 0.001, 0.5], 0.05) == pytest.approx([0.05 / 2, 0.05 / 3, 0.05])
