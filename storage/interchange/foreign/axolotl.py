"""axolotl's offline distillation data: what its preparation writes, or a `logprobs` column beside token ids.

Prepared: `input_ids`, `target_logprobs`, `target_token_ids`, `target_mask`, a list a token. Its preparation scales the values
of a list to sum to 1, so the mass the teacher had outside them is lost.

Raw: `logprobs` with `target_token_ids`, or lists of {token: "token_id:N", logprob} alone, for the last so many tokens of the
sequence (its preparation fills up from the left). Token ids must stand beside them: what a chat template made of the text
at the time can not be proved.

Shapes: `B` sequences, `M` lists, `E` entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.storage.errors import InputError
from stillroom.storage.interchange.foreign.came import Came, FloatE, IntB, ends, masked
from stillroom.storage.interchange.foreign.files import Columns, column_names, read_columns
from stillroom.storage.interchange.foreign.lists import FLOATS2, INTS, INTS2, as_many, lists, numbers, same

_PREPARED: Final = ("target_logprobs", "target_token_ids", "target_mask")
_IDS: Final = "target_token_ids"
_TOKEN: Final = "token_id:"
_RECORDS: Final = pa.large_list(
    pa.large_list(pa.struct([pa.field("token", pa.string()), pa.field("logprob", pa.float64())]))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axolotl:
    """How to read such data: the names of its columns of token ids and, where it is not prepared, of values."""

    tokens: str = "input_ids"
    values_column: str = "logprobs"

    def settings(self) -> dict[str, Any]:
        """What of this decides what the files mean."""
        return asdict(self)

    def read(self, files: tuple[Path, ...]) -> Iterator[Came]:
        """Sequences of the files, in order, some at a time.

        Raises:
            InputError: a file, column or length that does not fit, named.
        """
        first = 0
        for path in files:
            names = set(column_names(path))
            if self.tokens not in names:
                raise InputError(
                    f"{path.name} holds text and no token ids (no column {self.tokens!r}), and that a chat template makes the "
                    "teacher's ids of it again can not be proved: import what `axolotl preprocess` wrote, or name "
                    "--tokens-column"
                )
            wanted: dict[str, pa.DataType] = {self.tokens: INTS}
            if set(_PREPARED) <= names:
                wanted |= dict(zip(_PREPARED, (FLOATS2, INTS2, INTS2)))
            elif _IDS in names:
                wanted |= {self.values_column: FLOATS2, _IDS: INTS2}
            else:
                wanted |= {self.values_column: _RECORDS}
            for columns in read_columns(path, wanted):
                yield self._of_batch(path.name, first, columns)
                first += len(columns[self.tokens])

    def _of_batch(self, file: str, first: int, columns: Columns) -> Came:
        tokens_B, tokens = lists(columns[self.tokens], self.tokens, file, first=first)
        prepared = _PREPARED[0] in columns
        name = _PREPARED[0] if prepared else self.values_column
        lists_B, values = lists(columns[name], name, file, first=first)
        n_M, value_E = lists(values, name, file, first=0, empty=True)
        if _IDS in columns:
            ids_B, ids = lists(columns[_IDS], _IDS, file, first=first)
            as_many(lists_B, ids_B, f"{name!r} and {_IDS!r}", file, first=first)
            many_M, id_E = lists(ids, _IDS, file, first=0, empty=True)
            same(n_M, many_M, f"{name!r} and {_IDS!r}", file, lists_B=lists_B, first=first)
            ids_E, logp_E = numbers(id_E, _IDS, file), numbers(value_E, name, file)
        else:
            ids_E, logp_E = _records(value_E, name, file)
        if prepared:
            n_M, ids_E, logp_E = masked(n_M, ids_E, logp_E, _kept(columns, n_M, lists_B, file, first))
        # Its preparation puts the lists there are at the end of the sequence.
        missing_B = tokens_B - lists_B
        if np.any(missing_B < 0):
            bad = int(np.argmax(missing_B < 0))
            raise InputError(
                f"{file}: sequence {first + bad}: {lists_B[bad]} lists came for {tokens_B[bad]} tokens, wanted at most as many"
            )
        n_M = np.insert(n_M, np.repeat(ends(lists_B)[:-1], missing_B), 0)
        return Came(file, first, numbers(tokens, self.tokens, file), tokens_B, tokens_B, n_M, ids_E, logp_E)


def _kept(columns: Columns, n_M: IntB, lists_B: IntB, file: str, first: int) -> Any:
    """`[M]` bool: lists with a mask of ones; part of a list can not be masked."""
    name = _PREPARED[2]
    mask_B, mask = lists(columns[name], name, file, first=first)
    as_many(lists_B, mask_B, f"{_PREPARED[0]!r} and {name!r}", file, first=first)
    many_M, one_E = lists(mask, name, file, first=0, empty=True)
    same(n_M, many_M, f"{_PREPARED[0]!r} and {name!r}", file, lists_B=lists_B, first=first)
    stop = ends(n_M)
    one_E = ends(numbers(one_E, name, file) != 0)
    kept_M = one_E[stop[1:]] - one_E[stop[:-1]]
    if np.any((kept_M > 0) & (kept_M < n_M)):
        raise InputError(f"{file}: {name!r} masks a part of a list, wanted whole lists: such data is not known here")
    return kept_M > 0


def _records(record_E: pa.Array, name: str, file: str) -> tuple[IntB, FloatE]:
    """Ids and values of {token: "token_id:N", logprob}."""
    if record_E.null_count:
        raise InputError(f"{file}: {name!r} holds a null among its entries: leave the entry out")
    token_E, logp_E = record_E.field("token"), record_E.field("logprob")
    is_id_E = pc.starts_with(token_E.fill_null(""), _TOKEN).to_numpy(zero_copy_only=False)
    number_E = pc.utf8_slice_codeunits(token_E.fill_null(""), len(_TOKEN))
    try:
        ids = number_E.cast(pa.int64())
    except pa.ArrowInvalid:
        is_id_E = pc.match_substring_regex(number_E, "^[0-9]{1,9}$").to_numpy(zero_copy_only=False) & is_id_E
    if not is_id_E.all():
        came = token_E[int(np.argmin(is_id_E))].as_py()
        raise InputError(
            f"{file}: {name!r} names a token {came!r}, wanted `token_id:N`: a token's text does not tell its id, so ask the "
            "engine for ids when the data is made"
        )
    return numbers(ids, name, file), numbers(logp_E, name, file)
