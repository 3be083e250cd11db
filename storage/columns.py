"""Columns of a cache: one number for each sequence, from its rows, from another model's losses, or from a file.

Shapes: `S` sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.losses import load_losses
from stillroom.storage.rows import row_statistics

FROM_CACHE: Final = ("label_logp", "entropy", "difference")
FloatS = npt.NDArray[np.float64]


class Means(NamedTuple):
    """Rows with a target of each sequence, and means over them; see `RowStatistics`."""

    rows_S: npt.NDArray[np.int64]
    label_logp_S: FloatS
    entropy_S: FloatS


@final
class Figures:
    """Columns of the sequences to choose from, computed when asked for.

    Args:
        source: open caches, whose sequences follow one another, or how many sequences a source without one has.
        sequences: take the first so many only; None: all.
        reference_losses: file of a reference model's losses.

    Attributes:
        sequences: how many there are to choose from.
        known: figures of the caches' rows, once they were asked for; of all their sequences.
    """

    def __init__(self, source: Sequence[Cache] | int, sequences: int | None, reference_losses: Path | None) -> None:
        self._caches = () if isinstance(source, int) else tuple(source)
        self._total = source if isinstance(source, int) else sum(map(len, source))
        self.sequences = self._total if sequences is None else min(self._total, sequences)
        self._reference_losses = reference_losses
        self.known: Means | None = None

    def rows(self, what: str) -> Means:
        """Rows and means of the caches' sequences, for `what`.

        Raises:
            InputError: there is no cache.
        """
        if not self._caches:
            raise InputError(f"{what} is made from a cache's figures, and there is none: give --cache")
        if self.known is None:
            parts = [row_statistics(cache) for cache in self._caches]
            self.known = Means(
                np.concatenate([part.rows_S for part in parts]),
                np.concatenate([part.label_logp_S for part in parts]).astype(np.float64),
                np.concatenate([part.entropy_S for part in parts]).astype(np.float64),
            )
        return self.known

    def column(self, name: str) -> FloatS:
        """A column by its name, or from the file of that name; NaN where a sequence has no value.

        Raises:
            InputError: unknown, or a file that does not fit.
        """
        if name in FROM_CACHE:
            known = self.rows(name)
            if name != "difference":
                return (known.label_logp_S if name == "label_logp" else known.entropy_S)[: self.sequences]
            assert self._reference_losses is not None
            loss_S = self.losses(self._reference_losses)
            lacking = int(np.isnan(loss_S[known.rows_S[: self.sequences] > 0]).sum())
            if lacking:
                raise InputError(
                    f"{self._reference_losses} lacks the losses of {lacking} of {self.sequences} sequences: run `stillroom "
                    "losses` again without --sample"
                )
            return known.label_logp_S[: self.sequences] + loss_S
        if not Path(name).is_file():
            raise InputError(
                f"column {name!r} is unknown: wanted {', '.join(FROM_CACHE)}, or a file of one number a sequence"
            )
        return self.file(Path(name))

    def file(self, path: Path) -> FloatS:
        """A file of one number a sequence. Raises InputError."""
        try:
            return np.asarray(self.words(path).astype(np.float64))
        except ValueError as error:
            raise InputError(
                f"{path} holds something else than numbers ({error}): wanted one number a sequence"
            ) from error

    def words(self, path: Path) -> npt.NDArray[Any]:
        """A file of one value of any kind a sequence. Raises InputError."""
        return _read(path, self._total)[: self.sequences]

    def losses(self, path: Path) -> FloatS:
        """Losses in a file that `stillroom losses` wrote; NaN where a sequence was not measured."""
        if len(self._caches) != 1:
            raise InputError(
                f"{path} holds losses on one cache, and there are {len(self._caches)}: give --cache one cache"
            )
        return load_losses(path, self._caches[0]).loss_S[: self.sequences].astype(np.float64)


def _read(path: Path, sequences: int) -> npt.NDArray[Any]:
    """One value a sequence: a .npy array, or a text file of one a line.

    Raises:
        InputError: it can not be read, or has another length.
    """
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = np.array(path.read_text(encoding="utf-8").split("\n"))
            values = values[:-1] if len(values) and not values[-1] else values
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path} can not be read ({reason}): wanted a text file or .npy with one value a sequence"
        ) from error
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "biufU":
        raise InputError(f"{path} is no one-dimensional array of numbers or words: wanted one value a sequence")
    if len(values) != sequences:
        raise InputError(f"{path} holds {len(values)} values, wanted {sequences}: one for each sequence")
    return values
