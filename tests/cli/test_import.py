"""`stillroom import --from ...` as it is typed: a teacher's top-k in another tool's file, to a cache a student learns from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stillroom.cli import main
from stillroom.storage.cache import open_cache

K = 40


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def rows(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Top-k log-probabilities of the prompt as a serving engine gives them: list t is of token t, the first is null."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    torch.manual_seed(0)
    made: dict[str, list[Any]] = {"input_ids": [], "ids": [], "logprobs": []}
    with torch.no_grad():
        for length in (9, 17, 12, 14):
            tokens = torch.randint(1, 300, (1, 1))
            for _ in range(length - 1):
                logits = model(tokens).logits[:, -1]
                tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
            logp, ids = model(tokens).logits[0, :-1].log_softmax(-1).topk(K)
            made["input_ids"].append(tokens[0].tolist())
            made["ids"].append([None, *ids.tolist()])
            made["logprobs"].append([None, *logp.tolist()])
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(pa.table(made), path)
    return path


def test_import_and_train(
    rows: Path, teacher_folder: Path, student_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("--tokens-column", "input_ids", "--ids-column", "ids", "--logprobs-column", "logprobs")
    from_topk = ("--from", "topk", *columns, "--tokenizer", teacher_folder, "--teacher", "a llama")
    cache = tmp_path / "cache"
    assert run("import", rows, *from_topk, "--out", cache) == 2
    assert "--alignment is missing" in capsys.readouterr().err
    assert not cache.exists()
    assert run("import", rows, *from_topk, "--alignment", "this-token", "--out", cache, "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["sequences"] == 4
    assert found["draws"] == K
    assert f"a mean mass of {found['kept_mass']:.4f}" in shown.err
    assert "--missing truncate, renormalise_teacher" in shown.err
    opened = open_cache(cache)
    assert opened.manifest.teacher.name == "a llama"
    assert opened.manifest.teacher.fingerprint.startswith("imported:")
    assert (cache / "tokenizer/tokenizer.json").is_file()
    kept = np.bincount(np.repeat(np.arange(16), np.diff(opened[1].targets.offsets)), opened[1].targets.weights)
    table = pq.read_table(rows).to_pylist()[1]
    np.testing.assert_allclose(kept, [np.exp(x).sum() for x in table["logprobs"][1:]], rtol=1e-4)
    assert run("verify", cache, "--hashes") == 0
    assert run("inspect", cache) == 0
    assert "a llama (imported:" in capsys.readouterr().out
    student = (
        "--cache",
        cache,
        "--student",
        student_config,
        "--steps",
        2,
        "--batch-size",
        2,
        "--out",
        tmp_path / "student",
    )
    assert run("train", *student) == 2
    assert "name it with --missing" in capsys.readouterr().err
    assert run("train", *student, "--missing", "tail_bucket", "--row-weight", "entropy") == 2
    assert "have no entropy" in capsys.readouterr().err
    assert run("train", *student, "--missing", "tail_bucket", "--loss", "dkd") == 2
    assert "have no label_logp" in capsys.readouterr().err
    for option in ("--curriculum", "--select-by"):
        assert run("train", *student, "--missing", "tail_bucket", option, "entropy") == 2
        assert "no sequence of the cache has any entropy" in capsys.readouterr().err
    assert run("train", *student, "--missing", "tail_bucket") == 0
    assert run("import", rows, *from_topk, "--alignment", "this-token", "--out", cache) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_settings_that_do_not_go_together(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (("--teacher", "x"), "--teacher is for --from topk or --from distillkit or --from axolotl"),
        (("--from", "distillkit", "--teacher", "x", "--tokenizer", "y"), "compression_config.yaml can not be read"),
        (
            ("--from", "distillkit", "--teacher", "x", "--tokenizer", "y", "--alignment", "next-token"),
            "--alignment is for --from topk or --from",
        ),
        (("--from", "axolotl", "--teacher", "x"), "--tokenizer is missing"),
        (("--from", "verl"), "--from came as 'verl'"),
    ):
        assert run("import", rows, *arguments, "--out", tmp_path / "cache") == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.count("\n") == 1
    assert not (tmp_path / "cache").exists()
