"""Mean losses of another model on the sequences of a cache: computed once, kept in a file, half measured files gone on with.

Shapes: `S` sequences at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache
from stillroom.storage.depot import Directory
from stillroom.storage.errors import FormatError, InputError
from stillroom.storage.sidecar import pack, unpack

LOSSES_KIND: Final = "stillroom-losses 1"
_DTYPES: Final = {"shards": np.int64, "loss_S": np.float32}


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLosses:
    """What a model makes of the text of a cache.

    Attributes:
        model: its name.
        fingerprint: SHA-256 of its weights.
        loss_S: mean cross-entropy over the rows with a target of each sequence at hand, float32 nats; NaN: not measured.
    """

    model: str
    fingerprint: str
    loss_S: npt.NDArray[np.float32]


def save_losses(path: Path, cache: Cache, losses: SequenceLosses) -> None:
    """Write `losses` to `path`, whole or not at all.

    Raises:
        InputError: the path can not be written.
    """
    shards = np.array(cache.shards, np.int64)
    columns: dict[str, npt.NDArray[Any]] = {"shards": shards, "loss_S": losses.loss_S.astype(np.float32)}
    notes = {"model": losses.model, "fingerprint": losses.fingerprint}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Directory(path.parent).replace(path.name, pack(LOSSES_KIND, cache.manifest, columns, notes))
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise InputError(f"losses can not be written to {path} ({error.strerror}): name a file with --out") from error


def load_losses(path: Path, cache: Cache) -> SequenceLosses:
    """The losses in a file, for the sequences of `cache`; NaN where a shard came since.

    Raises:
        InputError: there is no such file, it is damaged, or it is of another cache.
    """
    try:
        columns, notes = unpack(path, LOSSES_KIND, cache.manifest, _DTYPES)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: make it with `stillroom losses`") from None
    except FormatError as error:
        raise InputError(f"{error}, and measure again with `stillroom losses`") from error
    shards, kept_S = columns["shards"].tolist(), columns["loss_S"]
    spans = [cache.manifest.shard_range(shard) for shard in shards if 0 <= shard < cache.manifest.shards]
    stops = np.cumsum([stop - start for start, stop in spans], dtype=np.int64)
    if len(spans) != len(shards) or len(kept_S) != (stops[-1] if len(stops) else 0):
        raise InputError(f"{path} does not fit the shards of the cache: measure again with `stillroom losses`")
    found = {
        shard: kept_S[end - (stop - start) : end] for shard, (start, stop), end in zip(shards, spans, stops.tolist())
    }
    none = [np.full(length, np.nan, np.float32) for length in cache.lengths]
    parts = [found.get(shard, missing) for shard, missing in zip(cache.shards, none)]
    loss_S = np.concatenate([np.zeros(0, np.float32), *parts])
    return SequenceLosses(notes.get("model", ""), notes.get("fingerprint", ""), loss_S)
