"""`stillroom compare`, `ls` and `cp`: run, resume and refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.cli import main
from stillroom.comparing.config import CompareConfig
from stillroom.comparing.findings import findings
from stillroom.comparing.result import ArmResult, Comparison
from stillroom.recipes import recipes
from stillroom.settings import validate
from stillroom.storage.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def settings(teacher: Path, student: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Two arms and a live one, one seed, as small as they get."""
    return {
        "data": str(text), "held_out_share": 0.2, "held_out_sequences": 4, "seq_len": 16, "max_sequences": 8, "seeds": [0],
        "teacher": str(teacher), "student": str(student), "out": str(out), "train": {"batch_size": 4, "log_every": 1},
        "arms": [
            {"name": "CE", "train": {"loss": "ce"}},
            {"name": "random N=20", "cache": {"sampler": "random", "draws": 20, "keep_logp": "none"}},
            {"name": "threshold, equal", "cache": {"sampler": "threshold", "entries_like": "random N=20"}},
            {"name": "full KD", "train": {"teacher": "live"}},
        ],
        **changes,
    }  # fmt: skip


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], file: Path, values: dict[str, Any], *words: str) -> None:
    file.write_text(yaml.safe_dump(values))
    assert main(["compare", "--config", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = [line for line in captured.err.splitlines() if line.startswith("stillroom: ")]
    assert "Traceback" not in captured.err
    for word in words:
        assert word in line, line


def test_run_resume_and_a_further_arm(
    teacher_folder: Path, student_config: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "c.yaml"
    values = settings(teacher_folder, student_config, text_file, out)
    file.write_text(yaml.safe_dump({**values, "arms": values["arms"][:2]}))
    assert main(["compare", "--config", str(file), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [*first["arms"]] == ["CE", "random N=20"]
    assert first["gap"] is None
    before = files(out / "students") | files(out / "caches") | files(out / "text")

    # More arms on the same folder: what is there is kept, but for one student that was cut short.
    shutil.rmtree(out / "students" / "CE-0")
    file.write_text(yaml.safe_dump(values))
    assert main(["compare", "--config", str(file)]) == 0
    shown = capsys.readouterr()
    assert "threshold, equal" in shown.out
    after = files(out)
    assert {path for path, what in before.items() if after.get(path) != what} == {
        path for path in before if "CE-0" in path.parts
    }
    result = Comparison.from_json(json.loads((out / "comparison.json").read_text()))
    again, was = (
        {key: value for key, value in run.items() if key != "tokens_per_s" and "gap" not in key}
        for run in (result.arms["CE"].runs[0], first["arms"]["CE"]["runs"][0])
    )
    assert again == was
    random, threshold = result.arms["random N=20"], result.arms["threshold, equal"]
    assert random.entries_per_row is not None
    assert threshold.entries_per_row == pytest.approx(random.entries_per_row, rel=0.1)
    assert threshold.draws != 50, "solved, not the default"
    assert result.gap == ("CE", "full KD")
    assert result.closed("CE", "kl", 0) == 0
    assert result.closed("full KD", "kl", 0) == 1
    page = (out / "comparison.md").read_text()
    assert "At equal entries per row" in page
    for name in ("loss", "acceptance", "gap", "bytes"):
        assert f"({name}.svg)" in page
        assert (out / f"{name}.svg").read_text().startswith("<svg")

    # Other settings on the same folder are refused, naming the arm and what differs.
    refused(capsys, file, {**values, "train": {"batch_size": 2}}, "arm CE, seed 0", "batch_size is 2, was 4")
    assert files(out / "students") == {path: what for path, what in after.items() if out / "students" in path.parents}


def test_what_can_not_work_is_refused_before_anything_is_made(
    teacher_folder: Path, student_config: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "c.yaml"

    def arm(**changes: Any) -> dict[str, Any]:
        good = settings(teacher_folder, student_config, text_file, out)
        return {**good, "arms": [*good["arms"][:2], {"name": "bad", **changes}]}

    counts = {"sampler": "random", "keep_logp": "none"}
    for values, words in (
        (arm(cache=counts, train={"loss": "jsd"}), ["arm bad", "jsd", "keep-logp all"]),
        (arm(cache={"sampler": "top_k", "draws": 4}), ["arm bad", "missing"]),
        (arm(cache={"sampler": "top_k"}, train={"missing": "truncate"}), ["arm bad", "badly biased"]),
        (arm(train={"loss": "atkd", "teacher": "live"}), ["arm bad", "atkd"]),
        (arm(), ["arm bad", "needs a teacher"]),
        (arm(train={"teacher": "other"}), ["arms.bad.train.teacher", "wanted live"]),
        (arm(train={"los": "jsd"}), ["los is no key of arms.bad.train", "did you mean loss"]),
        (arm(train={"loss": "jds"}), ["arms.bad.train.loss", "jds"]),
        (arm(cache={"drawz": 4}), ["drawz is no key of arms.bad.cache", "did you mean draws"]),
        (arm(cache={"draws": 0}), ["bad", "draws", "1 to"]),
        (arm(cache={"entries_like": "randon N=20"}), ["did you mean random N=20"]),
        (arm(cache={"entries_like": "CE"}), ["CE", "own draws"]),
        (arm(cash={}), ["cash is no key of arms.bad", "did you mean cache"]),
        ({**arm(train={"loss": "ce"}), "gap": ["CE", "fulll"]}, ["fulll"]),
        ({**arm(train={"loss": "ce"}), "seeds": [1, 1]}, ["seeds", "each once"]),
        ({**arm(train={"loss": "ce"}), "seed": [1]}, ["seed", "did you mean seeds"]),
        ({**arm(train={"loss": "ce"}), "teacher": {"train": "x", "tokeniser": 9}}, ["tokeniser", "did you mean tokenizer"]),
    ):  # fmt: skip
        refused(capsys, file, values, *words)
    assert not out.exists()
    good = settings(teacher_folder, student_config, text_file, out)
    refused(
        capsys,
        file,
        {**good, "student": {"model_type": "llama", "hiden_size": 8}},
        "student",
        "did you mean hidden_size",
    )
    refused(capsys, file, {**good, "student": {"model_type": "llama", "vocab_size": 200}}, "200", "300")
    refused(capsys, file, {**good, "seq_len": 100}, "100", "64")
    assert not (out / "students").exists()
    assert not (out / "caches").exists()


def test_findings_follow_the_figures() -> None:
    def arm(*kl: float, **more: Any) -> ArmResult:
        return ArmResult(runs=tuple({"kl": k, "lm_loss": 5.0 - k} for k in kl), **more)

    arms = {"CE": arm(0.4, 0.5), "random": arm(0.20, 0.30), "full": arm(0.1, 0.1)}
    ground: dict[str, Any] = dict(tokens=1, held_out_rows=1, seeds=(0, 1), gap=("CE", "full"))
    better, worse, split = (
        findings(Comparison(arms={**arms, "mine": arm(*kl, entries_like="random")}, **ground))[0]
        for kl in ((0.19, 0.30), (0.21, 0.31), (0.19, 0.31))
    )
    assert "at least as close to the teacher in both seeds than random" in better
    assert "less close to the teacher in both seeds" in worse
    assert "in 1 of 2 seeds" in split
    assert "0.1900 against 0.2000" in better
    result = Comparison(arms={**arms, "mine": arm(0.25, 0.3, entries_like="random")}, **ground)
    assert result.closed("mine", "kl", 0) == pytest.approx(0.5)
    assert result.closed("mine", "kl", 1) == pytest.approx(0.5)
    assert result.cells("mine", "kl_gap") == pytest.approx([0.5, 0.5])
    close = Comparison(arms={"CE": arm(0.4, 0.5), "full": arm(0.39, 0.5)}, **ground)
    assert close.cells("full", "kl_gap") == [], "seeds lie further apart than the two ends"
    assert any("not resolved" in sentence for sentence in findings(close))
    assert Comparison.from_json(json.loads(json.dumps(result.to_json()))).arms.keys() == result.arms.keys()


def test_recipes_are_listed_copied_and_hold_settings_that_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stillroom.comparing.run import check_arms
    from stillroom.pipeline.config import CacheConfig
    from stillroom.train.config import TrainConfig

    assert main(["ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*recipes()]
    assert {"compare", "compare-gpu", "cache", "train"} == {*recipes()}
    models = {"compare": CompareConfig, "cache": CacheConfig, "train": TrainConfig}
    for name, recipe in recipes().items():
        file = tmp_path / f"{name}.yaml"
        assert main(["cp", name, str(file)]) == 0
        assert file.read_text() == recipe.text
        config = validate(models[name.split("-")[0]], yaml.safe_load(recipe.text))
        if isinstance(config, CompareConfig):
            check_arms(config)
    example = (ROOT / "docs" / "compare.md").read_text().split("```yaml\n")[1].split("```")[0]
    check_arms(validate(CompareConfig, yaml.safe_load(example)))
    assert main(["cp", "compare", str(file)]) == 2
    assert main(["cp", "comparee", str(tmp_path / "x")]) == 2
    captured = capsys.readouterr()
    assert "is there already" in captured.err
    assert "did you mean compare" in captured.err


def test_settings_within_settings_from_the_command_line(tmp_path: Path) -> None:
    from stillroom.settings import parse

    file = tmp_path / "c.yaml"
    file.write_text(recipes()["compare"].text)
    words = ["--config", str(file), "--train.lr", "1e-3", "--cache.batch-size=2", "--seeds", "3,4", "--tokens", "512"]
    config, _ = parse(CompareConfig, words, prog="p", summary="", examples="")
    assert config.seeds == (3, 4)
    assert config.sequences == 2
    training = config.training(config.arms[0], seed=3, teacher="t", student="s", cache=None)
    assert (training.lr, training.optimizer, training.seed) == (1e-3, "muon", 3)
    assert config.caching(config.arms[4], corpus="d", teacher="t", out=tmp_path).batch_size == 2
    for bad, said in (
        (["--train.lrr", "1"], "did you mean lr"),
        (["--train.lr"], "without a value"),
        (["--data.x", "1"], "data.x"),
    ):
        with pytest.raises(InputError, match=said):
            parse(CompareConfig, ["--config", str(file), *bad], prog="p", summary="", examples="")


@pytest.mark.slow
def test_the_cpu_recipe_scaled_down(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    assert main(["cp", "compare", str(file)]) == 0
    small = ["--tokens", "100000", "--seeds", "0", "--held-out-sequences", "32", "--out", str(tmp_path / "out")]
    assert main(["compare", "--config", str(file), *small]) == 0
    result = Comparison.from_json(json.loads((tmp_path / "out" / "comparison.json").read_text()))
    run = {name: arm.runs[0] for name, arm in result.arms.items()}
    assert len(run) == 11
    assert run["top-12 renormalised"]["ece"] > run["threshold N=50"]["ece"]  # signs, not values, at this size
    assert run["top-12 renormalised"]["kl"] > run["threshold N=50"]["kl"]
    for name in ("systematic, equal entries", "threshold, equal entries"):
        assert result.arms[name].entries_per_row == pytest.approx(result.arms["random N=50"].entries_per_row, rel=0.05)
