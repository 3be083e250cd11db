"""Lists of a foreign file to rows of ours: aligned, checked, scaled where rounding took them above 1.

Shapes: `B` sequences, `T` tokens, `M` lists, `R` rows (one fewer than tokens, of each sequence), `E` entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.errors import InputError
from stillroom.storage.interchange.foreign.came import Came, FloatE, IntB, Rules, ends
from stillroom.storage.spec import MAX_DRAWS
from stillroom.storage.targets import SparseTargets

ROUNDED: Final = 1e-6  # a sum this far above 1 is float32's own
LEAST_LOGP: Final = -103.0  # below it float32 has 0 for the probability
SHIFTS: Final = (-1, 0, 1)

IntE = npt.NDArray[np.int64]
BoolM = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Found:
    """What was seen on the way, over all sequences.

    Attributes:
        sequences, tokens: how many.
        rows: of all sequences; targets: those with entries; entries: of them.
        longest: rows of the longest sequence; most: entries of the longest list.
        mass: sum over targets of the probability they hold, before scaling; most_mass: the highest.
        scaled: targets that held more than 1.
        zeros: entries of probability 0, which are left out.
        labelled: targets that hold their label.
        last: lists that predict what follows the last token, which has no label here.
        hits: by shift of `SHIFTS`: targets that hold the token so far from their label; asked: those that have one there.
    """

    sequences: int = 0
    tokens: int = 0
    rows: int = 0
    targets: int = 0
    entries: int = 0
    longest: int = 0
    most: int = 0
    mass: float = 0.0
    most_mass: float = 0.0
    scaled: int = 0
    zeros: int = 0
    labelled: int = 0
    last: int = 0
    hits: list[int] = field(default_factory=lambda: [0] * len(SHIFTS))
    asked: list[int] = field(default_factory=lambda: [0] * len(SHIFTS))

    def hit_rate(self, shift: int) -> float:
        """Share of targets that hold the token `shift` places from their label; NaN where there are none."""
        place = SHIFTS.index(shift)
        return self.hits[place] / self.asked[place] if self.asked[place] else math.nan


def settle(came: Came, rules: Rules, found: Found) -> SparseTargets:
    """Rows of the sequences, back to back, each sequence one fewer than its tokens; what is seen is added to `found`.

    Entropies are unknown, and so is the log-probability of a label that is not among its row's entries: NaN.

    Raises:
        InputError: a length, id or value that such a file can not have, with its sequence and position.
    """
    _check_tokens(came, rules)
    row_M = _rows_of_lists(came, rules, found)
    _check_entries(came, rules)
    kept_E = np.repeat(row_M >= 0, came.n_M) & (came.logp_E >= LEAST_LOGP)
    row_E = np.repeat(row_M, came.n_M)[kept_E]
    ids_E, logp_E = came.ids_E[kept_E], came.logp_E[kept_E]
    rows = int((came.tokens_B - 1).sum())
    mass_R = np.bincount(row_E, np.exp(logp_E), rows).astype(np.float64)
    _check_mass(came, rules, row_M, mass_R)
    n_R = np.bincount(row_E, minlength=rows)
    found.zeros += int((came.logp_E < LEAST_LOGP).sum())
    found.mass += float(mass_R.sum())
    found.most_mass = max(found.most_mass, float(mass_R.max(initial=0.0)))
    found.scaled += int((mass_R > 1 + ROUNDED).sum())
    logp_E = np.minimum(logp_E - np.log(np.maximum(mass_R, 1.0))[row_E], 0.0)
    label_logp_R = _labels(came, row_E, ids_E, logp_E, n_R, found)
    found.sequences += came.sequences
    found.tokens += len(came.tokens_T)
    found.rows += rows
    found.targets += int((n_R > 0).sum())
    found.entries += len(ids_E)
    found.longest = max(found.longest, int(came.tokens_B.max(initial=1)) - 1)
    found.most = max(found.most, int(n_R.max(initial=0)))
    return SparseTargets(
        offsets=ends(n_R),
        ids=ids_E.astype(np.int32),
        weights=np.exp(logp_E).astype(np.float32),
        label_logp=label_logp_R,
        entropy=np.full(rows, np.nan, np.float32),
        logp=logp_E.astype(np.float32),
    )


def _check_tokens(came: Came, rules: Rules) -> None:
    if np.any(short_B := came.tokens_B < 2):
        bad = int(np.argmax(short_B))
        raise InputError(
            f"{came.file}: sequence {came.first + bad}: has {came.tokens_B[bad]} tokens, wanted 2 or more, one to read and one "
            "to predict: leave it out"
        )
    wrong_T = (came.tokens_T < 0) | (came.tokens_T >= rules.token_ids)
    if wrong_T.any():
        bad = int(np.argmax(wrong_T))
        number = int(np.searchsorted(np.cumsum(came.tokens_B), bad, side="right"))
        position = bad - int(ends(came.tokens_B)[number])
        raise InputError(
            f"{came.file}: sequence {came.first + number}, position {position}: token id {came.tokens_T[bad]} came, wanted 0 to "
            f"{rules.token_ids - 1}: give the tokenizer the ids are of, or --vocab-size"
        )


def _rows_of_lists(came: Came, rules: Rules, found: Found) -> IntB:
    """`[M]`: the row each list is the target of, or -1 where it is none's."""
    short_B = came.tokens_B - came.lists_B
    fits_B = (short_B == 0) | ((short_B == 1) & (rules.alignment == "next-token"))
    if not fits_B.all():
        bad = int(np.argmin(fits_B))
        tokens = came.tokens_B[bad]
        wanted = (
            f"{tokens - 1} or {tokens}" if rules.alignment == "next-token" else f"{tokens}, the first of them empty"
        )
        raise InputError(
            f"{came.file}: sequence {came.first + bad}: {came.lists_B[bad]} lists came for {tokens} tokens, wanted {wanted} with "
            f"--alignment {rules.alignment}: name the other alignment, or mend the data"
        )
    stop_B = ends(came.lists_B)
    place_M = np.arange(len(came.n_M)) - np.repeat(stop_B[:-1], came.lists_B)
    if rules.alignment == "this-token":
        place_M -= 1
        if np.any(full_M := (place_M < 0) & (came.n_M > 0)):
            raise InputError(
                f"{_where(came, int(np.argmax(full_M)))}: predicts the first token, of which nothing tells: with --alignment "
                "this-token the first list is empty; is it next-token?"
            )
    rows_B = came.tokens_B - 1
    beyond_M = place_M >= np.repeat(rows_B, came.lists_B)
    found.last += int((beyond_M & (came.n_M > 0)).sum())
    return np.where((place_M < 0) | beyond_M, -1, place_M + np.repeat(ends(rows_B)[:-1], came.lists_B))


def _check_entries(came: Came, rules: Rules) -> None:
    highest = math.log1p(rules.mass_tolerance) + ROUNDED
    if np.any(came.n_M > MAX_DRAWS):
        bad = int(np.argmax(came.n_M > MAX_DRAWS))
        raise InputError(f"{_where(came, bad)}: has {came.n_M[bad]} entries, wanted at most {MAX_DRAWS}: keep fewer")
    for wrong_E, values, what in (
        (
            (came.ids_E < 0) | (came.ids_E >= rules.vocab_size),
            came.ids_E,
            f"id {{}} came, wanted 0 to {rules.vocab_size - 1}: give the teacher's --vocab-size, or mend the data",
        ),
        (
            np.isnan(came.logp_E) | (came.logp_E == math.inf),
            came.logp_E,
            "a value is NaN, infinite or a negative probability, wanted what --values says: leave the list empty",
        ),
        (
            came.logp_E > highest,
            came.logp_E,
            "a log-probability of {:.4g} came, wanted at most 0: say with --values what the values are",
        ),
    ):
        if wrong_E.any():
            bad = int(np.argmax(wrong_E))
            place = int(np.searchsorted(np.cumsum(came.n_M), bad, side="right"))
            raise InputError(f"{_where(came, place)}: {what.format(values[bad])}")
    key_E = (np.repeat(np.arange(len(came.n_M)), came.n_M) << 24) | came.ids_E
    order_E = np.argsort(key_E, kind="stable")
    twice_E = np.flatnonzero(np.diff(key_E[order_E]) == 0)
    if twice_E.size:
        bad = int(order_E[twice_E].min())
        place = int(np.searchsorted(np.cumsum(came.n_M), bad, side="right"))
        raise InputError(
            f"{_where(came, place)}: id {came.ids_E[bad]} comes twice, wanted unique ids: merge them first"
        )


def _check_mass(came: Came, rules: Rules, row_M: IntB, mass_R: FloatE) -> None:
    over_R = mass_R > 1 + rules.mass_tolerance + ROUNDED
    if over_R.any():
        row = int(np.argmax(over_R))
        place = int(np.flatnonzero(row_M == row)[0])
        raise InputError(
            f"{_where(came, place)}: its probabilities sum to {mass_R[row]:.4f}, wanted at most 1 and --mass-tolerance "
            f"{rules.mass_tolerance}: say with --values what the values are, or raise the tolerance if they were rounded"
        )


def _labels(came: Came, row_E: IntE, ids_E: IntE, logp_E: FloatE, n_R: IntB, found: Found) -> npt.NDArray[np.float32]:
    """Log-probabilities of the labels that are among the entries, and how often a shift would find them."""
    rows_B = came.tokens_B - 1
    start_R = np.repeat(ends(came.tokens_B)[:-1], rows_B)
    stop_R = start_R + np.repeat(came.tokens_B, rows_B)
    token_R = start_R + np.arange(len(n_R)) - np.repeat(ends(rows_B)[:-1], rows_B) + 1  # where the label stands
    label_logp_R = np.full(len(n_R), np.nan, np.float32)
    for place, shift in enumerate(SHIFTS):
        inside_R = (token_R + shift >= start_R) & (token_R + shift < stop_R) & (n_R > 0)
        wanted_R = came.tokens_T[np.where(inside_R, token_R + shift, 0)]
        hit_E = (ids_E == wanted_R[row_E]) & inside_R[row_E]
        found.hits[place] += int(hit_E.sum())
        found.asked[place] += int(inside_R.sum())
        if shift == 0:
            label_logp_R[row_E[hit_E]] = logp_E[hit_E]
            found.labelled += int(hit_E.sum())
    return label_logp_R


def _where(came: Came, listed: int) -> str:
    """File, sequence and position of a list."""
    number = int(np.searchsorted(np.cumsum(came.lists_B), listed, side="right"))
    position = listed - int(ends(came.lists_B)[number])
    return f"{came.file}: sequence {came.first + number}, list {position}"
