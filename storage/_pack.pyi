from typing import Any

from numpy.typing import NDArray

_Array = NDArray[Any]

def counts(
    draws: int,
    vocab: int,
    offsets: _Array,
    ids: _Array,
    weights: _Array,
    count: _Array,
    id_codes: _Array,
    heads: _Array,
    /,
) -> int: ...
def threshold(
    draws: int,
    vocab: int,
    pivot_logp: float,
    offsets: _Array,
    ids: _Array,
    weights: _Array,
    logp: _Array,
    rounding: _Array,
    levels: _Array,
    tail_units: _Array,
    id_codes: _Array,
    n_head: _Array,
    tail: _Array,
    logp_head: _Array,
    logp_of_tail: _Array,
    /,
) -> int: ...
def round(
    offsets: _Array,
    values: _Array,
    levels: _Array,
    rounding: _Array,
    column: int,
    columns: int,
    base: int,
    codes: _Array,
    /,
) -> int: ...
def planes(id_codes: _Array, planes: int, high: _Array, /) -> int: ...
