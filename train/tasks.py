"""lm-eval's tasks on a student's folder, through its Python interface. An optional extra: 350 MB with what it needs.

Where a task's data come from is its own business: the hub, its local copy (`HF_HUB_OFFLINE=1`), files.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stillroom.storage.errors import InputError

Scores = dict[str, dict[str, float]]  # task to its figures


def check_tasks(names: Sequence[str], folder: Path | None) -> None:
    """Refuse tasks that can not be run, before a model is loaded.

    Raises:
        InputError: lm-eval is not installed, or the folder is none.
    """
    if importlib.util.find_spec("lm_eval") is None:
        asked = ", ".join(names) if names else f"those of {folder}"
        raise InputError(
            f"tasks ({asked}) need lm-eval, which is not installed: pip install 'stillroom[lm-eval]' (350 MB), or drop --tasks"
        )
    if folder is not None and not folder.is_dir():
        raise InputError(f"task folder {folder} does not exist: name a folder of lm-eval task files (.yaml)")


def run_tasks(
    student: str, names: Sequence[str], *, folder: Path | None = None, limit: int | None = None, batch_size: int = 8
) -> Scores:
    """Figures of each task.

    Args:
        student: folder or hub id.
        names: of tasks or groups; none: all of `folder`.
        folder: look for tasks here and not among lm-eval's own, the list of which takes a minute to read.
        limit: use the first so many documents of each.
        batch_size: requests per forward; changes speed only.

    Returns:
        By task, figures as lm-eval names them; that of a filter is `figure,filter`, without it where there is none. Standard
        errors end in `_stderr`.

    Raises:
        InputError: lm-eval is not installed, a task is not known, or its data or the student can not be read.
    """
    check_tasks(names, folder)
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    known = set(manager.all_tasks)
    wanted = list(names) or sorted(known)
    if missing := [name for name in wanted if name not in known]:
        where = f"in {folder}" if folder is not None else "of lm-eval"
        shown = f" (there are {', '.join(sorted(known)[:8])})" if folder is not None else ""
        raise InputError(f"{missing[0]} is no task {where}{shown}: see `lm-eval ls tasks` for the names")
    if not wanted:
        raise InputError(f"task folder {folder} holds no task: name a folder of lm-eval task files (.yaml)")
    try:
        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": student, "dtype": "float32", "trust_remote_code": False},
            tasks=wanted,
            task_manager=manager,
            batch_size=batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            limit=limit,
            log_samples=False,
        )
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
    ) as error:  # the hub is not there, a file is not, a task wants more
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"tasks {', '.join(wanted)} could not be run ({type(error).__name__}: {reason}): check its data and the student"
        ) from error
    return {task: _numbers(figures) for task, figures in found["results"].items()}


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
