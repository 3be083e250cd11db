"""`train_student`: one run from settings to a saved student; the same call again goes on, or finds it finished."""

from __future__ import annotations

import datetime
import logging
import platform
import shutil
import signal
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from stillroom.storage.depot import redacted
from stillroom.storage.manifest import DOCUMENTS
from stillroom.train.adapters import merged
from stillroom.train.card import model_card
from stillroom.train.checkpoint import Tensors, gather, writing
from stillroom.train.config import TrainConfig
from stillroom.train.engine import check_engine, make_ready
from stillroom.train.folder import RunFolder, step_of
from stillroom.train.fused import without_loss
from stillroom.train.objective import Objective
from stillroom.train.plan import Plan, make_plan
from stillroom.train.ranks import Ranks
from stillroom.train.stop import Stop, Stopped
from stillroom.train.student import check_documents, copy_tokenizer, load_model, quiet
from stillroom.train.targets import LiveTeacher
from stillroom.train.trainer import Progress, StillroomTrainer
from stillroom.train.watch import Watch

LIBRARIES: Final = ("stillroom", "torch", "transformers", "accelerate", "tokenizers", "numpy")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run did.

    Attributes:
        out: folder of the student.
        steps: optimizer steps.
        tokens: rows the student was trained on, over the whole run.
        loss: mean over the last logged steps, nats per row.
        seconds: wall time of the steps, over all attempts.
        tokens_per_s: tokens / seconds.
        already_done: True when the run was found finished and nothing was done.
        notes: sentences worth showing: a padded vocabulary, a missing tokenizer, a broken checkpoint passed over.
    """

    out: Path
    steps: int
    tokens: int
    loss: float
    seconds: float
    tokens_per_s: float
    already_done: bool = False
    notes: tuple[str, ...] = ()


def train_student(
    config: TrainConfig,
    *,
    tokens_SL1: npt.NDArray[np.integer] | None = None,
    eval_tokens_SL1: npt.NDArray[np.integer] | None = None,
    on_progress: Progress = lambda done, total, metrics: None,
    stop: Stop | None = None,
) -> TrainResult:
    """Train a student, or go on with an interrupted run, and save it in `config.out`.

    On one CPU process a run that was killed and resumed ends in the same bytes as one that was not. Under torchrun every process
    calls it; the first one writes and is told of progress, all return the same.

    Args:
        config: settings.
        tokens_SL1: `[S, L+1]` token ids, for `ce` and live teachers without a cache.
        eval_tokens_SL1: held-out ones, for `eval_data`.
        on_progress: told (steps done, steps in all, last logged metrics) after every step.
        stop: entered; a signal then ends the run after the step in hand, with a checkpoint.

    Raises:
        Stopped: `stop` was asked to; the same call goes on.
        InputError: settings, student, teacher or text that cannot be used; nothing has been written then. Also a loss
            that is not finite any more.
        CacheError: a cache that cannot be read.
    """
    ranks = Ranks.join()
    plan = ranks.together(lambda: make_plan(config, tokens_SL1, eval_tokens_SL1))
    ranks.together(lambda: check_engine(plan.config, plan.student, ranks))
    folder = RunFolder(config.out)
    identity = plan.identity()
    begun = ranks.once(lambda: folder.check(identity))
    if begun and config.resume and (finished := ranks.once(folder.result)) is not None:
        notes = tuple(finished.pop("notes"))
        return TrainResult(out=config.out, **finished, already_done=True, notes=notes)
    model = ranks.together(lambda: load_model(plan.student, role="student", seed=config.seed))
    objective = _objective(plan)
    if plan.cache is not None and plan.cache.manifest.packing.policy == DOCUMENTS:
        check_documents(model, plan.student, role="student")
        if isinstance(objective.targets, LiveTeacher) and plan.teacher is not None:
            check_documents(objective.targets.model, plan.teacher, role="teacher")
    ranks.together(lambda: make_ready(model, plan.config, objective, ranks))
    checkpoint, notes, last = ranks.once(lambda: _begin(plan, folder, identity, begun))
    if ranks.first:
        for note in notes:
            logger.warning(note)
    with_cache = model.config.use_cache  # the Trainer switches it off, which is no property of the student
    with quiet():
        trainer = StillroomTrainer(
            model=model,
            config=plan.config,
            source=plan.source,
            order=plan.order,
            folder=folder,
            ranks=ranks,
            stop=stop,
            watch=_watch(plan, objective, ranks),
            first_step=0 if checkpoint is None else step_of(checkpoint),
            last_metrics=last,
            on_progress=on_progress,
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert plan.config.steps is not None
    if trainer.state.global_step < plan.config.steps:
        raise Stopped((stop and stop.number) or signal.SIGTERM)  # the signal may have come to another process
    without_loss(model)
    model.config.use_cache = with_cache
    last = trainer.last_metrics
    result = TrainResult(
        out=config.out,
        steps=last["step"],
        tokens=last["tokens"],
        loss=last["loss"],
        seconds=last["seconds"],
        tokens_per_s=last["tokens"] / last["seconds"],
        notes=notes,
    )
    tensors = gather(trainer.trained(), ranks)
    average = None if trainer.ema is None else gather({**trainer.trained(), **trainer.ema.average}, ranks)
    ranks.once(lambda: _finish(model, plan, folder, result, last, tensors, average))
    return result


def _begin(
    plan: Plan, folder: RunFolder, identity: dict[str, Any], begun: bool
) -> tuple[Path | None, tuple[str, ...], dict[str, Any]]:
    """Make or clear the folder, and say where to go on: the checkpoint, notes, the last line of the log up to there."""
    if not begun:
        folder.create(_record(plan, identity))
    elif not plan.config.resume:
        folder.restart()
    checkpoint, notes = _checkpoint(folder)
    return checkpoint, plan.notes + notes, folder.cut_metrics(0 if checkpoint is None else step_of(checkpoint))


def _checkpoint(folder: RunFolder) -> tuple[Path | None, tuple[str, ...]]:
    """The checkpoint to go on from; broken newer ones are removed, and said to be."""
    checkpoint, broken = folder.last_complete()
    for path in broken:
        shutil.rmtree(path)
    where = "the beginning" if checkpoint is None else checkpoint.name
    return checkpoint, tuple(
        f"{path.name} {wrong} and was removed: going on from {where}" for path, wrong in broken.items()
    )


def _objective(plan: Plan) -> Objective:
    """The plan's, with the live teacher in it if there is one."""
    if plan.teacher is None:
        return plan.objective
    model = load_model(plan.teacher, role="teacher").eval().requires_grad_(False)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if plan.config.dtype == "bfloat16" else torch.float32
    return replace(plan.objective, targets=LiveTeacher(model, plan.vocab_size, dtype))


def _watch(plan: Plan, objective: Objective, ranks: Ranks) -> Watch | None:
    """The evaluations of the run, if it has any; its warning comes from the first process."""
    if plan.held_out is None:
        return None
    config = plan.config
    return Watch(
        plan.held_out,
        every=config.eval_every,
        vocab_size=plan.vocab_size,
        batch_size=max(1, config.batch_size // (config.grad_accumulation * ranks.count)),
        dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
        teacher=objective.targets if isinstance(objective.targets, LiveTeacher) else None,
        warn=logger.warning if ranks.first else lambda sentence: None,
    )


def _record(plan: Plan, identity: dict[str, Any]) -> dict[str, Any]:
    config = plan.config.model_dump(mode="json")
    if isinstance(plan.config.cache, str):
        config["cache"] = ",".join(map(redacted, plan.config.cache.split(",")))  # no password of an address
    return {
        "settings": identity,
        "config": config,
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _finish(
    model: PreTrainedModel,
    plan: Plan,
    folder: RunFolder,
    result: TrainResult,
    last: dict[str, Any],
    tensors: Tensors,
    average: Tensors | None,
) -> None:
    """Save the student, the averaged one too if there is one, and record that the run is finished."""
    with (
        quiet(),
        writing(
            "the student could not be written", "run the same command again: what was trained is in the last checkpoint"
        ),
    ):
        _save(model, plan, result, last, tensors, plan.config.out)
        if average is not None:
            _save(model, plan, result, last, average, plan.config.out / "ema")
        kept = asdict(result)
        del kept["out"], kept["already_done"]
        folder.finish(kept)


def _save(
    model: PreTrainedModel, plan: Plan, result: TrainResult, last: dict[str, Any], tensors: Tensors, out: Path
) -> None:
    """A student's folder: weights (LoRA's factors added to them), tokenizer, card."""
    config = plan.config
    if config.lora_rank is None:
        model.save_pretrained(out, state_dict=tensors)
    else:
        fresh = load_model(plan.student, role="student", seed=config.seed)
        merged(fresh, config, tensors, out / "adapter").save_pretrained(out)
    if plan.tokenizer is not None:
        copy_tokenizer(plan.tokenizer, out)
    origin = {}
    if plan.teacher is not None:
        origin["teacher"] = f"`{config.teacher}`"
    if plan.caches:
        made = [cache.manifest for cache in plan.caches]
        teachers = dict.fromkeys(f"`{m.teacher.name}` (fingerprint `{m.teacher.fingerprint[:16]}`)" for m in made)
        origin.setdefault("teacher", ", ".join(teachers))
        origin["cache"] = f"fingerprint `{plan.source.fingerprint[:16]}`, {len(plan.source):,} sequences"
        corpora = dict.fromkeys(f"`{m.corpus.name}` (fingerprint `{m.corpus.fingerprint[:16]}`)" for m in made)
        origin["corpus"] = ", ".join(corpora)
        if plan.config.teacher is None and config.loss != "ce":
            origin["sampler"] = ", ".join(dict.fromkeys(f"{m.sampler.kind}, N = {m.sampler.draws}" for m in made))
    shown = (
        "loss",
        "alpha",
        "temperature",
        "missing",
        "optimizer",
        "lr",
        "batch_size",
        "steps",
        "schedule",
        "seed",
        "dtype",
    )
    card = model_card(
        title=out.resolve().name,
        settings={name: getattr(config, name) for name in shown},
        origin=origin,
        numbers={
            "tokens": result.tokens,
            "final training loss (nats)": result.loss,
            "final cross-entropy (nats)": last["ce"],
            "final KL term (nats)": last.get("kd"),
        },
    )
    (out / "README.md").write_text(card, encoding="utf-8")
