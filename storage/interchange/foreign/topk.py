"""Plain top-k rows: token ids, and for each position a list of ids and a list of values, in columns the user names.

One row of the file is a sequence (lists of lists), or, where a column says which sequence it belongs to, one token.

Shapes: `B` sequences, `T` tokens, `M` lists, `E` entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.storage.errors import InputError
from stillroom.storage.interchange.foreign.came import Came, FloatE, IntB, ends
from stillroom.storage.interchange.foreign.files import Columns, read_columns
from stillroom.storage.interchange.foreign.lists import FLOATS, FLOATS2, INTS, INTS2, as_many, lists, numbers, same
from stillroom.storage.manifest import MAX_SEQ_LEN

Values = Literal["ln", "log2", "log10", "probability", "logit"]
_PER_NAT: Final = {"ln": 1.0, "log2": math.log(2), "log10": math.log(10)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """How to read plain top-k rows.

    Attributes:
        tokens, ids, values_column: names of the columns.
        values: what the values are; `logit` needs `normaliser`.
        normaliser: column with the log-sum-exp over the whole vocabulary, nats, of each position.
        sequence: column that names the sequence a token belongs to, where a row is one token; None: a row is a sequence.

    Raises:
        InputError: one column for two purposes, logits without a normaliser, or one without logits.
    """

    tokens: str
    ids: str
    values_column: str
    values: Values = "ln"
    normaliser: str | None = None
    sequence: str | None = None

    def __post_init__(self) -> None:
        names = [self.tokens, self.ids, self.values_column, self.normaliser, self.sequence]
        given = [name for name in names if name is not None]
        if len(set(given)) != len(given):
            raise InputError(f"the columns came as {', '.join(given)}, wanted another one for each: name them apart")
        if self.values == "logit" and self.normaliser is None:
            raise InputError(
                "logits came without their normaliser, and the top few do not tell how much of the teacher's mass they hold: "
                "name the column of log-sum-exps with --normaliser-column, or import log-probabilities"
            )
        if self.values != "logit" and self.normaliser is not None:
            raise InputError(f"normaliser_column came with values {self.values}: it is for --values logit alone")

    def settings(self) -> dict[str, Any]:
        """What of this decides what the files mean."""
        return asdict(self)

    def read(self, files: tuple[Path, ...]) -> Iterator[Came]:
        """Sequences of the files, in order, some at a time.

        Raises:
            InputError: a file, column or length that does not fit, named.
        """
        yield from self._by_token(files) if self.sequence is not None else self._by_sequence(files)

    def _by_sequence(self, files: tuple[Path, ...]) -> Iterator[Came]:
        wanted = {self.tokens: INTS, self.ids: INTS2, self.values_column: FLOATS2}
        if self.normaliser is not None:
            wanted[self.normaliser] = FLOATS
        first = 0
        for path in files:
            for columns in read_columns(path, wanted):
                yield self._of_batch(path.name, first, columns)
                first += len(columns[self.tokens])

    def _of_batch(self, file: str, first: int, columns: Columns) -> Came:
        tokens_B, tokens = lists(columns[self.tokens], self.tokens, file, first=first)
        lists_B, ids = lists(columns[self.ids], self.ids, file, first=first)
        values_B, values = lists(columns[self.values_column], self.values_column, file, first=first)
        names = f"{self.ids!r} and {self.values_column!r}"
        as_many(lists_B, values_B, names, file, first=first)
        n_M, id_E = lists(ids, self.ids, file, first=0, empty=True)
        many_M, value_E = lists(values, self.values_column, file, first=0, empty=True)
        same(n_M, many_M, names, file, lists_B=lists_B, first=first)
        normaliser_M = None
        if self.normaliser is not None:
            normal_B, normal = lists(columns[self.normaliser], self.normaliser, file, first=first)
            as_many(lists_B, normal_B, f"{self.ids!r} and {self.normaliser!r}", file, first=first)
            normaliser_M = numbers(normal.fill_null(math.nan), self.normaliser, file)
        logp_E = self._natural(numbers(value_E, self.values_column, file), n_M, normaliser_M)
        tokens_T, ids_E = numbers(tokens, self.tokens, file), numbers(id_E, self.ids, file)
        return Came(file, first, tokens_T, tokens_B, lists_B, n_M, ids_E, logp_E)

    def _by_token(self, files: tuple[Path, ...]) -> Iterator[Came]:
        """Rows of one token; a sequence may run on from a batch or file into the next."""
        assert self.sequence is not None
        wanted = {self.sequence: pa.string(), self.tokens: pa.int64(), self.ids: INTS, self.values_column: FLOATS}
        if self.normaliser is not None:
            wanted[self.normaliser] = pa.float64()
        first, held, seen = 0, None, set[str]()
        for path in files:
            for columns in read_columns(path, wanted):
                came, names = self._of_tokens(path.name, first, columns)
                goes_on = held is not None and bool(names) and held[1] == names[0]
                for name in names[goes_on:]:
                    if name in seen:
                        raise InputError(
                            f"{path.name}: sequence {name!r} comes back after another one: sort the rows by {self.sequence!r}"
                        )
                    seen.add(name)
                if held is not None:
                    came = _joined(held[0], came, as_one=goes_on)
                if not came.sequences:
                    continue
                if int(came.tokens_B[-1]) > MAX_SEQ_LEN + 1:
                    raise InputError(
                        f"{path.name}: sequence {names[-1]!r} has more than {MAX_SEQ_LEN + 1:,} tokens: cut it"
                    )
                yield came.part(0, came.sequences - 1)
                held, first = (came.part(came.sequences - 1, came.sequences), names[-1]), first + came.sequences - 1
        if held is not None:
            yield held[0]

    def _of_tokens(self, file: str, first: int, columns: Columns) -> tuple[Came, list[str]]:
        """The sequences of some rows of one token, the first and last of them perhaps in part, and their names."""
        assert self.sequence is not None
        name_T = columns[self.sequence]
        if name_T.null_count or columns[self.tokens].null_count:
            raise InputError(f"{file}: a row has no {self.sequence!r} or no {self.tokens!r}, wanted both: leave it out")
        rows = len(name_T)
        is_new_T = np.ones(rows, np.bool_)
        if rows > 1:
            is_new_T[1:] = pc.not_equal(name_T.slice(1), name_T.slice(0, rows - 1)).to_numpy(zero_copy_only=False)
        start_B = np.flatnonzero(is_new_T)
        many_B = np.diff(start_B, append=rows)
        n_M, id_E = lists(columns[self.ids], self.ids, file, first=0, empty=True)
        many_M, value_E = lists(columns[self.values_column], self.values_column, file, first=0, empty=True)
        same(n_M, many_M, f"{self.ids!r} and {self.values_column!r}", file, lists_B=many_B, first=first)
        normaliser_M = None
        if self.normaliser is not None:
            normaliser_M = numbers(columns[self.normaliser].fill_null(math.nan), self.normaliser, file)
        logp_E = self._natural(numbers(value_E, self.values_column, file), n_M, normaliser_M)
        tokens_T, ids_E = numbers(columns[self.tokens], self.tokens, file), numbers(id_E, self.ids, file)
        names: list[str] = name_T.take(pa.array(start_B)).to_pylist()
        return Came(file, first, tokens_T, many_B, many_B, n_M, ids_E, logp_E), names

    def _natural(self, value_E: FloatE, n_M: IntB, normaliser_M: FloatE | None) -> FloatE:
        """Log-probabilities in nats; what has none (a negative probability) is NaN, and refused with the NaNs."""
        if normaliser_M is not None:
            with np.errstate(invalid="ignore"):
                return value_E - np.repeat(normaliser_M, n_M)
        if self.values == "probability":
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log(value_E)
        with np.errstate(invalid="ignore"):
            return value_E * _PER_NAT[self.values]


def _joined(left: Came, right: Came, *, as_one: bool) -> Came:
    """`left`, one sequence, before `right`; with `as_one` the first of `right` is the rest of it."""
    tokens_B, lists_B = right.tokens_B, right.lists_B
    head = np.array([ends(left.tokens_B)[-1]]), np.array([ends(left.lists_B)[-1]])
    if as_one:
        head = head[0] + tokens_B[:1], head[1] + lists_B[:1]
        tokens_B, lists_B = tokens_B[1:], lists_B[1:]
    return Came(
        right.file,
        left.first,
        np.concatenate([left.tokens_T, right.tokens_T]),
        np.concatenate([head[0], tokens_B]),
        np.concatenate([head[1], lists_B]),
        np.concatenate([left.n_M, right.n_M]),
        np.concatenate([left.ids_E, right.ids_E]),
        np.concatenate([left.logp_E, right.logp_E]),
    )
