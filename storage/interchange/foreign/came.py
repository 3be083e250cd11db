"""What a reader of a foreign format gives, and the rules it is held to.

Shapes: `B` sequences, `T` tokens of all of them, `M` lists of entries, `E` entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from stillroom.storage.errors import InputError

Alignment = Literal["next-token", "this-token"]
ALIGNMENTS: Final[tuple[Alignment, ...]] = ("next-token", "this-token")

IntB = npt.NDArray[np.int64]
FloatE = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Came:
    """Sequences as a foreign file has them: token ids, and lists of entries that are not yet rows.

    Attributes:
        file: where they are from, for complaints.
        first: number of the first sequence, counted from 0 over all files.
        tokens_T: token ids, sequence after sequence.
        tokens_B: how many each sequence has.
        lists_B: lists of entries each sequence has.
        n_M: entries of each list; 0 where there is no target.
        ids_E: token ids.
        logp_E: log-probabilities, nats; -inf where the probability is 0.
    """

    file: str
    first: int
    tokens_T: IntB
    tokens_B: IntB
    lists_B: IntB
    n_M: IntB
    ids_E: IntB
    logp_E: FloatE

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.tokens_B)

    def part(self, start: int, stop: int) -> Came:
        """Sequences `start:stop` of these, as views."""
        token, listed = ends(self.tokens_B), ends(self.lists_B)
        entry = ends(self.n_M)
        low, high = int(listed[start]), int(listed[stop])
        entries = slice(int(entry[low]), int(entry[high]))
        return Came(
            self.file,
            self.first + start,
            self.tokens_T[int(token[start]) : int(token[stop])],
            self.tokens_B[start:stop],
            self.lists_B[start:stop],
            self.n_M[low:high],
            self.ids_E[entries],
            self.logp_E[entries],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the lists of a foreign file are taken to mean, and what they are held to.

    Attributes:
        alignment: `next-token`: list t is the distribution of what follows token t; `this-token`: of token t itself, from the
            tokens before it, as `prompt_logprobs` of a serving engine has it.
        vocab_size: every id of a list is below it.
        token_ids: every token id is below it.
        mass_tolerance: by how much the probabilities of a list may exceed 1 in sum; such a list is scaled to 1.
    """

    alignment: Alignment
    vocab_size: int
    token_ids: int
    mass_tolerance: float

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise InputError(f"alignment {self.alignment!r} is unknown: choose one of {', '.join(ALIGNMENTS)}")
        if not 0.0 <= self.mass_tolerance <= 0.5:
            raise InputError(f"mass_tolerance came as {self.mass_tolerance}, wanted 0 to 0.5: change it")


def ends(many: npt.NDArray[Any]) -> IntB:
    """`[0, many[0], many[0] + many[1], ...]`: where runs of so many elements begin and end."""
    found = np.zeros(len(many) + 1, np.int64)
    np.cumsum(many, out=found[1:])
    return found


def masked(n_M: IntB, ids_E: IntB, logp_E: FloatE, kept_M: npt.NDArray[np.bool_]) -> tuple[IntB, IntB, FloatE]:
    """The lists with those that are not kept emptied."""
    kept_E = np.repeat(kept_M, n_M)
    return np.where(kept_M, n_M, 0), ids_E[kept_E], logp_E[kept_E]
