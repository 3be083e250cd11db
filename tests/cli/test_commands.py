"""The command line: summaries, --json, settings files, and one clear sentence with status 2 for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from stillroom.cli import main
from stillroom.storage.cache import open_cache
from tests.conftest import llama_config, make_tokenizer

CACHE = ["cache", "--seq-len", "16", "--max-sequences", "6", "--sequences-per-shard", "4"]


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def cache(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "c"
    assert run(*CACHE, "--teacher", teacher_folder, "--data", text_file, "--out", out) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, words: list[str]) -> None:
    """Status 2, one line on standard error that holds `words`, nothing on standard output."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("stillroom: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    for word in words:
        assert word in lines[0], lines[0]


def test_cache_then_inspect(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", cache, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"]
    assert (found["sequences"], found["rows"]) == (6, 96)
    assert found["entries_per_row"] == pytest.approx(found["entries"] / 96)
    assert {"tokens", "n", "id_lo"} <= set(found["bytes_per_row"])
    assert 0.2 < found["kept_mass"] <= 1.0
    assert found["manifest"]["sampler"]["draws"] == 50
    assert run("inspect", cache) == 0
    shown = capsys.readouterr().out
    assert "entries per row" in shown
    assert "kept mass" in shown


def test_cache_twice_says_complete(
    cache: Path, teacher_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*CACHE, "--teacher", teacher_folder, "--data", text_file, "--out", cache, "--json") == 0
    captured = capsys.readouterr()
    assert "nothing to do" in captured.err
    assert json.loads(captured.out)["shards_before"] == 2


def test_settings_file_and_override(
    teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"teacher: {teacher_folder}\ndata: {text_file}\nseq_len: 16\ndraws: 9\nmax_sequences: 2\n")
    assert run("cache", "--config", file, "--out", tmp_path / "c", "--draws", "7") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "c", "--json") == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["sampler"]["draws"] == 7
    file.write_text("drawz: 9\n")
    refused(capsys, "cache", "--config", file, words=["drawz", "did you mean draws"])
    file.write_text("- 9\n")
    refused(capsys, "cache", "--config", file, words=["list", "key: value"])
    refused(capsys, "cache", "--config", tmp_path / "none.yaml", words=["can not be read"])


def test_whole_way_through_the_commands(
    cache: Path, student_config: Path, teacher_folder: Path, text_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    student = tmp_path / "student"
    training = ["train", "--cache", cache, "--student", student_config, "--out", student, "--batch-size", "2"]
    training += ["--eval-data", text_file, "--eval-rows", "40"]
    assert run(*training, "--json") == 0
    assert json.loads((student / "metrics.jsonl").read_text().splitlines()[-1])["heldout_lm_loss"] > 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert run(*training) == 0
    assert "nothing to do" in capsys.readouterr().err
    for source in (["--data", text_file, "--seq-len", "16"], ["--cache", cache]):
        assert run("evaluate", "--student", student, "--teacher", teacher_folder, *source, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["lm_loss"] > 0
        assert found["kl"] > 0
        assert 0 <= found["ece"] <= 1
        assert 0 < found["acceptance"] < 1
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        f"m = AutoModelForCausalLM.from_pretrained({str(student)!r}); t = AutoTokenizer.from_pretrained({str(student)!r}); "
        "assert 'stillroom' not in sys.modules; x = t('the room', return_tensors='pt', return_token_type_ids=False); "
        "print(m(**x).logits.shape[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "300", done.stderr


def test_a_padded_teacher_beside_its_cache(text_file: Path, student_config: Path, tmp_path: Path) -> None:
    """A cache of 300 of the 320 columns its teacher has: the same teacher, live, is the right one, and 300 are compared."""
    teacher = make_tokenizer(tmp_path / "teacher")
    torch.manual_seed(0)
    wide = LlamaForCausalLM(llama_config(320)).eval()
    wide.save_pretrained(teacher)
    making = [
        "--data",
        text_file,
        "--seq-len",
        "16",
        "--max-sequences",
        "8",
        "--vocab-size",
        "300",
        "--out",
        tmp_path / "c",
    ]
    assert run("cache", "--teacher", teacher, *making) == 0
    training = ["train", "--cache", tmp_path / "c", "--student", student_config, "--steps", "1", "--batch-size", "8"]
    assert run(*training, "--teacher", teacher, "--dtype", "float32", "--out", tmp_path / "live") == 0
    found = json.loads((tmp_path / "live" / "metrics.jsonl").read_text())["kd"]

    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student_config)).eval()
    tokens_BL = torch.from_numpy(open_cache(tmp_path / "c").read(range(8)).tokens[:, :-1].astype(np.int64))
    with torch.no_grad():
        logp, logq = (m(input_ids=tokens_BL).logits[..., :300].double().log_softmax(-1) for m in (wide, untrained))
    assert found == pytest.approx(float((logp.exp() * (logp - logq)).sum(-1).mean()), rel=1e-4)


def test_unknown_words(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "cashe", words=["cashe", "did you mean cache"])
    refused(capsys, "cache", "--drawz", "3", words=["--drawz", "did you mean --draws"])
    refused(capsys, "cache", "--teacher", "t", "--data", "d", words=["--out is missing"])
    refused(
        capsys, "cache", "--teacher", "t", "--data", "d", "--out", "o", "--draws", "many", words=["'many'", "integer"]
    )
    refused(
        capsys, "cache", "--teacher", "t", "--data", "d", "--out", "o", "--sampler", "topk", words=["'topk'", "top_k"]
    )


def test_bad_sources_and_teachers(
    teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

    out = tmp_path / "c"
    teacher = ["--teacher", teacher_folder]
    to = [*CACHE, "--out", out]
    refused(capsys, *to, *teacher, "--data", tmp_path / "none.txt", words=["does not exist"])
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(capsys, *to, *teacher, "--data", empty, words=["holds no text"])
    short = tmp_path / "short.txt"
    short.write_text("too short")
    refused(capsys, *to, *teacher, "--data", short, words=["wanted at least 17"])
    refused(capsys, *to, "--teacher", tmp_path / "no-model", "--data", text_file, words=["no-model"])
    refused(capsys, *to, *teacher, "--data", text_file, "--draws", "0", words=["draws", "1 to"])
    refused(capsys, *to, *teacher, "--data", text_file, "--seq-len", "100", words=["at most 64"])

    bert = tmp_path / "bert"
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=300, **small)).save_pretrained(bert)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(bert)
    refused(capsys, *to, "--teacher", bert, "--data", text_file, words=["no causal-LM head"])

    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(teacher_folder).save_pretrained(wide)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(50)])
    tokenizer.save_pretrained(wide)
    refused(capsys, *to, "--teacher", wide, "--data", text_file, words=["350 ids", "vocabulary 300"])
    assert not out.exists(), "a refused run leaves nothing behind"


def test_other_plan_is_refused(
    cache: Path, teacher_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    refused(
        capsys, *CACHE, "--teacher", teacher_folder, "--data", text_file, "--out", cache, "--draws", "9",
        words=["sampler", "9", "50"],
    )  # fmt: skip
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


def test_bad_caches(cache: Path, student_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    (tmp_path / "nothing").mkdir()
    refused(capsys, "inspect", tmp_path / "nothing", words=["manifest.json"])
    newer, damaged = tmp_path / "newer", tmp_path / "damaged"
    shutil.copytree(cache, newer)
    manifest = json.loads((newer / "manifest.json").read_text())
    manifest["format_version"] = 99
    (newer / "manifest.json").write_text(json.dumps(manifest))
    refused(capsys, "inspect", newer, words=["99", "upgrade"])
    shutil.copytree(cache, damaged)
    (damaged / "manifest.json").write_text((cache / "manifest.json").read_text()[:100])
    refused(capsys, "inspect", damaged, words=["manifest.json"])
    for path in (newer, damaged):
        refused(
            capsys, "train", "--cache", path, "--student", student_config, "--out", tmp_path / "s", words=["manifest"]
        )
    assert not (tmp_path / "s").exists()


def test_student_with_too_small_a_vocabulary(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0,
    ).save_pretrained(tmp_path / "small")  # fmt: skip
    refused(
        capsys,
        "train",
        "--cache",
        cache,
        "--student",
        tmp_path / "small",
        "--out",
        tmp_path / "s",
        words=["200", "300"],
    )
    assert not (tmp_path / "s").exists()


def test_status_of_a_real_process() -> None:
    done = subprocess.run([sys.executable, "-m", "stillroom", "inspect", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("stillroom: ")
    assert "Traceback" not in done.stderr
