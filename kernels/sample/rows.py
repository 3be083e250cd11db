"""The samplers of stage one on a CPU, by the compiled loops of `rows.c`: one row after another, each while it lies in the cache.

The definition is `reference.py`, in PyTorch, which also does what this does not take: `top_k` and `top_p`, an exponent,
rows that do not lie back to back, and everything where there was no compiler. Targets are the same bits either way:
`tests/kernels/test_sample_rows.py` holds the two against each other. Logarithms are PyTorch's in both (`finish.py`).

Shapes: `N` rows, `V` vocabulary, `M` most entries of a row, `E` entries.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from stillroom.kernels.sample.checks import Request, bad_row, check_ranges, ranges
from stillroom.kernels.sample.draw import Picked
from stillroom.kernels.sample.finish import Rows, finish, join
from stillroom.kernels.targets import SparseTargets

try:
    from stillroom.kernels.sample import _rows
except ImportError:  # no compiler when it was installed: PyTorch does the work
    _HELPER: Any = None
else:
    _HELPER = _rows

COMPILED: Final = _HELPER is not None
KINDS: Final = ("threshold", "systematic", "stratified", "random")  # in the order of `rows.c`
WIDEST: Final = 3  # vectors, the bits are the same: 0 what every processor has; on x86-64 1 SSE4.1, 2 AVX2, 3 AVX-512
MAX_ENTRIES: Final = 1 << 21  # there is room for at a time, 44 MB
THREAD_LOGITS: Final = 1 << 19  # 0.4 ms of work: fewer do not pay for a thread
ENTRY_DTYPES: Final = (torch.int64, torch.int32, torch.float32, torch.float32, torch.uint8)
ROW_DTYPES: Final = (torch.float32, torch.float32, torch.int64, torch.int64)
NO_ROOM, FIRST_BAD = -1, -2  # answers of `rows.c`: buffers that do not fit; -2 - n where row n can not be sampled


def takes(logits_NV: Tensor, request: Request) -> bool:
    """Whether these rows can be sampled here; `reference.sample` takes all others."""
    return (
        _HELPER is not None
        and logits_NV.device.type == "cpu"
        and logits_NV.is_contiguous()
        and request.kind in KINDS
        and request.exponent == 1.0
    )


def sample(logits_NV: Tensor, request: Request) -> SparseTargets:
    """`reference.sample` of what `takes` says yes to."""
    rows, vocabulary = logits_NV.shape
    if rows:
        check_ranges(ranges(request).tolist(), vocabulary)
    most = min(request.draws + 1, vocabulary)  # entries of a row: `draws` heads, and one that is drawn all the same
    step = max(1, MAX_ENTRIES // most)
    return join(
        [_some(logits_NV, request, most, n, min(rows, n + step)) for n in range(0, rows, step)], logits_NV.device
    )


def _some(logits_NV: Tensor, request: Request, most: int, start: int, stop: int) -> SparseTargets:
    """Targets of rows `start` to `stop`, dealt out among the threads that PyTorch may use."""
    rows, vocabulary = stop - start, logits_NV.shape[1]
    threads = max(1, min(torch.get_num_threads(), rows, rows * vocabulary // THREAD_LOGITS))
    edges = [rows * k // threads for k in range(threads + 1)]
    whole = (logits_NV, request.labels_N, request.sequence_N, request.row_N)
    inputs = [column.detach()[start:stop].contiguous() for column in whole]
    inputs[0] = inputs[0].view(torch.int16) if logits_NV.dtype == torch.bfloat16 else inputs[0]  # numpy has no bfloat16
    columns = [torch.empty(rows * most, dtype=dtype, device=logits_NV.device) for dtype in ENTRY_DTYPES]
    sums = [torch.empty(rows, dtype=dtype, device=logits_NV.device) for dtype in ROW_DTYPES]
    options = (KINDS.index(request.kind), request.draws, vocabulary, logits_NV.dtype == torch.bfloat16, request.seed)

    def run(first: int, last: int) -> int:
        of_entries = [column[first * most : last * most].numpy() for column in columns]
        by_row = [column[first:last].numpy() for column in (*inputs, *sums)]
        return int(_HELPER.sample(WIDEST, *options, *by_row[: len(inputs)], *of_entries, *by_row[len(inputs) :]))

    with ThreadPoolExecutor(threads) as pool:  # threads start with their work and end here: nothing is left for a fork
        others = [pool.submit(run, first, last) for first, last in pairwise(edges[1:])]
        found = [run(*edges[:2]), *(other.result() for other in others)]
    if min(found) < 0:
        first, answer = next((first, answer) for first, answer in zip(edges, found) if answer < 0)
        assert answer != NO_ROOM
        raise bad_row(start + first + FIRST_BAD - answer)
    for first, entries in zip(edges, found):
        columns[0][first * most : first * most + entries] += first  # rows were counted from the first of the thread
    row_E, id_E, weight_E, logits_E, sampled_E = (
        torch.cat([column[first * most : first * most + entries] for first, entries in zip(edges, found)])
        for column in columns
    )
    top_N, label_logits_N, total_N, moment_N = sums
    picked, edge = Picked(row_E, id_E, weight_E, sampled_E), request.draws if request.kind == "threshold" else None
    base = Rows(top_N, total_N, moment_N)
    return finish(picked, logits_E, None, base, request.labels_N[start:stop], label_logits_N, edge)
