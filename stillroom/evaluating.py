"""`stillroom evaluate`: its settings, its body, the tables it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from stillroom.console import Reporter, show_pairs, show_table
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stillroom.train.config import TrainConfig
    from stillroom.train.evaluate import Evaluation
    from stillroom.train.views import Group

APART = ("sampled", "top1_rows", "reliability", "by_frequency", "by_position", "counted_tokens", "tasks")


class EvaluateConfig(BaseModel):
    """Settings of `stillroom evaluate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    student: str = Field(description="folder or hub id of the student")
    teacher: str | None = Field(None, description="folder or hub id of the teacher (for KL, agreement, acceptance)")
    data: str | None = Field(
        None, description="held-out text: file, folder or `datasets` name, cut by the student's tokenizer"
    )
    cache: str | None = Field(
        None,
        description="held-out sequences of this cache (directory or URL) instead of text; it stands in for the teacher",
    )
    text_column: str = Field("text", description="column or JSON key that holds the text")
    split: str = Field("train", description="split of a `datasets` dataset")
    seq_len: int = Field(1024, ge=2, description="rows per sequence of --data")
    max_sequences: int = Field(256, ge=1, description="evaluate at most so many sequences")
    batch_size: int = Field(8, ge=1, description="sequences per forward")
    views: bool = Field(
        False,
        description="show the reliability curve and the figures by token frequency and by position (--json has them)",
    )
    frequency_cache: str | None = Field(
        None,
        description="count how often tokens occur in this cache, the training cache say (unset: in what is evaluated)",
    )
    tasks: str | None = Field(None, description="lm-eval tasks too, comma-separated (pip install 'stillroom[lm-eval]')")
    task_folder: Path | None = Field(
        None, description="look for the tasks in this folder of task files; without --tasks, run all of them"
    )
    task_limit: int | None = Field(None, ge=1, description="first so many documents of each task only")


def evaluate(config: EvaluateConfig, as_json: bool) -> Evaluation | dict[str, Any]:
    """`stillroom evaluate`."""
    names = [name for name in (config.tasks or "").split(",") if name]
    with_tasks = bool(names) or config.task_folder is not None
    if with_tasks:
        from stillroom.train.tasks import check_tasks, run_tasks

        check_tasks(names, config.task_folder)
    result = None
    if config.data is not None or config.cache is not None or not with_tasks:
        result = _measure(config)
    tasks = None
    if with_tasks:
        tasks = run_tasks(
            config.student, names, folder=config.task_folder, limit=config.task_limit, batch_size=config.batch_size
        )
        result = None if result is None else replace(result, tasks=tasks)
    if not as_json:
        if result is not None:
            show_pairs(f"student {config.student}", _figures(result))
            if config.views:
                _show_views(result, config.frequency_cache)
        for task, figures in (tasks or {}).items():
            show_pairs(f"task {task}", [(name, f"{value:.4g}") for name, value in figures.items()])
    return {"tasks": tasks} if result is None else result


def held_out_text(config: TrainConfig) -> npt.NDArray[np.integer] | None:
    """`--eval-data` of a run as sequences of the length its cache has; None where there is none.

    Raises:
        InputError: text or a tokenizer that can not be used.
    """
    if config.eval_data is None or config.cache is None:
        return None
    from stillroom.pipeline.config import CorpusConfig
    from stillroom.pipeline.packing import pack
    from stillroom.pipeline.teacher import load_tokenizer
    from stillroom.storage.cache import open_cache
    from stillroom.train.sources import cache_names
    from stillroom.train.student import find_tokenizer

    names, _ = cache_names(str(config.cache))
    opened = open_cache(names[0], columns=("tokens",), cache_dir=config.cache_dir, cache_bytes=config.cache_bytes)
    seq_len = opened.manifest.packing.seq_len
    at_cache = None if config.id_map is not None else find_tokenizer(opened.path / "tokenizer")
    corpus = CorpusConfig(data=config.eval_data, seq_len=seq_len, max_sequences=-(-config.eval_rows // seq_len))
    return pack(corpus, load_tokenizer(str(at_cache or config.student))).tokens_SL1


def _measure(config: EvaluateConfig) -> Evaluation:
    from stillroom.storage.cache import open_cache
    from stillroom.train.evaluate import evaluate as measure

    counted = config.frequency_cache
    with Reporter() as report:
        return measure(
            config.student,
            **_held_out(config),
            teacher=config.teacher,
            batch_size=config.batch_size,
            frequency_cache=None if counted is None else open_cache(counted, columns=("tokens",)),
            on_progress=lambda done, total: report("evaluate", done, total),
        )


def _held_out(config: EvaluateConfig) -> dict[str, Any]:
    """What to evaluate on, as arguments."""
    if (config.data is None) == (config.cache is None):
        raise InputError("evaluate needs held-out rows: give --data TEXT or --cache DIR, one of them")
    if config.cache is not None:
        from stillroom.storage.cache import open_cache

        opened = open_cache(config.cache)
        return {"cache": opened, "rows": config.max_sequences * opened.manifest.packing.seq_len}
    assert config.data is not None
    from stillroom.pipeline.config import CorpusConfig
    from stillroom.pipeline.packing import pack
    from stillroom.pipeline.teacher import load_tokenizer

    corpus = CorpusConfig(
        data=config.data,
        text_column=config.text_column,
        split=config.split,
        seq_len=config.seq_len,
        max_sequences=config.max_sequences,
    )
    return {"tokens_SL1": pack(corpus, load_tokenizer(config.student)).tokens_SL1}


def _figures(result: Evaluation) -> list[tuple[str, str]]:
    """Figures, and beside those that are not exact or not of all rows what they are."""
    remarks = dict.fromkeys(result.sampled, " (estimated from sampled targets)")
    if result.top1_rows is not None:
        remarks["top1_agreement"] = f" (of {result.top1_rows:,} rows whose first choice the cache keeps)"
    figures = {name: value for name, value in asdict(result).items() if name not in APART and value is not None}
    return [(name, _number(value) + remarks.get(name, "")) for name, value in figures.items()]


def _show_views(result: Evaluation, frequency_cache: str | None) -> None:
    show_table(
        "reliability",
        ("confidence", "rows", "mean confidence", "hit rate"),
        [
            (f"{b.above:.3f} to {b.upto:.3f}", f"{b.rows:,}", _number(b.confidence), _number(b.hit_rate))
            for b in result.reliability
            if b.rows
        ],
    )
    where = "the evaluated text" if frequency_cache is None else frequency_cache
    _show_groups(
        f"by how often the label occurs in {where} ({result.counted_tokens:,} tokens)", "times", result.by_frequency
    )
    _show_groups("by position", "position", result.by_position)


def _show_groups(title: str, unit: str, groups: Sequence[Group]) -> None:
    names = [
        name
        for name in ("lm_loss", "teacher_lm_loss", "kl", "top1_agreement", "acceptance")
        if any(getattr(group, name) is not None for group in groups)
    ]
    rows = [
        (
            f"{group.first:,}" + (f" to {group.last:,}" if group.last > group.first else ""),
            f"{group.rows:,}",
            *(_number(getattr(group, name)) for name in names),
        )
        for group in groups
    ]
    show_table(title, (unit, "rows", *names), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
