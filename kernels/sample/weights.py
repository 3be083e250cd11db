"""Integer weights of the teacher's softmax: sums that are exact, so they do not depend on how rows or ids are grouped.

The weight of an id is a whole number proportional to 2**t with t = (z - row maximum) * log2(e), 753 * 2**30, nearly 2**40,
for the largest logit. Whole numbers add without rounding: totals, cumulative sums and draws come out the same for every
batch split, block size, reduction order, thread count and device, and a Triton kernel can equal them bit for bit. Two
things make that true of the weights themselves:

- 2**t is spelled out below in single-precision additions and multiplications, each rounded on its own. Library
  exponentials will not do: torch.exp2 on a CPU gives an element one result in the vector loop and another in its tail,
  so it depends on where in memory the element lies. (A Triton kernel must switch off fused multiply-add.)
- weights stay below 2**40 and blocks below 2**13 ids, so double-precision block sums are exact too.

Shapes: `G` rows of a group, `V` vocabulary, `P` vocabulary padded to whole blocks, `B` blocks of a row, `I` ids of a block,
`C` rows of a chunk, `D` draws or other look-ups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

LOG2E: Final = 1.0 / math.log(2.0)

# 2**f = P(f) / 753.2153381473695 for |f| <= 1/2 within a relative 1.6e-7, rounding included. P has leading coefficient 1
# (one pass over the logits less); the factor cancels in every ratio of weights and is put back where a logarithm is taken.
COEFFICIENTS: Final = (753.2153930664062, 522.0889282226562, 180.93829345703125, 41.8088264465332, 7.28775691986084)
_EXPONENT: Final = 30
UNIT: Final = 753.2153381473695 * 2.0**_EXPONENT  # weight of t = 0
LOWEST: Final = -40.0  # 2**t there is below one unit: the weight is 0
ROUND: Final = (
    1.5 * 2**23 + _EXPONENT
)  # adding it leaves the nearest whole number, plus _EXPONENT, in a float32's low bits

MAX_VOCABULARY: Final = 1 << 22  # totals stay below 2**62
GROUP_ELEMENTS: Final = 1 << 21  # weights kept at a time, 8 MiB
CHUNK_ELEMENTS: Final = 1 << 18  # logits in work at a time, 5 MiB of buffers: fewer and the calls' overhead shows


def block_ids(vocabulary: int) -> int:
    """Ids in a block: a power of two near the square root of the vocabulary, 64 to 1024."""
    return 1 << min(10, max(6, round(math.log2(vocabulary) / 2)))


@dataclass(frozen=True, slots=True)
class Weights:
    """Integer weights of a group of rows.

    Attributes:
        weights_GP: `[G, P]` float32 whole numbers, 0 for an id below 2**-40 of the row's largest and in the padding.
        blocks_GB: `[G, B]` int64, sums of blocks.
        total_G: `[G]` int64, sums of rows.
        moment_G: `[G]` int64, sum over ids of ceil(-t * weight).
    """

    weights_GP: Tensor
    blocks_GB: Tensor
    total_G: Tensor
    moment_G: Tensor

    @property
    def ids_per_block(self) -> int:
        """`I`."""
        return self.weights_GP.shape[1] // self.blocks_GB.shape[1]

    def windows(self, block_D: Tensor) -> Tensor:
        """Weights of whole blocks, `[D, I]` float64; `block_D` counts blocks through the rows of the group."""
        return self.weights_GP.view(-1, self.ids_per_block).index_select(0, block_D).double()


def rate_of(exponent: float) -> float:
    """Factor of a logit in t, rounded to float32 as everything that follows."""
    return float(torch.tensor(exponent * LOG2E, dtype=torch.float32))


def whole(logits_E: Tensor, top_E: Tensor, exponent: float = 1.0) -> Tensor:
    """Weights of single logits, float32 whole numbers: the operations of `Weigher`, in the same order."""
    power_E = ((logits_E - top_E) * rate_of(exponent)).clamp_min(LOWEST)
    scale_E = power_E + ROUND
    fraction_E = power_E - (scale_E - ROUND)
    weight_E = fraction_E + COEFFICIENTS[-1]
    for coefficient in COEFFICIENTS[-2::-1]:
        weight_E = weight_E * fraction_E + coefficient
    return (weight_E.view(torch.int32) + (scale_E.view(torch.int32) << 23)).view(torch.float32).floor()


class Weigher:
    """Turns logits into `Weights`, with buffers that are used again: a result lives until the next call.

    Args:
        rows: most rows there will be.
        vocabulary: `V`.
        device: where the logits are.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.per_block = block_ids(vocabulary)
        self.padded = -(-vocabulary // self.per_block) * self.per_block
        self.group_rows = max(1, min(rows, GROUP_ELEMENTS // self.padded))
        self.chunk_rows = max(1, min(rows, CHUNK_ELEMENTS // self.padded))
        self._weights = torch.empty(self.group_rows, self.padded, device=device)
        self._buffers = [torch.empty(self.chunk_rows, self.padded, device=device) for _ in range(3)]
        self._wide = torch.empty(self.chunk_rows, self.padded, dtype=torch.float64, device=device)
        # PyTorch makes a tensor of every Python number in every call, 3 us each: made once here
        self._lowest, self._round, *self._coefficients = (
            torch.tensor(value, dtype=torch.float32, device=device) for value in (LOWEST, ROUND, *COEFFICIENTS)
        )
        self._mantissa_bits = torch.tensor(23, dtype=torch.int32, device=device)

    def __call__(self, logits_GV: Tensor, top_G1: Tensor, exponent: float = 1.0) -> Weights:
        """Weights of softmax(exponent * logits).

        Args:
            logits_GV: `[G, V]` float32 or bfloat16, at most `group_rows` rows, no NaN.
            top_G1: `[G, 1]` float32, finite row maxima.
            exponent: positive.
        """
        rows = logits_GV.shape[0]
        weights_GP = self._weights[:rows]
        blocks_GB = weights_GP.new_empty(rows, self.padded // self.per_block, dtype=torch.int64)
        moment_G = weights_GP.new_empty(rows, dtype=torch.int64)
        rate = torch.tensor(rate_of(exponent), dtype=torch.float32, device=weights_GP.device)
        for start in range(0, rows, self.chunk_rows):
            chunk = slice(start, min(rows, start + self.chunk_rows))
            power_CP = self._buffers[0][: chunk.stop - start]
            torch.sub(logits_GV[chunk], top_G1[chunk], out=power_CP[:, : self.vocabulary])
            power_CP[:, self.vocabulary :] = LOWEST
            torch.maximum(power_CP.mul_(rate), self._lowest, out=power_CP)
            weights_CP = self._exp2(power_CP, weights_GP[chunk])
            blocks_GB[chunk] = self._block_sums(weights_CP)  # whole numbers below 2**53: exact
            moment_G[chunk] = -self._block_sums(power_CP.mul_(weights_CP).floor_()).to(torch.int64).sum(1)
        return Weights(weights_GP, blocks_GB, blocks_GB.sum(1), moment_G)

    def _exp2(self, power_CP: Tensor, weights_CP: Tensor) -> Tensor:
        """floor(UNIT * 2**power) for powers in [-40, 0], one float32 operation at a time."""
        scale_CP, fraction_CP = (buffer[: len(power_CP)] for buffer in self._buffers[1:])
        torch.add(power_CP, self._round, out=scale_CP)
        torch.sub(scale_CP, self._round, out=fraction_CP)
        torch.sub(power_CP, fraction_CP, out=fraction_CP)  # in [-1/2, 1/2], exact
        torch.add(fraction_CP, self._coefficients[-1], out=weights_CP)
        for coefficient in self._coefficients[-2::-1]:
            weights_CP.mul_(fraction_CP).add_(coefficient)
        # the low bits of `scale` are the whole part plus _EXPONENT: shifted, they add to the exponent field
        weights_CP.view(torch.int32).add_(scale_CP.view(torch.int32).bitwise_left_shift_(self._mantissa_bits))
        return weights_CP.floor_()

    def _block_sums(self, values_CP: Tensor) -> Tensor:
        wide_CP = self._wide[: len(values_CP)].copy_(values_CP)
        return wide_CP.view(len(values_CP), -1, self.per_block).sum(2)
