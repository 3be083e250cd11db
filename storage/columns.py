"""Columns of a cache: one number for each sequence, from its rows, from another model's losses, or from a file.

Shapes: `S` sequences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.losses import load_losses
from stillroom.storage.rows import RowStatistics, row_statistics

FROM_CACHE: Final = ("label_logp", "entropy", "difference")
FloatS = npt.NDArray[np.float64]


@final
class Figures:
    """Columns of the sequences to choose from, computed when asked for.

    Args:
        source: an open cache, or how many sequences a source without one has.
        sequences: take the first so many only; None: all.
        reference_losses: file of a reference model's losses.

    Attributes:
        sequences: how many there are to choose from.
        known: statistics of the cache's rows, once they were asked for; of all its sequences.
    """

    def __init__(self, source: Cache | int, sequences: int | None, reference_losses: Path | None) -> None:
        self._cache = None if isinstance(source, int) else source
        self._total = source if isinstance(source, int) else len(source)
        self.sequences = self._total if sequences is None else min(self._total, sequences)
        self._reference_losses = reference_losses
        self.known: RowStatistics | None = None

    def rows(self, what: str) -> RowStatistics:
        """Statistics of the cache's rows, for `what`.

        Raises:
            InputError: there is no cache.
        """
        if self._cache is None:
            raise InputError(f"{what} is made from a cache's figures, and there is none: give --cache")
        if self.known is None:
            self.known = row_statistics(self._cache)
        return self.known

    def column(self, name: str) -> FloatS:
        """A column by its name, or from the file of that name; NaN where a sequence has no value.

        Raises:
            InputError: unknown, or a file that does not fit.
        """
        if name in FROM_CACHE:
            known = self.rows(name)
            if name != "difference":
                return np.asarray(getattr(known, f"{name}_S")[: self.sequences], np.float64)
            assert self._reference_losses is not None
            loss_S = self.losses(self._reference_losses)
            lacking = int(np.isnan(loss_S[known.rows_S[: self.sequences] > 0]).sum())
            if lacking:
                raise InputError(
                    f"{self._reference_losses} lacks the losses of {lacking} of {self.sequences} sequences: run `stillroom "
                    "losses` again without --sample"
                )
            return np.asarray(known.label_logp_S[: self.sequences] + loss_S)
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
        self.rows("what losses are compared with")
        assert self._cache is not None
        return load_losses(path, self._cache).loss_S[: self.sequences].astype(np.float64)


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
