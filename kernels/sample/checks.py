"""What `sample` is asked, and what it refuses.

Shapes and types are looked at before anything runs. What lies in the tensors (labels, indices) is asked in two steps, so
that a GPU is not waited for: `ranges` leaves smallest and largest values on the device, `check_ranges` judges them once they
are on the host together with whatever else was read.

Shapes: `N` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from stillroom.kernels.sample.philox import KEYS, check_key, check_range
from stillroom.kernels.sample.weights import MAX_VOCABULARY

KINDS: Final = ("threshold", "random", "systematic", "stratified", "top_k", "top_p")
COUNTS: Final = ("random", "systematic", "stratified")  # kinds whose weights are count/N
OWN_WORDS: Final = ("random", "stratified")  # kinds with a random number for each draw; the others use one a row
MAX_DRAWS: Final = 4096
IGNORE_LABEL: Final = -100
RANGES: Final = 6  # figures of `ranges`
_FAR: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Request:
    """Arguments of one call but the logits; `sample` describes them."""

    labels_N: Tensor
    sequence_N: Tensor
    row_N: Tensor
    kind: str
    draws: int
    seed: int
    exponent: float = 1.0
    top_p: float = 1.0

    @property
    def words(self) -> int:
        """Random numbers a row uses."""
        return self.draws if self.kind in OWN_WORDS else 1


def check_arguments(logits_NV: Tensor, request: Request, what: str = "vocabulary") -> None:
    """Everything that can be told without reading a tensor.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    if logits_NV.dim() != 2 or logits_NV.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"`logits_NV` came as {logits_NV.dtype}{list(logits_NV.shape)}, wanted float32 or bfloat16 [N, V]: "
            "flatten the batch and cast"
        )
    rows, vocabulary = logits_NV.shape
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"`logits_NV` has a {what} of {vocabulary}, wanted 1 to {MAX_VOCABULARY}")
    for name in ("labels_N", "sequence_N", "row_N"):
        index_N: Tensor = getattr(request, name)
        if index_N.dtype != torch.int64 or index_N.shape != (rows,) or index_N.device != logits_NV.device:
            raise ValueError(
                f"`{name}` came as {index_N.dtype}{list(index_N.shape)} on {index_N.device}, wanted int64[{rows}] "
                f"on {logits_NV.device}: one for each row of `logits_NV`"
            )
    kind, draws, exponent, top_p = request.kind, request.draws, request.exponent, request.top_p
    if kind not in KINDS:
        raise ValueError(f"`kind` came as {kind!r}: choose one of {', '.join(KINDS)}")
    if not 1 <= draws <= MAX_DRAWS:
        raise ValueError(f"`draws` came as {draws}, wanted 1 to {MAX_DRAWS}")
    if exponent != 1.0 and (kind != "random" or not 0.25 <= exponent <= 4.0):
        raise ValueError(f"`exponent` came as {exponent} with {kind!r}: only 'random' takes one, from 0.25 to 4")
    if top_p != 1.0 and (kind != "top_p" or not 0.0 < top_p <= 1.0):
        raise ValueError(f"`top_p` came as {top_p} with {kind!r}: only 'top_p' takes one, in (0, 1]")
    check_key(request.seed, 0, 1)


def ranges(request: Request) -> Tensor:
    """Smallest and largest label, sequence and row of at least one row: int64 `[6]`, on the device."""
    none_N = request.labels_N == IGNORE_LABEL
    return torch.stack((
        request.labels_N.masked_fill(none_N, _FAR).amin(),
        request.labels_N.masked_fill(none_N, -_FAR).amax(),
        *request.sequence_N.aminmax(),
        *request.row_N.aminmax(),
    ))  # fmt: skip


def check_ranges(figures: Sequence[int], vocabulary: int) -> None:
    """Judge `ranges`.

    Raises:
        ValueError: labels, sequences or rows out of range.
    """
    low, high = figures[:2]
    if low != _FAR and not 0 <= low <= high < vocabulary:
        raise ValueError(
            f"`labels_N` runs from {low} to {high}, wanted 0 to {vocabulary - 1}, "
            f"or {IGNORE_LABEL} for a row without a label"
        )
    for place, (name, bound) in enumerate(KEYS.items(), start=1):
        check_range(name, figures[2 * place], figures[2 * place + 1], bound)


def bad_row(row: int) -> ValueError:
    """The error of a row whose logits no sampler can use."""
    return ValueError(
        f"`logits_NV` row {row} holds NaN or +inf, or is -inf throughout; wanted at least one finite logit and no NaN: "
        "check the teacher's precision and the inputs of that row"
    )
