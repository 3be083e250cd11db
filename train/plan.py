"""Everything that can be wrong with a training run, found before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.stream import StreamOrder
from stillroom.train.config import TrainConfig
from stillroom.train.data import Source, order_of
from stillroom.train.held_out_data import HeldOutData, open_held_out
from stillroom.train.objective import Objective
from stillroom.train.optim import fast_bfloat16
from stillroom.train.selection import NOT_IDENTITY as SELECTION_SETTINGS
from stillroom.train.selection import select, with_ramp
from stillroom.train.settling import check_loss, settle_objective
from stillroom.train.sources import open_source
from stillroom.train.student import ModelInfo, check_length, check_tokenizers, find_model, find_tokenizer

DEFAULT_LR: Final = {"adamw": 1e-3, "muon": 0.02}
DEFAULT_WEIGHT_DECAY: Final = {"adamw": 0.1, "muon": 0.05}
NOT_IDENTITY: Final = {
    "out",
    "cache",
    "cache_dir",
    "cache_bytes",
    "epochs",
    "max_sequences",
    "resume",
    "save_every",
    "log_every",
    *SELECTION_SETTINGS,
    "grad_accumulation",
    "head",
    "gradient_checkpointing",
    "compile",
    "parallel",
    "loader_workers",
    "report_to",
    "eval_cache",
    "eval_data",
    "eval_every",
    "eval_rows",
}  # change where and how, not what


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that can start.

    Attributes:
        config: the settings with every open choice made: steps, lr, weight_decay, dtype.
        source: sequences.
        caches: the open caches, if the run has any.
        student, teacher: found, not loaded.
        tokenizer: folder of the tokenizer the student will be saved with, if there is one.
        vocab_size: columns of the logits that take part.
        sequences: size of the universe.
        order: in which it is read.
        objective: the loss; a live teacher is still to be put in.
        held_out: what the run evaluates on, if anything.
        notes: sentences the user should read once.
    """

    config: TrainConfig
    source: Source
    caches: tuple[Cache, ...]
    student: ModelInfo
    teacher: ModelInfo | None
    tokenizer: Path | None
    vocab_size: int
    sequences: int
    order: StreamOrder
    objective: Objective
    held_out: HeldOutData | None
    notes: tuple[str, ...]

    @property
    def cache(self) -> Cache | None:
        """The first of the caches: what they must have in common is read from it."""
        return self.caches[0] if self.caches else None

    def identity(self) -> dict[str, Any]:
        """The settings that decide the student: two runs with equal ones are the same run."""
        config = self.student.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        return {
            **self.config.model_dump(mode="json", exclude=NOT_IDENTITY),
            "data": self.source.fingerprint,
            "sequences": self.sequences,
            "selection": self.order.selection,
            "student_config": digest,
        }


def make_plan(
    config: TrainConfig,
    tokens_SL1: npt.NDArray[np.integer] | None,
    eval_tokens_SL1: npt.NDArray[np.integer] | None = None,
) -> Plan:
    """Check a run and settle its open choices.

    Raises:
        InputError: settings that contradict each other, or a student, teacher or cache that does not fit.
        CacheError: a cache that cannot be read.
    """
    check_loss(config, tokens_SL1 is not None)
    _check_parts(config)
    student = find_model(config.student, role="student")
    teacher = None if config.teacher is None else find_model(config.teacher, role="teacher")
    if teacher is not None and not teacher.has_weights:
        raise InputError(f"teacher {teacher.name} has a configuration but no weights: give a trained model")
    opened = open_source(config, student, tokens_SL1)
    source, caches = opened.source, opened.caches
    cache = caches[0] if caches else None
    check_length(student, source.seq_len, role="student")
    if teacher is not None:
        check_length(teacher, source.seq_len, role="teacher")
    reduced = config.id_map is not None
    vocab_size = student.vocab_size if reduced else _check_vocabulary(student, teacher, cache, tokens_SL1)

    notes = list(opened.notes)
    if student.vocab_size > vocab_size:
        notes.append(
            f"the student's vocabulary is padded: {student.vocab_size - vocab_size} of its {student.vocab_size} logits lie "
            f"beyond the {vocab_size} of the teacher and are masked in the loss"
        )
    tokenizer = find_tokenizer(Path(student.name)) if reduced else _tokenizer(config, cache, student, teacher)
    if tokenizer is None:
        notes.append("no tokenizer is at hand, so the student is saved without one")
    sequences = min(len(source), config.max_sequences or len(source))
    if config.max_sequences is not None and config.max_sequences > sequences:
        notes.append(f"max_sequences is {config.max_sequences}, but there are only {sequences} sequences")
    choice = select(config, caches, len(source), sequences)
    resolved = _resolve(config, sequences if choice is None else choice.selection.size, source.default_window)
    selection = None if choice is None else with_ramp(choice.selection, resolved)
    order = order_of(source, seed=config.seed, window=resolved.window, sequences=sequences, selection=selection)
    # Now, not after the folder is made: it refuses a window for which the local directory has no room.
    source.follow(order)
    notes += [] if choice is None else choice.notes
    objective, told = settle_objective(resolved, opened, vocab_size)
    held_out = open_held_out(config, caches, student, vocab_size, eval_tokens_SL1)
    told = (*told, *(() if held_out is None else held_out.notes))
    return Plan(
        config=resolved,
        source=source,
        caches=caches,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sequences=sequences,
        order=order,
        objective=objective,
        held_out=held_out,
        notes=(*notes, *told),
    )


def _check_parts(config: TrainConfig) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size < config.grad_accumulation * ranks:
        raise InputError(
            f"batch_size is {config.batch_size} sequences, fewer than the {config.grad_accumulation * ranks} parts it is cut "
            "in (grad_accumulation times processes): raise --batch-size or lower --grad-accumulation"
        )


def _check_vocabulary(
    student: ModelInfo, teacher: ModelInfo | None, cache: Cache | None, tokens_SL1: npt.NDArray[np.integer] | None
) -> int:
    # The manifest tells the ids its teacher was asked about (`--vocab-size`), not how far its logits are padded.
    if teacher is not None and cache is not None and teacher.vocab_size < cache.manifest.vocab_size:
        raise InputError(
            f"teacher {teacher.name} has a vocabulary of {teacher.vocab_size}, the cache's is {cache.manifest.vocab_size}: give "
            "the teacher the cache was made with"
        )
    asked = [m for m in (None if cache is None else cache.manifest.vocab_size, teacher and teacher.vocab_size) if m]
    vocab_size = asked[0] if asked else student.vocab_size
    if student.vocab_size < vocab_size:
        raise InputError(
            f"student {student.name} has a vocabulary of {student.vocab_size}, the teacher's is {vocab_size}: give a student "
            "with the teacher's tokenizer and at least its vocabulary"
        )
    if tokens_SL1 is not None and not 0 <= int(tokens_SL1.min()) <= int(tokens_SL1.max()) < vocab_size:
        raise InputError(
            f"token ids run from {tokens_SL1.min()} to {tokens_SL1.max()}, wanted 0 to {vocab_size - 1}, the vocabulary of the "
            "models: cut the text with their tokenizer"
        )
    return vocab_size


def _tokenizer(config: TrainConfig, cache: Cache | None, student: ModelInfo, teacher: ModelInfo | None) -> Path | None:
    at_cache = None if cache is None else find_tokenizer(cache.path / "tokenizer")
    at_student, at_teacher = (None if m is None else find_tokenizer(Path(m.name)) for m in (student, teacher))
    check_tokenizers(at_student, at_cache, roles=("student", "cache"))
    check_tokenizers(at_student, at_teacher, roles=("student", "teacher"))
    check_tokenizers(at_teacher, at_cache, roles=("teacher", "cache"))
    return at_cache or at_student or at_teacher


def _resolve(config: TrainConfig, sequences: int, window: int | None) -> TrainConfig:
    steps = config.steps if config.steps is not None else int(config.epochs * sequences / config.batch_size + 1e-9)
    if steps < 1:
        raise InputError(
            f"{config.epochs} epochs of {sequences} sequences do not fill one batch of {config.batch_size}: lower --batch-size, "
            "or say how many --steps"
        )
    dtype = config.dtype
    if dtype == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "bfloat16" if fast_bfloat16(device) else "float32"
    decay = config.weight_decay if config.weight_decay is not None else DEFAULT_WEIGHT_DECAY[config.optimizer]
    settled: dict[str, Any] = {
        "steps": steps,
        "dtype": dtype,
        "weight_decay": decay,
        "lr": config.lr or DEFAULT_LR[config.optimizer],
    }
    return config.model_copy(update=settled)
