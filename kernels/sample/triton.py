"""A slice of the vocabulary on a GPU: launches of the sampler's Triton kernels, for `steps.py`.

Shapes as in `shares.py`; `G` rows of a group, `K` keys of the chosen blocks of a row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from stillroom.kernels.sample import kernels_triton as device
from stillroom.kernels.sample.philox import STREAM_DRAWS, WORD
from stillroom.kernels.sample.shares import Points
from stillroom.kernels.sample.weights import rate_of
from stillroom.kernels.tuning import launch

_KEY_ELEMENTS = 1 << 25  # keys kept at a time by `largest`, 256 MiB


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of what is in work at a time; none of them changes a result.

    Attributes:
        block: ids of a block of the cumulative sums.
        key_block: ids of a block of keys.
        tile: ids that `maxima`, `sums` and the key kernels take at a time.
        draws: draws of a program of `locate`.
        warps: of the programs of these kernels, of `heads`, of `locate`, and of the key kernels.
    """

    block: int
    key_block: int
    tile: int
    draws: int
    warps: tuple[int, int, int, int] = (4, 4, 4, 4)

    @classmethod
    def of(cls, vocabulary: int) -> Sizes:
        """The tuning table's."""
        tile, block, locate, key_block = (
            launch(f"sample.{name}", vocabulary) for name in ("tile", "block", "locate", "key_block")
        )
        warps = (tile.num_warps, block.num_warps, locate.num_warps, key_block.num_warps)
        return cls(block.block, key_block.block, tile.block, max(1, locate.block // block.block), warps)


class TritonShare:
    """A slice of the vocabulary on a GPU (or in Triton's interpreter); see `shares.Share`."""

    def __init__(self, logits_NV: Tensor, start: int) -> None:
        self.logits_NV, self.start = logits_NV, start
        self._sizes = Sizes.of(logits_NV.shape[1])
        self._blocks = triton.cdiv(logits_NV.shape[1], self._sizes.block)
        self._rows, self._hits, self._draws, self._keys = (
            dict(num_warps=warps, enable_fp_fusion=False) for warps in self._sizes.warps
        )

    def maxima(self) -> Tensor:
        """See `Share`."""
        rows, vocabulary = self.logits_NV.shape
        top_N = self._new(torch.float32, rows)
        with _on(top_N):
            device.maxima[(rows,)](
                self.logits_NV, *self.logits_NV.stride(), top_N, vocabulary, TILE=self._sizes.tile, **self._rows
            )
        return top_N

    def weigh(self, top_N: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
        """See `Share`."""
        rows, vocabulary = self.logits_NV.shape
        self._weight: tuple[Any, ...] = (self.logits_NV, *self.logits_NV.stride(), top_N, rate_of(exponent))
        self._sums_NB = self._new(torch.int64, rows, self._blocks)
        mass_N, moment_N = self._new(torch.int64, rows), self._new(torch.int64, rows)
        with _on(top_N):
            device.sums[(rows,)](
                *self._weight, self._sums_NB, mass_N, moment_N, vocabulary, self._blocks,
                BLOCK=self._sizes.block, WIDE=max(1, self._sizes.tile // self._sizes.block), **self._rows,
            )  # fmt: skip
        return mass_N, moment_N

    def heads(self, least_N: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Share`."""
        rows, vocabulary = self.logits_NV.shape
        ids_NM = self._new(torch.int64, rows, most)
        count_N, mass_N = self._new(torch.int64, rows), self._new(torch.int64, rows)
        with _on(ids_NM):
            device.heads[(rows,)](
                *self._weight, self._sums_NB, least_N, ids_NM, count_N, mass_N, self.start, vocabulary, self._blocks, most,
                PADDED=triton.next_power_of_2(self._blocks), BLOCK=self._sizes.block, **self._hits,
            )  # fmt: skip
        return ids_NM, count_N, mass_N

    def locate(self, points: Points) -> Tensor:
        """See `Share`."""
        rows, vocabulary = self.logits_NV.shape
        request, most, draws = points.request, points.request.draws, self._sizes.draws
        ids_NM = torch.zeros(rows, most, dtype=torch.int64, device=self.logits_NV.device)
        with _on(ids_NM):
            device.locate[(rows, triton.cdiv(most, draws))](
                *self._weight, self._sums_NB, points.least_N, points.total_N, points.many_N, points.start_N, points.mass_N,
                request.sequence_N.contiguous(), request.row_N.contiguous(), request.seed & WORD, request.seed >> 32,
                ids_NM, self.start, vocabulary, self._blocks, most,
                STREAM=STREAM_DRAWS, OWN=request.words > 1, SPREAD=points.spread, PUNCH=points.least_N is not None,
                PADDED=triton.next_power_of_2(self._blocks), BLOCK=self._sizes.block, DRAWS=draws, **self._draws,
            )  # fmt: skip
        return ids_NM

    def largest(self, most: int) -> Tensor:
        """See `Share`."""
        rows, vocabulary = self.logits_NV.shape
        block, wide = self._sizes.key_block, max(1, self._sizes.tile // self._sizes.key_block)
        blocks = triton.cdiv(vocabulary, block)
        many, kept = min(most, blocks), min(most, vocabulary)
        logits, stride_n, stride_v, top_N, rate = self._weight
        group = max(1, _KEY_ELEMENTS // (many * block))
        keys_NM = torch.full((rows, most), -1, dtype=torch.int64, device=logits.device)
        for first in range(0, rows, group):
            rows_G = slice(first, min(rows, first + group))
            here = rows_G.stop - first
            weight = (logits[rows_G], stride_n, stride_v, top_N[rows_G], rate)
            best_GB = self._new(torch.int64, here, blocks)
            keys_GK = self._new(torch.int64, here, many * block)
            with _on(keys_NM):
                device.block_keys[(here,)](
                    *weight, best_GB, self.start, vocabulary, blocks, BLOCK=block, WIDE=wide, **self._keys
                )
                # the `most` largest keys lie in the `most` blocks with the largest maxima, for no two keys are equal
                chosen_GM = best_GB.topk(many, dim=1).indices
                device.window_keys[(here, triton.cdiv(many, wide))](
                    *weight, chosen_GM, keys_GK, self.start, vocabulary, many, BLOCK=block, WIDE=wide, **self._keys
                )
            keys_NM[rows_G, :kept] = keys_GK.topk(kept, dim=1).values
        return keys_NM

    def _new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.logits_NV.device)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
