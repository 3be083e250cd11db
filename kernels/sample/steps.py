"""The sampler in steps that any cut of the vocabulary can take together; one process with all of it is a cut too.

What the slices of a row must agree on are whole numbers (sums of weights, ids, bits of logits), so every cut gives the
same bits, and they are those of `reference.py`. On a GPU nothing here waits for the device but one reading: the number
of entries, with all that can be wrong in the values (`_read`).

Shapes: `R` slices, `N` rows, `M` most entries of a row and a kind, `C` columns of candidates, `E` entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.kernels.sample.checks import COUNTS, RANGES, Request, bad_row, check_ranges, ranges
from stillroom.kernels.sample.draw import Picked, floor_of_share
from stillroom.kernels.sample.finish import Rows, finish, in_order, join
from stillroom.kernels.sample.ranks import Ranks
from stillroom.kernels.sample.shares import ID_BITS, LAST_ID, Points, Share, logits_at
from stillroom.kernels.sample.weights import whole
from stillroom.kernels.targets import SparseTargets


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Entries of rows in a rectangle, the first `entries_N` of each: ids, and what their kind's weight is made of.

    `value_NC` is the weight of an entry, its count, or None where only the logit tells it; columns from `exact_N` on are
    sampled ones of `share_N` each.
    """

    entries_N: Tensor
    id_NC: Tensor
    value_NC: Tensor | None = None
    exact_N: Tensor | None = None
    share_N: Tensor | None = None


def sample(share: Share, request: Request, ranks: Ranks, vocabulary: int) -> SparseTargets:
    """`stillroom.kernels.sample.sample` of rows whose slices `ranks` hold; `share` is the slice here."""
    device, rows = share.logits_NV.device, len(request.labels_N)
    if not rows:
        return join([], device)
    top_N = ranks.maximum(share.maxima())
    top_N = top_N.masked_fill(~top_N.isfinite(), torch.inf)  # refused at the end; weighs nothing until then
    mass_N, moment_N = share.weigh(top_N, 1.0)
    parts_R2N = ranks.gather(torch.stack((mass_N, moment_N)))
    total_N, moment_N = parts_R2N.sum(0)
    base = Rows(top_N, total_N, moment_N)
    if request.exponent != 1.0:
        mass_N, _ = share.weigh(top_N, request.exponent)
        parts_R2N = ranks.gather(torch.stack((mass_N, moment_N)))
        total_N = parts_R2N[:, 0].sum(0)
    if request.kind == "threshold":
        candidates = _threshold(share, request, ranks, total_N)
    elif request.kind in COUNTS:
        candidates = _counts(share, request, ranks, total_N, mass_N, parts_R2N[: ranks.rank, 0].sum(0))
    else:
        candidates = _largest(share, request, ranks, total_N, vocabulary)
    entries = _read(candidates.entries_N, top_N, request, share, ranks, vocabulary)

    offset_N = candidates.entries_N.cumsum(0) - candidates.entries_N
    row_N = torch.arange(rows, device=device)
    row_E = torch.repeat_interleave(row_N, candidates.entries_N, output_size=entries)
    column_E = torch.arange(entries, device=device) - offset_N[row_E]
    id_E = candidates.id_NC[row_E, column_E]
    bits = ranks.total(
        logits_at(share, torch.cat((row_E, row_N)), torch.cat((id_E, request.labels_N.clamp_min(0))))
    ).to(torch.int32)
    logits_E, label_logits_N = bits.view(torch.float32)[:entries], bits.view(torch.float32)[entries:]
    weight_E, sampled_E = _weights(candidates, request, row_E, column_E, logits_E, top_N, total_N)
    picked, order_E = in_order(Picked(row_E, id_E, weight_E, sampled_E), (vocabulary - 1).bit_length(), rows)
    row_E, logits_E = picked.row_E, logits_E[order_E]
    proposal_E = None
    if request.exponent != 1.0:
        proposal_E = whole(logits_E, top_N[row_E], request.exponent).double() / total_N[row_E].double()
    edge = request.draws if request.kind == "threshold" else None
    return finish(picked, logits_E, proposal_E, base, request.labels_N, label_logits_N, edge)


def _threshold(share: Share, request: Request, ranks: Ranks, total_N: Tensor) -> _Candidates:
    draws = request.draws
    least_N = ((total_N + draws - 1) // draws).clamp_min(1)  # w*N >= W, for whole w
    head_NM, count_N, mass_N = share.heads(least_N, draws)
    parts_R2N = ranks.gather(torch.stack((count_N, mass_N)))
    before_2N = parts_R2N[: ranks.rank].sum(0)
    heads_N, tail_N = parts_R2N.sum(0)
    many_N = torch.where(tail_N > 0, floor_of_share(draws, tail_N, total_N.clamp_min(1)).clamp_min(1), 0)
    points = Points(request, True, tail_N, many_N, before_2N[1], mass_N, least_N)
    tail_NM = share.locate(points)
    step_M = torch.arange(draws, device=total_N.device)
    if ranks.size > 1:  # everybody's heads, one after another
        column_NM = (step_M + before_2N[0].unsqueeze(1)).clamp_max(draws - 1)
        head_NM = torch.zeros_like(tail_NM).scatter_add_(1, column_NM, head_NM * (step_M < count_N.unsqueeze(1)))
    head_NM, tail_NM = ranks.total(torch.stack((head_NM, tail_NM)))
    entries_N = heads_N + many_N
    # an id of the head has 1/N at least, so there are at most N of them and floor(N * tail) or 1 of the tail: N + 1
    step_C = torch.arange(draws + 1, device=total_N.device)
    tail_NC = (step_C - heads_N.unsqueeze(1)).clamp(0, draws - 1)
    id_NC = torch.where(
        step_C < heads_N.unsqueeze(1), head_NM[:, step_C.clamp_max(draws - 1)], tail_NM.gather(1, tail_NC)
    )
    tail_weight_N = tail_N.double() / total_N.double() / many_N.clamp_min(1)
    return _Candidates(entries_N, id_NC, exact_N=heads_N, share_N=tail_weight_N)


def _counts(
    share: Share, request: Request, ranks: Ranks, total_N: Tensor, mass_N: Tensor, start_N: Tensor
) -> _Candidates:
    many_N = torch.full_like(total_N, request.draws)
    points = Points(request, request.kind != "random", total_N, many_N, start_N, mass_N, None)
    id_NM = ranks.total(share.locate(points))
    if request.kind == "random":
        id_NM = id_NM.sort(1).values
    new_NM = torch.ones_like(id_NM)
    new_NM[:, 1:] = id_NM[:, 1:] != id_NM[:, :-1]
    place_NM = new_NM.cumsum(1) - 1
    count_NC = torch.zeros_like(id_NM).scatter_add_(1, place_NM, torch.ones_like(id_NM))
    return _Candidates(new_NM.sum(1), torch.zeros_like(id_NM).scatter_(1, place_NM, id_NM), count_NC)


def _largest(share: Share, request: Request, ranks: Ranks, total_N: Tensor, vocabulary: int) -> _Candidates:
    most = min(request.draws, vocabulary)
    key_RNM = ranks.gather(share.largest(most))
    key_NM = key_RNM.movedim(0, 1).flatten(1).topk(most, dim=1).values
    value_NM = key_NM >> ID_BITS
    wanted_N = torch.minimum((total_N.double() * request.top_p).ceil().to(torch.int64), total_N)
    before_NM = value_NM.cumsum(1) - value_NM
    kept_NM = (before_NM < wanted_N.unsqueeze(1)) & (value_NM > 0)  # the first so many: weights descend
    return _Candidates(kept_NM.sum(1), LAST_ID - (key_NM & LAST_ID), value_NM)


def _weights(
    candidates: _Candidates,
    request: Request,
    row_E: Tensor,
    column_E: Tensor,
    logits_E: Tensor,
    top_N: Tensor,
    total_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weight of each entry before any importance factor, float32, and whether it was sampled beside a head."""
    total_E, exact_E = total_N[row_E].double(), torch.zeros_like(row_E)
    if candidates.exact_N is not None and candidates.share_N is not None:
        sampled_E = column_E >= candidates.exact_N[row_E]
        head_E = whole(logits_E, top_N[row_E]).double() / total_E
        return torch.where(sampled_E, candidates.share_N[row_E], head_E).float(), sampled_E.to(torch.int64)
    assert candidates.value_NC is not None
    value_E = candidates.value_NC[row_E, column_E].double()
    return (value_E / (request.draws if request.kind in COUNTS else total_E)).float(), exact_E


def _read(entries_N: Tensor, top_N: Tensor, request: Request, share: Share, ranks: Ranks, vocabulary: int) -> int:
    """Number of entries; raises what is wrong with the values. The one wait for the device."""
    rows, device = len(top_N), top_N.device
    first_bad = torch.where(top_N.isinf(), torch.arange(rows, device=device), rows).amin()
    edges = (share.start, share.start + share.logits_NV.shape[1])
    edges_2R = ranks.gather(torch.stack([torch.full((), edge, device=device) for edge in edges])).t()
    figures = torch.cat((entries_N.sum().view(1), first_bad.view(1), ranges(request), edges_2R.flatten())).tolist()
    entries, bad, *values = figures
    starts, stops = values[RANGES : RANGES + ranks.size], values[RANGES + ranks.size :]
    if [0, *stops] != [*starts, vocabulary]:
        raise ValueError(
            f"`vocab_start` gives the processes slices from {starts} to {stops}, wanted them to follow each other from 0 to "
            f"{vocabulary} in the order of the ranks: check every process's slice"
        )
    check_ranges(values[:RANGES], vocabulary)
    if bad < rows:
        raise bad_row(bad)
    return int(entries)
