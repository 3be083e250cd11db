"""`stillroom compare`: arms times seeds of one student, from text to one table; found again, it goes on.

OUT/text, OUT/tokenizer     what was made from `data`        OUT/caches/SAMPLER      one for every sampler, shared by arms
OUT/teacher                 where it was to be trained       OUT/students/ARM-SEED   a student, and its evaluation.json
OUT/comparison.json, comparison.md, *.svg                    the result, written anew after every student

Shapes: `S` sequences, `L1` = L + 1 token ids of a sequence.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stillroom.comparing.arms import Arm, naming
from stillroom.comparing.config import CompareConfig
from stillroom.comparing.ground import Ground, lay_ground
from stillroom.comparing.result import ArmResult, Comparison
from stillroom.console import Reporter, say
from stillroom.storage.errors import InputError


def compare(config: CompareConfig, as_json: bool) -> dict[str, Any]:
    """`stillroom compare`; returns what `comparison.json` holds."""
    with Reporter() as report:
        result = run_comparison(config, report)
    if not as_json:
        result.show()
        say(f"the whole table with every seed, and figures: {config.out / 'comparison.md'}")
    return result.to_json()


def run_comparison(config: CompareConfig, report: Reporter) -> Comparison:
    """Make what is missing of a comparison and write its result.

    Args:
        config: what to compare.
        report: told (stage, done, total, note).

    Raises:
        InputError: an arm, text or model that can not be used, naming the arm; before anything is trained where that can be
            known before.
    """
    start_s = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare runs in one process, and several were started: start one, or train students by hand")
    check_arms(config)
    ground = lay_ground(config, report)
    result = Comparison(
        tokens=len(ground.packed.tokens_SL1) * config.seq_len,
        held_out_rows=len(ground.held_SL1) * config.seq_len,
        seeds=config.seeds,
        text=config.data,
        teacher=ground.teacher_words,
        student=ground.student_words,
        gap=config.gap_arms(),
        arms={},
    )
    done, total = 0, len(config.arms) * len(config.seeds)
    for arm in config.arms:
        with naming(f"arm {arm.name}"):
            found = _arm(config, ground, arm, report)
        for seed in config.seeds:
            report("students", done, total, f"{arm.name}, seed {seed}")
            with naming(f"arm {arm.name}, seed {seed}"):
                found = replace(found, runs=(*found.runs, _student(config, ground, arm, seed, report)))
            done += 1
            result = replace(
                result, arms={**result.arms, arm.name: found}, seconds_this_run=time.perf_counter() - start_s
            )
            result.save(config.out)
    report("students", done, total)
    result.write_page(config.out)
    return result


def check_arms(config: CompareConfig) -> None:
    """Refuse arms that can not work, by settings alone.

    Raises:
        InputError: a loss that the arm's cache does not carry, or settings that contradict each other, naming the arm.
    """
    from stillroom.train.settling import check_loss
    from stillroom.train.sources import is_tempered, reads_targets
    from stillroom.train.validity import kind_of, settle

    if not isinstance(config.teacher, str):
        with naming("teacher"):
            check_loss(config.teacher_training("student", Path("teacher")), True)
    for arm in config.arms:
        with naming(f"arm {arm.name}"):
            cache = None if arm.cache is None else Path("cache")
            training = config.training(arm, seed=0, teacher="teacher", student="student", cache=cache)
            check_loss(training, arm.cache is None)
            if training.loss == "atkd" and arm.cache is None:
                raise InputError(
                    "loss atkd splits rows at a quantile of a whole cache: give the arm one, beside teacher: live"
                )
            kind = None
            if arm.cache is not None and reads_targets(training) and not arm.live and training.loss != "ce":
                made = config.caching(arm, corpus="data", teacher="teacher", out=Path("cache"))
                kind = kind_of(made.sampler_spec())
            settle(
                training.loss, kind, missing=training.missing, tempered=is_tempered(training),
                allow_biased=training.allow_biased,
            )  # fmt: skip


def _arm(config: CompareConfig, ground: Ground, arm: Arm, report: Reporter) -> ArmResult:
    """An arm without runs yet; its cache is there afterwards."""
    from stillroom.pipeline.run import build_cache

    training = config.training(arm, seed=0, teacher=ground.teacher, student=ground.student, cache=None)
    told = f"{training.missing.replace('_', ' ')}" if training.missing else ""
    if arm.cache is None:
        return ArmResult(kept="the teacher, live" if arm.live else "the text alone", loss=training.loss)
    made, folder = ground.caching(config, arm)
    spec = made.sampler_spec()
    if not ground.is_complete(folder, spec):
        stage = f"cache {folder.name}"
        build_cache(made, on_progress=lambda what, done, total: report(f"{stage}: {what}", done, total))
        for what in ("pack", "cache"):
            report.close(f"{stage}: {what}")
    cache = ground.open(folder)
    rows = len(cache) * config.seq_len
    words = [f"{spec.kind.replace('_', '-')} {spec.draws}", f"log p of {spec.keep_logp}", told]
    return ArmResult(
        kept=", ".join(word for word in words if word),
        loss=training.loss,
        draws=spec.draws,
        entries_like=arm.entries_like,
        entries_per_row=cache.entries / rows,
        bytes_per_row=sum(cache.bytes_by_array().values()) / rows,
        bytes_by_array={name: size / rows for name, size in cache.bytes_by_array().items()},
    )


def _student(config: CompareConfig, ground: Ground, arm: Arm, seed: int, report: Reporter) -> dict[str, Any]:
    """Train a student and measure it, or find it done; the figures of the run."""
    from stillroom.train.evaluate import evaluate
    from stillroom.train.folder import write_json
    from stillroom.train.run import train_student

    cache = None if arm.cache is None else ground.caching(config, arm)[1]
    training = config.training(arm, seed=seed, teacher=ground.teacher, student=ground.student, cache=cache)
    stage = f"{arm.name}, seed {seed}"
    trained = train_student(
        training,
        tokens_SL1=ground.packed.tokens_SL1 if cache is None else None,
        on_progress=lambda done, total, metrics: report(
            stage, done, total, f"loss {metrics['loss']:.3f}" if metrics else ""
        ),
    )
    report.close(stage)
    kept, key = training.out / "evaluation.json", ground.evaluation_key()
    if kept.is_file() and (record := json.loads(kept.read_text())).get("of") == key:
        measured: dict[str, Any] = record["figures"]
    else:
        stage = f"evaluate {arm.name}, seed {seed}"
        measured = asdict(
            evaluate(
                training.out, tokens_SL1=ground.held_SL1, teacher=ground.teacher, batch_size=config.batch_size,
                on_progress=lambda done, total: report(stage, done, total),
            )
        )  # fmt: skip
        report.close(stage)
        write_json(kept, {"of": key, "figures": measured})
    return {"seed": seed, **measured, "train_loss": trained.loss, "tokens_per_s": trained.tokens_per_s}
