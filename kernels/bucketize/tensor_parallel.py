"""`bucketize` where every rank holds a contiguous slice of the vocabulary.

A rank reduces its own slice; what travels per row is one number per temperature (all-gather of tail log-sum-exps) and one
per entry and label (all-reduce of logits that are 0 on all ranks but the one that holds the id). The rest, the loss
included, is the same on every rank.

Shapes: `N` rows, `V` vocabulary of this rank, `E` entries, `T` temperatures, `G` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stillroom.kernels.bucketize.autograd import Buckets, buckets, check


def bucketize_sharded(
    logits_local_NV: Tensor,
    offsets: Tensor,
    ids: Tensor,
    labels_N: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    temperatures: Sequence[float] = (1.0,),
    impl: str = "auto",
) -> Buckets:
    """Buckets of rows whose vocabulary is split over the ranks of `group`, equal on all of them.

    Every rank then computes the same loss from them and calls backward once; the gradient of its own slice comes out.
    That is the gradient of one loss, not of a sum over ranks, so do not average it over `group`.

    Args:
        logits_local_NV: `[N, V]` this rank's columns: ids `vocab_start` to `vocab_start + V - 1`. V may differ by rank;
            together the slices cover the vocabulary once.
        offsets: `[N+1]` int64, the same on every rank, as are `ids`, `labels_N` and `temperatures`.
        ids: `[E]` global ids, int32 or int64. One that no rank holds has logit 0 and no gradient; that is not checked.
        labels_N: `[N]` int64 global ids, negative means none; or None.
        group: process group of the vocabulary, None for the default one.
        vocab_start: global id of the first local column.
        temperatures: as in `bucketize`.
        impl: as in `bucketize`.

    Raises:
        ValueError: an argument of the wrong shape, type, device or range.
    """
    check(logits_local_NV, offsets, ids, labels_N, temperatures)
    if vocab_start < 0:
        raise ValueError(
            f"`vocab_start` came as {vocab_start}, wanted the global id of the first local column, 0 or more"
        )
    local = buckets(logits_local_NV, offsets, ids, labels_N, temperatures, vocab_start, impl)
    tail_NT: Tensor = _JoinTails.apply(local.tail_NT, group)  # type: ignore[no-untyped-call]
    parts = [local.support_E] if local.label_N is None else [local.support_E, local.label_N]
    summed: Tensor = _SumOverRanks.apply(torch.cat(parts), group)  # type: ignore[no-untyped-call]
    support_E, label_N = summed[: len(ids)], summed[len(ids) :]
    return Buckets(support_E, None if local.label_N is None else label_N, tail_NT)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce. The result is used by the same loss on every rank, so a rank's share has that loss's gradient as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _JoinTails(torch.autograd.Function):
    """Log-sum-exp over ranks. A rank's tail has the share exp(local - joint) of the joint one; nothing travels back."""

    @staticmethod
    def forward(ctx: Any, tail_NT: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ranks, (rows, temperatures) = dist.get_world_size(group), tail_NT.shape
        gathered = tail_NT.new_empty(ranks * rows, temperatures)
        dist.all_gather_into_tensor(gathered, tail_NT.contiguous(), group=group)
        joint_NT = gathered.view(ranks, rows, temperatures).logsumexp(0)
        ctx.save_for_backward(tail_NT, joint_NT)
        return joint_NT

    @staticmethod
    def backward(ctx: Any, grad_NT: Tensor) -> tuple[Tensor, None]:
        tail_NT, joint_NT = ctx.saved_tensors
        filled_NT = tail_NT > -torch.inf  # then the joint one is finite too; else nothing of it is ours
        share_NT = torch.where(filled_NT, tail_NT - joint_NT, -torch.inf).exp()
        return torch.where(filled_NT, grad_NT, 0.0) * share_NT, None
