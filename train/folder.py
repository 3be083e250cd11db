"""The run folder: who owns it, which checkpoint is whole, what has been logged, whether it is finished. One process writes it.

OUT/run.json                the resolved settings and library versions; another run is refused
OUT/metrics.jsonl           one line every `log_every` steps
OUT/checkpoint-<step>/      see `checkpoint.py`; complete.json is written last and lists sizes and hashes
OUT/config.json, model.safetensors, tokenizer files, README.md      the student, as `save_pretrained` writes it
OUT/ema/                    the averaged student likewise, and OUT/adapter/ LoRA's factors, where the run has them
OUT/result.json             written last of all: the run is finished
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from stillroom.storage.errors import InputError

RUN, METRICS, RESULT, COMPLETE = "run.json", "metrics.jsonl", "result.json", "complete.json"


@final
@dataclass(frozen=True, slots=True)
class RunFolder:
    """A directory that holds one training run, or will.

    Attributes:
        path: the directory.
    """

    path: Path

    def check(self, identity: dict[str, Any]) -> bool:
        """Whether the run is there already; writes nothing.

        Args:
            identity: the settings that decide the student.

        Raises:
            InputError: the path holds something else, or a run with other settings.
        """
        if not self.path.exists():
            return False
        if self.path.is_dir() and all(file == _part(self.path / RUN) for file in self.path.iterdir()):
            return False  # empty, or killed while `create` wrote its only file
        try:
            kept = dict(json.loads((self.path / RUN).read_text())["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} exists and is no Stillroom run: choose another --out or empty it") from error
        names = [k for k in (*identity, *kept) if kept.get(k) != identity.get(k)]
        if names:
            said = ", ".join(f"{k} is {identity.get(k)!r}, was {kept.get(k)!r}" for k in dict.fromkeys(names))
            raise InputError(f"{self.path} holds a run with other settings ({said}): choose another --out")
        return True

    def create(self, record: dict[str, Any]) -> None:
        """Make the directory and write `run.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / RUN, record)

    def result(self) -> dict[str, Any] | None:
        """What the finished run recorded, or None."""
        if not (self.path / RESULT).is_file():
            return None
        record: dict[str, Any] = json.loads((self.path / RESULT).read_text())
        return record

    def finish(self, record: dict[str, Any]) -> None:
        """Record the result: from here on the run counts as finished."""
        write_json(self.path / RESULT, record)

    def restart(self) -> None:
        """Remove what an earlier attempt left, but not `run.json`."""
        for checkpoint in self.checkpoints():
            shutil.rmtree(checkpoint)
        for name in (METRICS, RESULT):
            (self.path / name).unlink(missing_ok=True)

    def checkpoints(self) -> list[Path]:
        """Checkpoint directories, oldest first."""
        found = [p for p in self.path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
        return sorted(found, key=step_of)

    def last_complete(self) -> tuple[Path | None, dict[Path, str]]:
        """The newest whole checkpoint, and the broken ones that are newer with what is wrong with them."""
        broken: dict[Path, str] = {}
        for checkpoint in reversed(self.checkpoints()):
            wrong = damage(checkpoint)
            if wrong is None:
                return checkpoint, broken
            broken[checkpoint] = wrong
        return None, broken

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line more in `metrics.jsonl`."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def cut_metrics(self, step: int) -> dict[str, Any]:
        """Drop the lines after `step` (they will be written again) and a line cut in writing.

        Returns:
            The last line kept; empty if none is.
        """
        path = self.path / METRICS
        if not path.is_file():
            return {}
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
        last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        return last


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint directory is named after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def mark_complete(checkpoint: Path) -> None:
    """Write the list of files, sizes and SHA-256 that makes a checkpoint count."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != COMPLETE]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # listed is to mean kept
    listed = {path.name: {"size_bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    write_json(checkpoint / COMPLETE, listed)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if every file is there with the bytes it was written with."""
    try:
        listed: dict[str, dict[str, Any]] = json.loads((checkpoint / COMPLETE).read_text())
        for name, kept in listed.items():
            if (checkpoint / name).stat().st_size != kept["size_bytes"]:
                return "is incomplete"
        for name, kept in listed.items():
            if _sha256(checkpoint / name) != kept["sha256"]:
                return f"is damaged ({name} is not what was written)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "is incomplete"
    return None


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it: it is there whole or not at all."""
    part = _part(path)
    with part.open("w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
