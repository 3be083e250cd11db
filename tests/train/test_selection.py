"""Selections in a run: what is read, the same for any number of processes, resumed exactly, and part of what the run is."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import stillroom
from stillroom.cli import main
from stillroom.storage.cache import open_cache
from stillroom.storage.choose import Wanted, choose
from stillroom.storage.errors import InputError
from stillroom.storage.losses import load_losses
from stillroom.storage.rows import row_statistics
from stillroom.train.config import TrainConfig
from stillroom.train.data import OrderSampler, order_of
from stillroom.train.measure import measure_losses
from stillroom.train.plan import make_plan
from stillroom.train.run import train_student
from stillroom.train.stream import Stream

DOCS = Path(__file__).parents[2] / "docs" / "selection.md"

Settings = Callable[..., TrainConfig]
Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def files(cache: Path, tmp_path_factory: pytest.TempPathFactory, save_model: Maker) -> dict[str, Any]:
    """A reference model's losses, and domains of the 40 sequences."""
    folder = tmp_path_factory.mktemp("files")
    model = save_model(folder / "reference", seed=7)
    measure_losses(cache, str(model), out=folder / "losses.arrow")
    (folder / "domains.txt").write_text("\n".join("ab"[k % 4 == 0] for k in range(40)))
    return {"model": model, "losses": folder / "losses.arrow", "domains": folder / "domains.txt"}


def test_losses_are_those_of_the_model(cache: Path, files: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    opened = open_cache(cache)
    model = AutoModelForCausalLM.from_pretrained(files["model"]).eval()
    tokens = torch.from_numpy(opened.read(range(40)).tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    wanted = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(load_losses(files["losses"], opened).loss_S, wanted.numpy(), rtol=1e-5)
    part = measure_losses(cache, str(files["model"]), out=tmp_path / "part.arrow", sample=10, batch_size=3)
    assert (part.measured, part.new) == (10, 10)
    rest = measure_losses(cache, str(files["model"]), out=tmp_path / "part.arrow")
    assert (rest.measured, rest.new) == (40, 30)
    assert rest.loss == pytest.approx(float(wanted.mean()), rel=1e-5)
    np.testing.assert_allclose(load_losses(tmp_path / "part.arrow", opened).loss_S, wanted.numpy(), rtol=1e-5)


def test_rows_outside_the_loss_mask_do_not_count(make_cache: Maker, files: dict[str, Any], tmp_path: Path) -> None:
    opened = open_cache(make_cache(hole=True))
    whole = load_losses(files["losses"], open_cache(opened.path.parent / opened.path.name, columns=("tokens",)))
    measure_losses(opened.path, str(files["model"]), out=tmp_path / "l.arrow")
    holed = load_losses(tmp_path / "l.arrow", opened).loss_S
    assert holed[0] != whole.loss_S[0]
    np.testing.assert_allclose(holed[1:], whole.loss_S[1:], rtol=1e-5)


def test_models_that_can_not_be_measured(
    cache: Path, student: Path, files: dict[str, Any], save_model: Maker, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="configuration but no weights"):
        measure_losses(cache, str(student))
    small = save_model(tmp_path / "small", vocab_size=50)
    with pytest.raises(InputError, match="has a vocabulary of 50, the cache's is 97"):
        measure_losses(cache, str(small))
    other = save_model(tmp_path / "other", seed=8)
    with pytest.raises(InputError, match=r"losses of .*, another model: name another file"):
        measure_losses(cache, str(other), out=files["losses"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can not be written"):
        measure_losses(cache, str(other), out=tmp_path / "file" / "l.arrow")


def test_a_selected_run_reads_what_was_selected(settings: Settings, cache: Path, files: dict[str, Any]) -> None:
    config = settings(
        cache=cache, select_by="difference", select_from=0.5, reference_losses=files["losses"], steps=None, epochs=2.0,
        batch_size=5,
    )  # fmt: skip
    result = train_student(config)
    assert result.steps == 2 * 20 // 5
    assert result.notes[-1].startswith("20 of 40 sequences are read (50.0% of the rows with a target), 20 in an epoch")
    opened = open_cache(cache)
    gain_S = row_statistics(opened).label_logp_S + load_losses(files["losses"], opened).loss_S
    plan = make_plan(config, None)
    assert sorted(plan.order.sequences(0, 20)) == sorted(np.argsort(gain_S)[20:])
    assert json.loads((config.out / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 2.0
    assert train_student(config).already_done
    with pytest.raises(InputError, match="selection is"):
        train_student(config.model_copy(update={"select_from": 0.25}))
    record = json.loads((config.out / "run.json").read_text())["settings"]
    assert record["selection"] == plan.order.selection
    assert "select_by" not in record


def test_runs_without_a_selection_are_what_they_were(settings: Settings, cache: Path) -> None:
    plan = make_plan(settings(cache=cache), None)
    assert plan.order.selection is None
    assert plan.identity()["selection"] is None
    np.testing.assert_array_equal(plan.order.sequences(36, 44), FROZEN)
    assert not any(name in plan.identity() for name in ("select_by", "curriculum_share", "domain_smoothing"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_processes_reads_the_same(
    settings: Settings, cache: Path, files: dict[str, Any], ranks: int
) -> None:
    config = settings(
        cache=cache, domains=files["domains"], student_losses=files["losses"], curriculum="label_logp", curriculum_share=0.5,
        steps=12, window=2,
    )  # fmt: skip
    order = make_plan(config, None).order
    whole = OrderSampler(order, batch_size=8, steps=12)
    again = make_plan(config, None).order  # another process makes its own
    cuts = [list(OrderSampler(again, batch_size=8, steps=12, rank=r, ranks=ranks)) for r in range(ranks)]
    for step in range(12):
        assert sorted(i for mine in cuts for i in mine[step]) == sorted(whole.step(step).tolist())


KILLED = """
import os, signal, sys, json, torch
torch.set_num_threads(1)
from stillroom.train.config import TrainConfig
from stillroom.train.run import train_student

def progress(done, total, metrics):
    if done == 8:
        os.kill(os.getpid(), signal.SIGKILL)

train_student(TrainConfig(**json.loads(sys.argv[1])), on_progress=progress)
"""


def _stop(done: int, total: int, metrics: dict[str, Any]) -> None:
    if done == 8:
        raise KeyboardInterrupt


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stopped_and_resumed_ends_in_the_same_bytes(
    settings: Settings, cache: Path, files: dict[str, Any], tmp_path: Path, kill: bool
) -> None:
    common = dict(
        cache=cache, domains=files["domains"], student_losses=files["losses"], curriculum="entropy", steps=12, save_every=3,
        batch_size=4,
    )  # fmt: skip
    whole, cut = (settings(**common, out=tmp_path / name) for name in ("whole", "cut"))
    train_student(whole)
    if kill:
        killed = subprocess.run([sys.executable, "-c", KILLED, cut.model_dump_json()], capture_output=True, timeout=200)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    else:
        with pytest.raises(KeyboardInterrupt):
            train_student(cut, on_progress=_stop)
    steps: list[int] = []
    train_student(cut, on_progress=lambda done, total, metrics: steps.append(done))
    assert steps[0] == 7
    assert (whole.out / "model.safetensors").read_bytes() == (cut.out / "model.safetensors").read_bytes()


def test_a_stream_reads_a_selection_of_a_remote_cache(cache: Path, tmp_path: Path) -> None:
    opened = open_cache(cache)
    largest = max(opened.record(shard).size_bytes for shard in opened.shards)
    remote = open_cache(f"file://{cache}", cache_dir=tmp_path, cache_bytes=2 * largest)
    selection = choose(opened, Wanted(select_by="entropy", select_to=0.5)).selection
    stream = Stream(remote, batch_size=8, seed=0, steps=6, selection=selection)
    assert stream.order.window == 1
    order = order_of(stream.source, seed=0, window=1, selection=selection)
    for step, batch in enumerate(stream):
        tokens = opened.read(order.sequences(8 * step, 8 * step + 8).tolist()).tokens
        np.testing.assert_array_equal(batch.tokens_BL.numpy(), tokens[:, :-1])
    assert stream.state_dict()["selection"] == selection.digest


def test_the_command_line(cache: Path, files: dict[str, Any], student: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--cache", str(cache), "--student", str(student), "--out", str(tmp_path / "out"), "--steps", "2"]
    for flags, said in (
        (["--select-by", "entropi"], "column 'entropi' is unknown"),
        (["--curriculum", "difference"], "give both, or neither"),
        (["--select-from", "1.5"], "--select-from came as"),
        (["--sequence-weights", str(files["domains"])], "something else than numbers"),
    ):
        assert main(["train", *arguments, *flags]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["losses", str(cache), "--model", str(files["model"]), "--out", str(tmp_path / "l"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 40


def test_text_without_a_cache_takes_weights(settings: Settings, tokens_SL1: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.arange(40) < 10)
    config = settings(loss="ce", sequence_weights=tmp_path / "w.npy", steps=3)
    assert max(make_plan(config, tokens_SL1).order.sequences(0, 30)) == 9
    with pytest.raises(InputError, match="give --cache"):
        make_plan(settings(loss="ce", select_by="entropy"), tokens_SL1)


@pytest.mark.parametrize(("how", "total"), [(":1", 40), ("", 80)])
def test_of_several_caches_the_figures_are_one_after_the_other_or_the_firsts(
    settings: Settings, cache: Path, make_cache: Maker, how: str, total: int
) -> None:
    other = make_cache(seed=3)
    config = settings(cache=f"{cache}{how},{other}{how}", select_by="entropy", select_from=0.75)
    order = make_plan(config, None).order
    assert order.size == total // 4
    parts = [row_statistics(open_cache(path)).entropy_S for path in (cache, other)]
    value_S = np.concatenate(parts)[:total]
    assert sorted(order.sequences(0, order.size)) == sorted(np.argsort(value_S, kind="stable")[-order.size :])


def test_the_document_does_what_it_says(
    cache: Path, student: Path, files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, path in (("shelf", cache), ("student-config", student), ("reference", files["model"])):
        (tmp_path / name).symlink_to(path)
    text = DOCS.read_text()
    commands = [line.split() for line in re.findall(r"^stillroom (?!train \.\.\.).*$", text, re.MULTILINE)]
    assert [command[1] for command in commands] == ["losses", "train"]
    for command in commands:
        assert main(command[1:]) == 0
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), {"stillroom": stillroom})
    flags = set(re.findall(r"--((?:select|curriculum|domain|sequence-w|reference-l|student-l)[a-z-]*)", text))
    assert flags <= {name.replace("_", "-") for name in TrainConfig.model_fields}


FROZEN = [2, 6, 1, 25, 6, 3, 0, 12]  # before there were selections
