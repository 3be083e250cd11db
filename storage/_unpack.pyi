from typing import Any

from numpy.typing import NDArray

_Codes = NDArray[Any] | bytes

def counts(
    draws: int,
    vocab: int,
    planes: int,
    first: int,
    n: _Codes,
    id_lo: _Codes,
    id_hi: _Codes,
    count: _Codes,
    weight_of_count: NDArray[Any],
    offsets: NDArray[Any],
    ids: NDArray[Any],
    weights: NDArray[Any],
    /,
) -> int: ...
def threshold(
    draws: int,
    vocab: int,
    planes: int,
    first: int,
    n: _Codes,
    id_lo: _Codes,
    id_hi: _Codes,
    n_head: _Codes,
    logp_head: _Codes,
    logp_tail: _Codes,
    tail: _Codes,
    head_units: NDArray[Any],
    tail_units: NDArray[Any],
    logp_of_code: NDArray[Any],
    offsets: NDArray[Any],
    ids: NDArray[Any],
    weights: NDArray[Any],
    logp: NDArray[Any],
    /,
) -> int: ...
def plain(
    draws: int,
    vocab: int,
    first: int,
    n: _Codes,
    id: _Codes,
    weight: _Codes,
    offsets: NDArray[Any],
    ids: NDArray[Any],
    weights: NDArray[Any],
    /,
) -> int: ...
