from typing import Any

from numpy.typing import NDArray

_Array = NDArray[Any]

def sample(
    widest: int,
    kind: int,
    draws: int,
    vocab: int,
    half: bool,
    seed: int,
    logits: _Array,
    labels: _Array,
    sequences: _Array,
    rows: _Array,
    row_of_entry: _Array,
    id_of_entry: _Array,
    weight_of_entry: _Array,
    logit_of_entry: _Array,
    sampled: _Array,
    top: _Array,
    label_logit: _Array,
    total: _Array,
    moment: _Array,
    /,
) -> int: ...
