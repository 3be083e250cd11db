"""A slice of the vocabulary of every row, and what the sampler asks of it; in plain PyTorch here, in Triton in `triton.py`.

The whole vocabulary is a slice too. Ids are those of the whole vocabulary everywhere.

Shapes: `N` rows, `V` vocabulary of the slice, `P` the same padded to whole blocks, `B` blocks of a row, `I` ids of a
block, `M` most heads, draws or keys of a row, `D` draws, `E` entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from stillroom.kernels.sample.checks import Request
from stillroom.kernels.sample.draw import spread
from stillroom.kernels.sample.philox import STREAM_DRAWS, random_words, scale_to
from stillroom.kernels.sample.weights import Weigher

ID_BITS: Final = 22  # a key is a weight and the id counted down: larger weights first, among equals the lower id
LAST_ID: Final = (1 << ID_BITS) - 1


@dataclass(frozen=True, slots=True)
class Points:
    """Whole numbers in [0, total) of a row, one per draw, and the part of them that falls in a slice.

    Attributes:
        request: seed, sequence and row; whether draws have words of their own.
        spread: whether draw j is placed at (j * total + u) / many (True) or at u (False).
        total_N: sum over the whole vocabulary.
        many_N: draws of each row, at most `request.draws`.
        start_N: sum of the slices before this one.
        mass_N: sum of this slice.
        least_N: weights from here on do not count (they are the head), or None.
    """

    request: Request
    spread: bool
    total_N: Tensor
    many_N: Tensor
    start_N: Tensor
    mass_N: Tensor
    least_N: Tensor | None


class Share(Protocol):
    """A slice of the vocabulary of `N` rows."""

    logits_NV: Tensor
    start: int

    def maxima(self) -> Tensor:
        """Largest logit of each row, `[N]` float32; +inf where the row holds NaN."""
        ...

    def weigh(self, top_N: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
        """Sum of the weights of each row and its moment (see `Weights`), int64; sums of blocks are kept for the rest.

        Rows whose `top_N` is +inf weigh nothing.
        """
        ...

    def heads(self, least_N: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids that weigh at least `least_N`: `[N, M]` in any order, how many, and the sum of the others.

        The kept sums of blocks are from here on those of the others.
        """
        ...

    def locate(self, points: Points) -> Tensor:
        """Id of each point, `[N, M]`; 0 for a point that falls in another slice or is one too many."""
        ...

    def largest(self, most: int) -> Tensor:
        """The largest keys of each row, `[N, M]` int64, -1 where there are fewer."""
        ...


def logits_at(share: Share, row_E: Tensor, id_E: Tensor) -> Tensor:
    """Bits of the float32 logits of entries, int64, 0 for ids of other slices: sums of them over slices are the logits."""
    local_E = id_E - share.start
    mine_E = (local_E >= 0) & (local_E < share.logits_NV.shape[1])
    logits_E = share.logits_NV[row_E, local_E.clamp(0, share.logits_NV.shape[1] - 1)].float()
    return torch.where(mine_E, logits_E.view(torch.int32).to(torch.int64), 0)


class TorchShare:
    """A slice in plain PyTorch; keeps its weights, four bytes an id."""

    def __init__(self, logits_NV: Tensor, start: int) -> None:
        self.logits_NV, self.start = logits_NV, start

    def maxima(self) -> Tensor:
        """See `Share`."""
        top_N = self.logits_NV.amax(1).float()
        return top_N.masked_fill(top_N.isnan(), torch.inf)

    def weigh(self, top_N: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
        """See `Share`."""
        bad_N1 = top_N.isinf().unsqueeze(1)
        top_N1 = top_N.unsqueeze(1).masked_fill(bad_N1, 0.0)
        rows, vocabulary = self.logits_NV.shape
        weigher = Weigher(rows, vocabulary, self.logits_NV.device)
        weights, totals, moments = [], [], []
        for first in range(0, rows, weigher.group_rows):
            group = slice(first, first + weigher.group_rows)
            logits_GV = self.logits_NV[group].masked_fill(bad_N1[group], -torch.inf)
            part = weigher(logits_GV, top_N1[group], exponent)
            weights.append(part.weights_GP.clone())
            totals.append(part.total_G)
            moments.append(part.moment_G)
        self._weights_NP, self._mass_N = torch.cat(weights), torch.cat(totals)
        return self._mass_N, torch.cat(moments)

    def heads(self, least_N: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Share`."""
        head_NP = self._weights_NP >= least_N.unsqueeze(1)
        row_E, id_E = head_NP.nonzero(as_tuple=True)
        count_N = head_NP.sum(1)
        ids_NM = id_E.new_zeros(len(least_N), most)
        column_E = torch.arange(len(row_E), device=row_E.device) - (count_N.cumsum(0) - count_N)[row_E]
        ids_NM[row_E, column_E] = id_E + self.start
        rest_N = self._mass_N.index_add(0, row_E, self._weights_NP[row_E, id_E].to(torch.int64), alpha=-1)
        self._weights_NP.masked_fill_(head_NP, 0.0)
        return ids_NM, count_N, rest_N

    def locate(self, points: Points) -> Tensor:
        """See `Share`."""
        request, most = points.request, points.request.draws
        words = random_words(request.seed, request.sequence_N, request.row_N, stream=STREAM_DRAWS, count=request.words)
        total_N1, many_N1 = points.total_N.unsqueeze(1), points.many_N.unsqueeze(1)
        step_M = torch.arange(most, device=total_N1.device)
        point_NM = scale_to(words, total_N1)
        if points.spread:
            point_NM = spread(step_M, total_N1, many_N1.clamp_min(1), words)
        rest_NM = point_NM - points.start_N.unsqueeze(1)
        mine_NM = (step_M < many_N1) & (rest_NM >= 0) & (rest_NM < points.mass_N.unsqueeze(1))
        ids_NM = torch.zeros_like(rest_NM)
        for row in range(len(rest_NM)):  # one row at a time: cumulative sums of all would need eight bytes an id
            end_P = self._weights_NP[row].to(torch.int64).cumsum(0)
            found_D = torch.searchsorted(end_P, rest_NM[row, mine_NM[row]], right=True)
            ids_NM[row, mine_NM[row]] = found_D + self.start
        return ids_NM

    def largest(self, most: int) -> Tensor:
        """See `Share`."""
        vocabulary = self.logits_NV.shape[1]
        rank_V = LAST_ID - self.start - torch.arange(vocabulary, device=self.logits_NV.device)
        keys_NV = self._weights_NP[:, :vocabulary].to(torch.int64) << ID_BITS | rank_V
        return torch.nn.functional.pad(
            keys_NV.topk(min(most, vocabulary), dim=1).values, (0, max(0, most - vocabulary)), value=-1
        )
