"""Samplers in plain PyTorch: teacher logits to sparse, unbiased targets. No Triton. On a CPU this runs where `rows.py` does not.

`weights.py` turns logits into whole numbers, `draw.py` picks entries from them, `finish.py` makes targets of those; this
file goes through the rows.

Shapes: `N` rows, `V` vocabulary, `G` rows of a group.
"""

from __future__ import annotations

from torch import Tensor

from stillroom.kernels.sample import draw
from stillroom.kernels.sample.checks import COUNTS, Request, bad_row, check_ranges, ranges
from stillroom.kernels.sample.finish import Rows, finish, in_order, join
from stillroom.kernels.sample.philox import STREAM_DRAWS, random_words
from stillroom.kernels.sample.weights import Weigher
from stillroom.kernels.targets import SparseTargets


def sample(logits_NV: Tensor, request: Request) -> SparseTargets:
    """`stillroom.kernels.sample.sample` for arguments that `check_arguments` passed."""
    rows, vocabulary = logits_NV.shape
    if rows:
        check_ranges(ranges(request).tolist(), vocabulary)
    kind, draws, exponent = request.kind, request.draws, request.exponent
    weigher = Weigher(rows, vocabulary, logits_NV.device)
    words_N = random_words(request.seed, request.sequence_N, request.row_N, stream=STREAM_DRAWS, count=request.words)
    parts: list[SparseTargets] = []
    for start in range(0, rows, weigher.group_rows):
        group = slice(start, start + weigher.group_rows)
        logits_GV, labels_G = logits_NV[group], request.labels_N[group]
        top_G1 = _row_maxima(logits_GV, start)
        weights = weigher(logits_GV, top_G1)
        base = Rows(top_G1.squeeze(1), weights.total_G, weights.moment_G)
        if exponent != 1.0:
            weights = weigher(logits_GV, top_G1, exponent)
        words = words_N[0][group], words_N[1][group]
        if kind == "threshold":
            picked = draw.threshold(weights, draws, words)
        elif kind in COUNTS:
            picked = draw.counts(weights, draws, words, kind)
        else:
            picked = draw.largest(weights, draws, request.top_p)
        picked, _ = in_order(picked, (weigher.padded - 1).bit_length(), len(labels_G))
        row_E, id_E, proposal_E = picked.row_E, picked.id_E, None
        if exponent != 1.0:
            proposal_E = weights.weights_GP[row_E, id_E].double() / weights.total_G[row_E].double()
        label_logits_G = logits_GV.gather(1, labels_G.clamp_min(0).unsqueeze(1)).squeeze(1)
        edge = draws if kind == "threshold" else None
        parts.append(finish(picked, logits_GV[row_E, id_E], proposal_E, base, labels_G, label_logits_G, edge))
    return join(parts, logits_NV.device)


def _row_maxima(logits_GV: Tensor, start: int) -> Tensor:
    top_G1 = logits_GV.amax(1, keepdim=True).float()
    if not bool(top_G1.isfinite().all()):
        raise bad_row(start + int(top_G1.squeeze(1).isfinite().logical_not().nonzero()[0]))
    return top_G1
