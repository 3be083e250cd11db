"""List columns to flat numpy arrays.

Shapes: `B` rows of the file, `M` lists, `E` elements.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.storage.errors import InputError

INTS: Final = pa.large_list(pa.int64())
INTS2: Final = pa.large_list(INTS)
FLOATS: Final = pa.large_list(pa.float64())
FLOATS2: Final = pa.large_list(FLOATS)
BYTES2: Final = pa.large_list(pa.large_list(pa.uint8()))

Array = npt.NDArray[Any]
IntB = npt.NDArray[np.int64]


def lists(column: pa.Array, name: str, where: str, *, first: int, empty: bool = False) -> tuple[IntB, pa.Array]:
    """Lengths of the lists of a column, and their elements back to back.

    Args:
        column: a large_list.
        name, where: of the column and its file, for complaints.
        first: number of its first row.
        empty: whether a null stands for an empty list; else it is refused.

    Raises:
        InputError: a null where there must be a list.
    """
    if column.null_count and not empty:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(
            f"{where}: sequence {first + row}: its `{name}` is null, wanted a list: leave the sequence out"
        )
    lengths: IntB = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, column.flatten()


def numbers(elements: pa.Array, name: str, where: str) -> Array:
    """Elements as numpy.

    Raises:
        InputError: one of them is null.
    """
    if elements.null_count:
        raise InputError(f"{where}: `{name}` holds a null among its numbers: leave the entry out")
    found: Array = elements.to_numpy(zero_copy_only=False)
    return found


def same(left: IntB, right: IntB, names: str, where: str, *, lists_B: IntB, first: int) -> None:
    """Refuse lists that belong together and differ in length.

    Args:
        left, right: `[M]` lengths.
        names: of the two columns.
        where: their file.
        lists_B: how many of the lists each sequence has.
        first: number of the first sequence.

    Raises:
        InputError: naming sequence and position of the first such list.
    """
    if len(left) != len(right) or np.any(left != right):
        bad = int(np.argmax(left != right)) if len(left) == len(right) else min(len(left), len(right))
        stop_B = np.cumsum(lists_B)
        number = int(np.searchsorted(stop_B, bad, side="right"))
        position = bad - int(stop_B[number] - lists_B[number]) if number < len(lists_B) else 0
        came = f"{left[bad]} and {right[bad]}" if len(left) == len(right) else "another number of"
        raise InputError(
            f"{where}: sequence {first + number}, list {position}: {names} came with {came} entries, wanted as many of one as "
            "of the other"
        )


def as_many(left_B: IntB, right_B: IntB, names: str, where: str, *, first: int) -> None:
    """Refuse sequences that have another number of lists in one column than in the other.

    Raises:
        InputError: naming the first such sequence.
    """
    if np.any(left_B != right_B):
        bad = int(np.argmax(left_B != right_B))
        raise InputError(
            f"{where}: sequence {first + bad}: {names} came with {left_B[bad]} and {right_B[bad]} lists, wanted one for one"
        )
