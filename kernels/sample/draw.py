"""The six ways to pick a row's entries from its integer weights.

Id `i` of a row owns the `w_i` integers of [0, W) that follow those of the ids before it, and a draw is an integer. It is
found in two steps, the block by cumulative sums of blocks, then the id inside it, so a row's ids are scanned only
where a draw fell. Let `N` be the number of draws:

    random      r_j = floor(u_j * W / 2**64), u_j 64-bit draws; weight count/N, for a proposal q ~ p**t count/N * p/q
    systematic  r_j = floor((j*W + u) / N), u uniform in [0, W): over u, the N*W values j*W + u visit every integer
                once, so an id is hit N*w/W times on average, exactly, and floor or ceil of that in any one row
    stratified  r_j = floor((j*W + u_j) / N), each u_j uniform in [0, W) on its own: the same points are visited, so the
                average is the same; the noise lies between those of the two above, and neighbouring hits are independent
    threshold   head: w*N >= W, weight w/W. Tail of total T: m = max(1, floor(N*T/W)) systematic draws over the tail
                alone, weight T/W/m. A tail id has w < W/N <= T/m and w whole, so w <= ceil(T/m) - 1, at most the
                distance of two neighbouring r_j: no id is hit twice. (Where floor(N*T/W) = 0 there is one draw.)
    top_k       the N largest weights
    top_p       the fewest largest weights that reach the mass asked for, at most N of them

Shapes: `G` rows of a group, `P` vocabulary padded to whole blocks, `B` blocks of a row, `I` ids of a block, `M` most draws
of a row, `D` draws or hit blocks of a group, `E` entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.kernels.sample.philox import scale_to
from stillroom.kernels.sample.weights import Weights

Words = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Picked:
    """Entries of a group in any order; `sampled_E` marks those that go after the row's others."""

    row_E: Tensor
    id_E: Tensor
    weight_E: Tensor
    sampled_E: Tensor


def threshold(weights: Weights, draws: int, words: Words) -> Picked:
    """Exact head, systematic tail."""
    total_G, blocks_GB, inside = weights.total_G, weights.blocks_GB, weights.ids_per_block
    least_G = (total_G + draws - 1).div(draws, rounding_mode="floor")  # w*N >= W, for whole w

    # a block with a head id weighs at least as much as that id
    row_D, block_D = (blocks_GB >= least_G.unsqueeze(1)).nonzero(as_tuple=True)
    window_DI = weights.windows(row_D * blocks_GB.shape[1] + block_D)
    hit_E, place_E = (window_DI >= least_G[row_D].unsqueeze(1)).nonzero(as_tuple=True)
    head_row_E, head_block_E, head_E = row_D[hit_E], block_D[hit_E], window_DI[hit_E, place_E]
    head_id_E = head_block_E * inside + place_E

    tail_GB = blocks_GB.index_put((head_row_E, head_block_E), -head_E.to(torch.int64), accumulate=True)
    tail_G = tail_GB.sum(1)
    many_G = torch.where(tail_G > 0, floor_of_share(draws, tail_G, total_G).clamp_min(1), 0)
    most = int(many_G.max())
    step_M = torch.arange(most, device=total_G.device)
    point_GM = spread(step_M, tail_G.unsqueeze(1), many_G.clamp_min(1).unsqueeze(1), words)
    row_D, step_D = (step_M < many_G.unsqueeze(1)).nonzero(as_tuple=True)
    block_D, rest_D = _block_of(tail_GB, point_GM, row_D, step_D)
    window_DI = weights.windows(row_D * blocks_GB.shape[1] + block_D)
    window_DI.masked_fill_(window_DI >= least_G[row_D].unsqueeze(1), 0.0)  # the head, punched out
    tail_id_D = block_D * inside + _place_of(window_DI, rest_D)

    tail_weight_G = tail_G.double() / total_G.double() / many_G.clamp_min(1)
    return Picked(
        row_E=torch.cat((head_row_E, row_D)),
        id_E=torch.cat((head_id_E, tail_id_D)),
        weight_E=torch.cat((head_E / total_G[head_row_E].double(), tail_weight_G[row_D])).float(),
        sampled_E=torch.cat((torch.zeros_like(head_row_E), torch.ones_like(row_D))),
    )


def counts(weights: Weights, draws: int, words: Words, kind: str) -> Picked:
    """`random`, `systematic` or `stratified` draws as counts."""
    total_G1 = weights.total_G.unsqueeze(1)
    rows, blocks = weights.blocks_GB.shape
    step_M = torch.arange(draws, device=total_G1.device)
    if kind == "random":
        point_GM = scale_to(words, total_G1).sort(1).values  # sorted: ids then come out in order
    else:
        point_GM = spread(step_M, total_G1, torch.full_like(total_G1, draws), words)
    row_D = torch.arange(rows, device=step_M.device).repeat_interleave(draws)
    block_D, rest_D = _block_of(weights.blocks_GB, point_GM, row_D, step_M.repeat(rows))
    window_D, share_D = torch.unique_consecutive(row_D * blocks + block_D, return_inverse=True)
    place_D = _place_of(weights.windows(window_D), rest_D, share_D)

    place = weights.weights_GP.shape[1]
    hit_E, count_E = torch.unique_consecutive(
        row_D * place + block_D * weights.ids_per_block + place_D, return_counts=True
    )
    row_E = hit_E.div(place, rounding_mode="floor")
    return Picked(row_E, hit_E - row_E * place, (count_E.double() / draws).float(), torch.zeros_like(row_E))


def largest(weights: Weights, draws: int, top_p: float) -> Picked:
    """The largest weights, at most `draws` of them, down to the mass `top_p`; among equals the lower id is kept."""
    weights_GP = weights.weights_GP
    place = weights_GP.shape[1]
    most = min(draws, place)
    value_GM, id_GM = weights_GP.topk(min(most + 1, place), dim=1)
    if place > most:
        row_D = ((value_GM[:, most - 1] == value_GM[:, most]) & (value_GM[:, most] > 0)).nonzero().squeeze(1)
        value_GM, id_GM = value_GM[:, :most].contiguous(), id_GM[:, :most].contiguous()
        if len(row_D):  # equal weights on both sides of the cut: rank by (weight, lower id), one integer
            bits_DP = weights_GP[row_D].view(torch.int32).to(torch.int64)
            rank_DP = bits_DP << 32 | torch.arange(place - 1, -1, -1, device=row_D.device)
            id_GM[row_D] = place - 1 - (rank_DP.topk(most, dim=1).values & 0xFFFFFFFF)
    if top_p < 1.0:  # the mass may run out among equals
        id_GM, order_GM = id_GM.sort(1)
        value_GM, order_GM = value_GM.gather(1, order_GM).sort(stable=True, dim=1, descending=True)
        id_GM = id_GM.gather(1, order_GM)
    total_G1 = weights.total_G.unsqueeze(1)
    wanted_G1 = torch.minimum((total_G1.double() * top_p).ceil().to(torch.int64), total_G1)
    before_GM = value_GM.to(torch.int64).cumsum(1) - value_GM.to(torch.int64)
    row_E, step_E = ((before_GM < wanted_G1) & (value_GM > 0)).nonzero(as_tuple=True)
    weight_E = (value_GM[row_E, step_E].double() / weights.total_G[row_E].double()).float()
    return Picked(row_E, id_GM[row_E, step_E], weight_E, torch.zeros_like(row_E))


def spread(step_M: Tensor, total_G1: Tensor, many_G1: Tensor, words: Words) -> Tensor:
    """floor((j * total + u) / many) for the steps j, u uniform in [0, total): `[G, M]` int64, without overflow.

    `words` are `[G, 1]` for one u a row, `[G, M]` for one a step. With total = whole * many + over the numerator is
    j * whole * many + (j * over + u), and j * over < many**2 <= 2**24.
    """
    offset_G1 = scale_to(words, total_G1)
    whole_G1 = total_G1.div(many_G1, rounding_mode="floor")
    over_GM = step_M * (total_G1 - whole_G1 * many_G1) + offset_G1
    return step_M * whole_G1 + over_GM.div(many_G1, rounding_mode="floor")


def floor_of_share(draws: int, part_G: Tensor, total_G: Tensor) -> Tensor:
    """floor(draws * part / total) for part <= total < 2**62; the product does not fit 64 bits, its test does."""
    whole_G = total_G.div(draws, rounding_mode="floor")
    over_G = total_G - whole_G * draws
    guess_G = (part_G.double() / total_G.double() * draws).to(torch.int64)  # right, or off by one

    def fits(many_G: Tensor) -> Tensor:  # many * total <= draws * part
        return many_G * whole_G + (many_G * over_G + draws - 1).div(draws, rounding_mode="floor") <= part_G

    return torch.where(fits(guess_G + 1), guess_G + 1, torch.where(fits(guess_G), guess_G, guess_G - 1))


def _block_of(blocks_GB: Tensor, point_GM: Tensor, row_D: Tensor, step_D: Tensor) -> tuple[Tensor, Tensor]:
    """Block each point falls in, and what is left of the point there."""
    end_GB = blocks_GB.cumsum(1)
    block_D = torch.searchsorted(end_GB, point_GM, right=True)[row_D, step_D]
    return block_D, point_GM[row_D, step_D] - (end_GB - blocks_GB)[row_D, block_D]


def _place_of(window_DI: Tensor, rest_D: Tensor, share_D: Tensor | None = None) -> Tensor:
    """Place of each point inside its window; `share_D` names the window where several points share one."""
    end_DI = window_DI.cumsum(1)
    if share_D is not None:
        end_DI = end_DI.index_select(0, share_D)
    return torch.searchsorted(end_DI, rest_D.double().unsqueeze(1), right=True).squeeze(1)
