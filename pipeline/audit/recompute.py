"""The teacher over the chosen sequences, reduced to facts sequence by sequence; a killed audit goes on from what it kept.

Shapes: `B` sequences of a batch, `L` rows of a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch

from stillroom.pipeline.audit.config import AuditConfig
from stillroom.pipeline.audit.facts import Facts
from stillroom.pipeline.audit.forward import readings
from stillroom.pipeline.audit.reduce import Rows, cached_facts, seen
from stillroom.pipeline.config import TeacherConfig
from stillroom.pipeline.packing import tokenizer_fingerprint
from stillroom.pipeline.teacher import Teacher, load_tokenizer
from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import Manifest

KEPT: Final = "rows"  # folder of facts
KEY: Final = "rows.json"
REPLAY_ROWS: Final = 1024  # drawn with the manifest's own seed
GROUP_ELEMENTS: Final = 1 << 23  # logits of a reading that are alive at a time, 32 MiB, or one sequence's
FACTS_VERSION: Final = 1
Progress = Callable[[str, int, int], None]


def teacher_of(config: AuditConfig, manifest: Manifest) -> tuple[Teacher, str | None]:
    """The teacher to compare with, and the fingerprint of its tokenizer (None where it comes without one).

    Raises:
        InputError: it can not be loaded, or has another vocabulary.
    """
    own = config.teacher is None
    name = manifest.teacher.name if config.teacher is None else config.teacher
    dtype = manifest.teacher.dtype if config.dtype == "manifest" else config.dtype
    known = dtype in ("float32", "bfloat16", "float16")
    settings: dict[str, Any] = {
        "teacher": name,
        "revision": manifest.teacher.revision if own and config.revision is None else config.revision,
        "dtype": dtype if known else "auto",
        **{key: getattr(config, key) for key in
           ("device", "trust_remote_code", "attn_implementation", "device_map", "adapter")},
    }  # fmt: skip
    try:
        teacher = Teacher(TeacherConfig(**settings))
    except InputError as error:
        raise InputError(f"{error}; or audit the cache alone with --no-teacher") from error
    tokenizer = _tokenizer(name, settings["revision"], config.trust_remote_code)
    if teacher.vocab_size > manifest.vocab_size and tokenizer == manifest.tokenizer.fingerprint:
        teacher = Teacher(TeacherConfig(**settings, vocab_size=manifest.vocab_size))  # the padding the cache left out
    if teacher.vocab_size != manifest.vocab_size:
        raise InputError(
            f"teacher {teacher.name} has {teacher.vocab_size} ids, the cache was made with {manifest.vocab_size}: "
            "audit it with the teacher that made it, or alone with --no-teacher"
        )
    if manifest.packing.policy == "documents":
        teacher.check_documents()
    return teacher, tokenizer


def recompute(config: AuditConfig, cache: Cache, teacher: Teacher, indices: list[int], on_progress: Progress) -> Facts:
    """Facts of the rows of sequences at hand, in order.

    Args:
        config: seed, batch size, folder.
        cache: the cache.
        teacher: what it is compared with.
        indices: of the sequences.
        on_progress: told (`recompute`, sequences done, sequences).

    Raises:
        InputError: the folder belongs to another audit.
        DamagedError: a shard was damaged meanwhile.
    """
    folder = None if config.out is None else config.out / KEPT
    if folder is not None:
        claim(config, cache, teacher, indices)
    parts: list[Facts] = []
    each = max(1, REPLAY_ROWS // len(indices))
    for begin in range(0, len(indices), config.batch_size):
        batch = indices[begin : begin + config.batch_size]
        file = None if folder is None else folder / f"{begin:08d}.npz"
        kept = None if file is None else _kept(file)
        if kept is not None:
            parts.append(kept)
            continue
        parts.append(_of_batch(config, cache, teacher, batch, each))
        if file is not None:
            parts[-1].save(file)
        on_progress("recompute", begin + len(batch), len(indices))
    return Facts.concat(parts)


def _of_batch(config: AuditConfig, cache: Cache, teacher: Teacher, batch: list[int], replay_rows: int) -> Facts:
    """Facts of the sequences of one forward, a few sequences' logits alive at a time."""
    manifest, found = cache.manifest, []
    tokens_BL1, targets = cache.read(batch)
    length = manifest.packing.seq_len
    several = max(1, GROUP_ELEMENTS // (length * manifest.vocab_size))
    read = readings(teacher, tokens_BL1, cache.starts(batch), batch_size=config.batch_size)
    for start in range(0, len(batch), several):
        some = list(islice(read, several))
        stop = start + len(some)
        rows = Rows.of(manifest, tokens_BL1[start:stop], [cache.sequence_number(index) for index in batch[start:stop]])
        apart = [each.apart_LV for each in some if each.apart_LV is not None]
        part = seen(
            manifest,
            rows,
            torch.cat([each.logits_LV for each in some]),
            torch.cat([each.control_LV for each in some]),
            torch.cat(apart) if apart else None,
            seed=config.seed,
            replay_rows=replay_rows * len(some),
        )
        found.append(cached_facts(manifest, part, targets.slice_rows(start * length, stop * length)))
    return Facts.concat(found)


def claim(config: AuditConfig, cache: Cache, teacher: Teacher | None, indices: list[int]) -> None:
    """Take the folder for this audit, or go on in it.

    Raises:
        InputError: it holds something else.
    """
    assert config.out is not None
    key = {
        "facts": FACTS_VERSION,
        "cache": cache.manifest.identity,
        "shards": len(cache.shards),
        "teacher": None if teacher is None else teacher.fingerprint,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "sequences": [cache.sequence_number(index) for index in indices],
    }
    text = json.dumps(key)
    place = config.out / KEY
    if place.is_file():
        if place.read_text() != text:
            raise InputError(
                f"{config.out} holds another audit (of another cache, teacher, seed or number of rows): name a new folder, "
                "or delete it"
            )
    elif config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(f"{config.out} exists and holds no audit: name a new or empty folder with --out")
    (config.out / KEPT).mkdir(parents=True, exist_ok=True)
    place.write_text(text)


def _kept(file: Path) -> Facts | None:
    """What an earlier run kept; None where there is nothing that can be read."""
    try:
        return Facts.load(file)
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> str | None:
    try:
        return tokenizer_fingerprint(load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code))
    except InputError:
        return None
