"""`Problem`: everything about the loss but the logits, checked once.

Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from stillroom.kernels.sparse_kd.divergence import DIVERGENCES
from stillroom.kernels.targets import SparseTargets

MISSING_MASS: Final = ("truncate", "renormalise_teacher", "renormalise_both", "tail_bucket")
IGNORE_LABEL: Final = -100
# A missing mass below this is float32's rounding of weights that sum to 1, and makes no bucket: the reverse KL of the student's
# tail to it would be of the order of -q log(rounding), which is noise.
LEAST_MISSING: Final = 2.0**-20


@dataclass(frozen=True, slots=True)
class TargetSplit:
    """Coefficients of the two parts of the forward KL when the label is its own bucket (ATKD, arXiv 2402.11890).

    With g the label, KL(p||q) = TKD + (1 - p_g) DKD; a row's distillation loss is tkd * TKD + dkd * DKD instead. So
    coefficients (1, 1 - p_g) give the forward KL back.

    Attributes:
        tkd_N: `[N]`, factor of TKD = KL([p_g, 1 - p_g] || [q_g, 1 - q_g]).
        dkd_N: `[N]`, factor of DKD, the KL between the distributions over the other ids.
    """

    tkd_N: Tensor
    dkd_N: Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """The loss of `N` rows as a function of their logits; made by `make_problem`.

    Attributes:
        targets: of the same rows; None for cross-entropy alone.
        labels_N: `[N]` int64, -100 ignores a row.
        weight_N: `[N]` float32 or float64, factor of the row in the loss; 0 for an ignored row. Its dtype is the computation's.
        alpha: share of the hard-label cross-entropy.
        divergence: key of `DIVERGENCES`.
        parameter: the divergence's parameter, 0 if it has none.
        temperature: of the distillation term.
        missing: one of `MISSING_MASS`.
        split: coefficients of the target / non-target split, if wanted.
        mean_entries: entries per row, rounded up; a part, which keeps the entries of all rows, has it from the whole.
    """

    targets: SparseTargets | None
    labels_N: Tensor
    weight_N: Tensor
    alpha: float
    divergence: str = "forward_kl"
    parameter: float = 0.0
    temperature: float = 1.0
    missing: str = "truncate"
    split: TargetSplit | None = None
    mean_entries: int | None = None

    def __post_init__(self) -> None:
        if self.mean_entries is None:
            entries = 0 if self.targets is None else self.targets.ids.numel()
            object.__setattr__(self, "mean_entries", -(-entries // max(1, self.labels_N.numel())))

    @property
    def rows(self) -> int:
        """Number of rows `N`."""
        return self.labels_N.numel()

    def part(self, rows: slice) -> Problem:
        """The rows `rows` of the problem, as views: nothing is copied and no device is waited for.

        The entries stay whole; `targets.offsets` of a part need not begin with 0.
        """
        start, stop, _ = rows.indices(self.rows)
        targets, split = self.targets, self.split
        if targets is not None:
            targets = SparseTargets(
                targets.offsets[start : stop + 1],
                targets.ids,
                targets.weights,
                targets.label_logp[start:stop],
                targets.entropy[start:stop],
                targets.logp,
            )
        if split is not None:
            split = TargetSplit(split.tkd_N[start:stop], split.dkd_N[start:stop])
        return Problem(
            targets,
            self.labels_N[start:stop],
            self.weight_N[start:stop],
            self.alpha,
            self.divergence,
            self.parameter,
            self.temperature,
            self.missing,
            split,
            self.mean_entries,
        )


def make_problem(
    targets: SparseTargets | None,
    labels_N: Tensor,
    *,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    alpha: float = 0.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    missing: str = "truncate",
    row_weights_N: Tensor | None = None,
    reduction: str = "sum",
    split: TargetSplit | None = None,
    check: bool | None = None,
) -> Problem:
    """Check the arguments of a loss and gather them; `sparse_kd_loss` describes them.

    Args:
        targets: sparse targets, or None for cross-entropy alone.
        labels_N: `[N]` int64; its length is the number of rows.
        vocabulary: width of the logits.
        dtype: of the logits.
        device: of the logits.
        alpha: see `sparse_kd_loss`, as all that follow.
        divergence: see there.
        beta: see there.
        skew: see there.
        temperature: see there.
        missing: see there.
        row_weights_N: see there.
        reduction: `sum` or `none`; decides the default row weights.
        split: see there.
        check: whether to look at the values, too (ids, weights, log-probabilities), which on a CUDA device makes the host
            wait; None: on a CPU only.

    Raises:
        ValueError: an argument of the wrong shape, type, device or range.
    """
    _check_settings(targets, alpha, divergence, beta, skew, temperature, missing, reduction, split)
    _check_tensors(targets, labels_N, row_weights_N, split, device)
    live_N = labels_N != IGNORE_LABEL
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    if row_weights_N is not None:
        weight_N = torch.where(live_N, row_weights_N.to(compute), 0.0)
    elif reduction == "sum":
        weight_N = live_N.to(compute) / live_N.sum().clamp_min(1)
    else:
        weight_N = live_N.to(compute)
    parameter = {"beta": beta, "skew": skew, None: 0.0}[DIVERGENCES[divergence].parameter]
    problem = Problem(targets, labels_N, weight_N, alpha, divergence, parameter, temperature, missing, split)
    if not torch.compiler.is_compiling() and (device.type == "cpu" if check is None else check):
        check_values(problem, vocabulary)
    return problem


def check_values(problem: Problem, vocabulary: int) -> None:
    """Refuse ids out of range or twice in a row, weights and log-probabilities that are none; reads the tensors' values."""
    live_N = problem.labels_N != IGNORE_LABEL
    _check_ids("labels_N", problem.labels_N[live_N], vocabulary, f", or {IGNORE_LABEL} to ignore the row")
    if not bool(problem.weight_N.isfinite().all()):
        raise ValueError(
            "`row_weights_N` came with a NaN or infinite weight, wanted finite ones: look where they are made"
        )
    targets = problem.targets
    if targets is None:
        return
    _check_ids("targets.ids", targets.ids, vocabulary, ": pad the student's vocabulary or use the teacher's")
    if targets.ids.numel():
        key_E = (targets.entry_rows() * vocabulary + targets.ids).cpu().numpy()
        key_E.sort()  # numpy's: several times faster than torch's
        twice = key_E[1:] == key_E[:-1]
        if twice.any():
            row = int(key_E[1:][twice][0]) // vocabulary
            raise ValueError(
                f"`targets.ids` came with an id twice in row {row}, wanted each once: add up the weights of repeated draws"
            )
        if not bool((targets.weights >= 0).all() & (targets.weights < torch.inf).all()):
            raise ValueError(
                "`targets.weights` came with a negative, infinite or NaN weight, wanted estimates of probabilities: "
                "`stillroom verify` checks a cache"
            )
        if DIVERGENCES[problem.divergence].needs_logp and bool(_logp(targets).isnan().any()):
            raise ValueError(
                f"`targets.logp` came with NaN, wanted every entry's log-probability for {problem.divergence!r}: the cache "
                'keeps them for the head only (keep_logp="head"); make it with keep_logp="all", or take forward_kl'
            )
    if problem.split is not None and bool(targets.label_logp[live_N].isnan().any()):
        raise ValueError("`targets.label_logp` came with NaN, wanted the teacher's log-probability of every label: the "
                         "split needs it")  # fmt: skip


def _logp(targets: SparseTargets) -> Tensor:
    assert targets.logp is not None
    return targets.logp


def _check_settings(
    targets: SparseTargets | None,
    alpha: float,
    divergence: str,
    beta: float,
    skew: float,
    temperature: float,
    missing: str,
    reduction: str,
    split: TargetSplit | None,
) -> None:
    if not 0.0 <= alpha <= 1.0 or (targets is None and alpha != 1.0):
        raise ValueError(
            f"`alpha` came as {alpha}{' without targets' if targets is None else ''}, wanted 0 to 1, the share of the "
            "cross-entropy; without targets only alpha=1 has a meaning"
        )
    for name, value, choices in (
        ("divergence", divergence, tuple(DIVERGENCES)),
        ("missing", missing, MISSING_MASS),
        ("reduction", reduction, ("sum", "none")),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` came as {value!r}: choose one of {', '.join(choices)}")
    for name, number in (("beta", beta), ("skew", skew)):
        if not 0.0 < number < 1.0:
            raise ValueError(f"`{name}` came as {number}, wanted a number between 0 and 1, both excluded")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"`temperature` came as {temperature}, wanted a positive number; 1 changes nothing")
    if targets is not None and DIVERGENCES[divergence].needs_logp and targets.logp is None:
        raise ValueError(
            f"`divergence` came as {divergence!r} with targets without `logp`, wanted the teacher's log-probability of every "
            'entry: caches made with keep_logp="all", the default of every sampler, carry it, counts alone do not; take '
            "forward_kl, which needs none"
        )
    if split is not None and (divergence != "forward_kl" or missing == "renormalise_both" or targets is None):
        raise ValueError(
            f"`split` came with divergence={divergence!r}, missing={missing!r}{'' if targets else ' and no targets'}; wanted "
            "forward_kl, targets, and the student over its whole vocabulary: any other `missing`"
        )


def _check_tensors(
    targets: SparseTargets | None,
    labels_N: Tensor,
    row_weights_N: Tensor | None,
    split: TargetSplit | None,
    device: torch.device,
) -> None:
    rows = labels_N.numel()
    if labels_N.dtype != torch.int64 or labels_N.dim() != 1 or labels_N.device != device:
        raise ValueError(
            f"`labels_N` came as {labels_N.dtype}{list(labels_N.shape)} on {labels_N.device}, wanted int64[N] on {device}: "
            "one label for each row of the logits"
        )
    if targets is not None and (targets.rows != rows or targets.ids.device != device):
        raise ValueError(
            f"`targets` came with {targets.rows} rows on {targets.ids.device}, wanted {rows} on {device}: one row for each "
            "row of the logits; `targets.to(device)` moves them"
        )
    constants = [] if row_weights_N is None else [("row_weights_N", row_weights_N)]
    if split is not None:
        constants += [("split.tkd_N", split.tkd_N), ("split.dkd_N", split.dkd_N)]
    for name, given_N in constants:
        wrong = given_N.shape != (rows,) or not given_N.is_floating_point() or given_N.device != device
        if wrong or given_N.requires_grad:
            raise ValueError(
                f"`{name}` came as {given_N.dtype}{list(given_N.shape)} on {given_N.device}"
                f"{', requiring a gradient' if given_N.requires_grad else ''}; wanted floating point [{rows}] on "
                f"{device} without one: they are constants, so detach them"
            )


def _check_ids(name: str, ids: Tensor, vocabulary: int, remedy: str) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"`{name}` run from {int(ids.min())} to {int(ids.max())}, wanted 0 to {vocabulary - 1}, the width of the "
            f"logits{remedy}"
        )
