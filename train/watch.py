"""Held-out figures while a student is trained, and the watch for teacher hacking.

Teacher hacking (arXiv 2502.02671): the student gets nearer to the teacher on text it is not trained on, and worse at that text.
The first is the held-out KL to the teacher, the second the held-out cross-entropy with the text, which no teacher has a part in.

How sure a change is, comes from the same sequences at both times. With e_s, f_s the sums of a figure over the n_s rows of
sequence s at the two times, the change of its mean is D = sum_s (f_s - e_s) / sum_s n_s. Rows of a sequence are not independent,
sequences are, so the error is that of a ratio of sums over sequences (d_s = f_s - e_s):

    SE(D) = sqrt( S/(S-1) * sum_s (d_s - D n_s)**2 ) / sum_s n_s

What the two times have in common cancels: the difficulty of a sequence, and, of a cache's sampled targets, the stored entropy.
What the sampling adds to sum_e w_e (log q_e - log q'_e) has mean zero, is drawn apart in every row, and is in d_s.

Shapes: `S` sequences.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stillroom.train.held_out import add_batch
from stillroom.train.held_out_data import HeldOutData
from stillroom.train.ranks import Ranks
from stillroom.train.targets import LiveTeacher
from stillroom.train.views import Sums, by_sequence

EVALUATIONS: Final = 3  # that the rule looks at
ERRORS: Final = 2.0  # standard errors that count as a change
ELEMENTS: Final = 1 << 28  # logits of a model at a time: 1 GiB in float32
LEFT_OUT: Final = ("rows", "top1_rows", "teacher_lm_loss")  # of the log: they do not change
FloatS = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Seen:
    """One evaluation, by sequence.

    Attributes:
        step: optimizer steps done.
        rows_S: rows that count.
        kl_S, ce_S: sums of KL to the teacher and of cross-entropy, nats.
    """

    step: int
    rows_S: FloatS
    kl_S: FloatS
    ce_S: FloatS


@dataclass(frozen=True, slots=True)
class Change:
    """Of a mean over rows, between two evaluations of the same rows.

    Attributes:
        mean: the later less the earlier, nats.
        error: its standard error.
    """

    mean: float
    error: float


def change(before_S: FloatS, after_S: FloatS, rows_S: FloatS) -> Change:
    """Change of a mean with its standard error over sequences; see above.

    Args:
        before_S, after_S: sums by sequence.
        rows_S: rows of each; those without any do not count.
    """
    d_S, n_S = (x_S[rows_S > 0] for x_S in (after_S - before_S, rows_S))
    rows, count = float(n_S.sum()), len(n_S)
    mean = float(d_S.sum()) / rows
    if count < 2:
        return Change(mean, math.inf)
    return Change(mean, math.sqrt(count / (count - 1) * float(((d_S - mean * n_S) ** 2).sum())) / rows)


def hacked(seen: Sequence[Seen]) -> tuple[Change, Change] | None:
    """Whether the last evaluations show teacher hacking.

    They do if, over the last `EVALUATIONS`, KL fell and cross-entropy rose each time, and from the first of them to the last
    both by more than `ERRORS` standard errors. Where neither moves in truth, a figure does so by chance once in 44 evaluations
    (the normal law's 0.0228), both, if they are independent, once in 1,900; that they do each time leaves out one wild step.

    Args:
        seen: evaluations of the same rows, oldest first.

    Returns:
        The changes of KL and of cross-entropy from the first of them to the last, if they do.
    """
    last = list(seen)[-EVALUATIONS:]
    if len(last) < EVALUATIONS:
        return None
    for one, following in pairwise(last):
        if following.kl_S.sum() >= one.kl_S.sum() or following.ce_S.sum() <= one.ce_S.sum():
            return None
    kl = change(last[0].kl_S, last[-1].kl_S, last[-1].rows_S)
    ce = change(last[0].ce_S, last[-1].ce_S, last[-1].rows_S)
    return (kl, ce) if kl.mean < -ERRORS * kl.error and ce.mean > ERRORS * ce.error else None


@final
class Watch:
    """Evaluates a student every so many steps, and speaks up once when the figures show teacher hacking.

    Every process evaluates its share, batch by batch in turn, and all make the same number of forward passes: a student cut by
    FSDP2 needs all of them in each. One without a batch left repeats the first and does not count it.

    A run that goes on after a stop begins to look anew: its first `EVALUATIONS` - 1 evaluations can not warn.

    Args:
        data: what is evaluated.
        every: steps between evaluations; the last step is one as well.
        vocab_size: columns of the logits that are compared.
        batch_size: the most sequences per forward.
        dtype: of the student's matrix products.
        teacher: live, if the run has one.
        warn: called with the sentence, in every process.
    """

    def __init__(
        self,
        data: HeldOutData,
        *,
        every: int,
        vocab_size: int,
        batch_size: int,
        dtype: torch.dtype,
        teacher: LiveTeacher | None,
        warn: Callable[[str], None],
    ) -> None:
        self._data, self._every, self._warn = data, every, warn
        self._vocab_size, self._dtype = vocab_size, dtype
        self._teachers = [] if teacher is None else [teacher]
        self._batch_size = max(1, min(batch_size, ELEMENTS // (data.source.seq_len * vocab_size)))
        self._seen: deque[Seen] = deque(maxlen=EVALUATIONS)
        self._warned = False

    def due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after step `step` of `steps`."""
        return step % self._every == 0 or step == steps

    def __call__(self, model: nn.Module, step: int, device: torch.device, ranks: Ranks) -> dict[str, float]:
        """Evaluate, together with the other processes; the model and the random generators are left as they were.

        Returns:
            Figures for the log, `heldout_...`.
        """
        sums = self._measure(model, device, ranks)
        figures = sums.totals().figures(0)
        if "kl" in figures:
            of = {name: x_S.cpu().numpy() for name, x_S in zip(sums.names, sums.sum_FG)}
            self._seen.append(Seen(step, sums.rows_G.cpu().numpy(), of["kl"], of["lm_loss"]))
            found = hacked(self._seen)
            if found is not None and not self._warned:
                self._warned = True
                self._warn(_sentence(self._seen, *found))
        return {f"heldout_{name}": value for name, value in figures.items() if name not in LEFT_OUT}

    def _measure(self, model: nn.Module, device: torch.device, ranks: Ranks) -> Sums:
        """Sums of every figure by sequence, over all processes."""
        data = self._data
        names = [name for measure in data.measures for name in measure.names]
        sums = Sums(names, by_sequence(data.sequences), device)
        models = [LiveTeacher(model, self._vocab_size, self._dtype), *self._teachers]
        starts = list(range(0, data.sequences, self._batch_size))
        with torch.no_grad(), _set_aside(model, device):
            for turn in range(0, len(starts), ranks.count):
                mine = turn + ranks.rank
                start = starts[mine] if mine < len(starts) else 0
                indices = list(range(start, min(start + self._batch_size, data.sequences)))
                batch = ranks.together(partial(data.source.__getitems__, indices)).to(device)
                add_batch(batch, start, models, data.measures, [sums] if mine < len(starts) else [])
        if ranks.count > 1:
            mine_XS = torch.cat((sums.sum_FG, sums.known_FG, sums.rows_G[None])).cpu()
            all_XS = torch.tensor(ranks.total(*mine_XS.flatten().tolist()), dtype=torch.float64).view_as(mine_XS)
            for into, part in zip((sums.sum_FG, sums.known_FG), all_XS[:-1].chunk(2)):
                into.copy_(part)
            sums.rows_G.copy_(all_XS[-1])
        return sums


def _sentence(seen: Sequence[Seen], kl: Change, ce: Change) -> str:
    return (
        f"teacher hacking: from step {seen[0].step} to {seen[-1].step} the held-out KL to the teacher fell by {-kl.mean:.3g} "
        f"nats (standard error {kl.error:.1g}) while the held-out cross-entropy with the text rose by {ce.mean:.3g} "
        f"({ce.error:.1g}): the student follows the teacher where it is wrong; stop earlier, raise --alpha, or use more text"
    )


@contextmanager
def _set_aside(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in evaluation mode; afterwards it, and the random generators, are as before."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the root's weights stay gathered after a pass that no backward follows
