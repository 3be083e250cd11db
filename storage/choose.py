"""From a cache's own figures to a `Selection`: subsets, domain weights, difference sampling, curricula.

A *column* (`columns`) is one number a sequence: `label_logp` and `entropy` (means over its rows), `difference` (how much
likelier the teacher finds the text than a reference model does, nats a row), or a file of the user's. docs/selection.md has
the formulas with their sources.

Shapes: `S` sequences, `D` domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache
from stillroom.storage.columns import Figures, FloatS
from stillroom.storage.errors import InputError
from stillroom.storage.selection import Selection

_DOMAINS_SHOWN: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be read; every part may be left out, and they combine.

    Attributes:
        select_by: column whose quantile range `select_from` to `select_to` of the sequences is read; the rest is not.
        sequence_weights: file of weights, visits an epoch.
        domains: file with the domain of each sequence, to be weighted by the gap between student and teacher.
        student_losses: file of the student's losses (`losses`), for `domains`.
        domain_smoothing: share of the visits that the gap decides; the rest is even over the domains.
        reference_losses: file of the reference model's losses, for the column `difference`.
        curriculum: column by which sequences come in, easy ones first.
        curriculum_start: share of the sequences that take part at the beginning.
    """

    select_by: str | None = None
    select_from: float = 0.0
    select_to: float = 1.0
    sequence_weights: Path | None = None
    domains: Path | None = None
    student_losses: Path | None = None
    domain_smoothing: float = 0.5
    reference_losses: Path | None = None
    curriculum: str | None = None
    curriculum_start: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.select_from < self.select_to <= 1.0:
            raise InputError(
                f"select_from {self.select_from} and select_to {self.select_to} hold no sequence, wanted 0 <= from < to <= 1"
            )
        if self.select_by is None and (self.select_from, self.select_to) != (0.0, 1.0):
            raise InputError("select_from and select_to are quantiles of a column: name it with select_by")
        if (self.domains is None) != (self.student_losses is None):
            raise InputError(
                "domains are weighted by the student's losses: give domains and student_losses, or neither"
            )
        if (self.reference_losses is not None) != ("difference" in (self.select_by, self.curriculum)):
            raise InputError(
                "reference_losses are what the column difference is made from: give both, or neither (select_by or curriculum "
                "difference)"
            )

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return any((self.select_by, self.sequence_weights, self.domains, self.curriculum))


class Choice(NamedTuple):
    """A selection, and what it means in words."""

    selection: Selection
    notes: tuple[str, ...]


def choose(
    source: Cache | Sequence[Cache] | int, wanted: Wanted, *, sequences: int | None = None, ramp: int = 0
) -> Choice:
    """The selection that is wanted of a cache's sequences.

    Args:
        source: an open cache, several that follow one another, or how many sequences a source without one has, whose columns
            are all files.
        wanted: what.
        sequences: choose from the first so many only; files hold a value for each sequence of the source all the same.
        ramp: positions over which a curriculum grows.

    Raises:
        InputError: a column or file that is unknown or does not fit, or nothing is left.
        DamagedError, CacheError: as `row_statistics`.
    """
    figures = Figures([source] if isinstance(source, Cache) else source, sequences, wanted.reference_losses)
    sequences = figures.sequences
    weight_S = np.ones(sequences)
    notes: list[str] = []
    if wanted.sequence_weights is not None:
        weight_S = figures.file(wanted.sequence_weights)
        if not np.all(np.isfinite(weight_S) & (weight_S >= 0)):
            place = int(np.flatnonzero(~(np.isfinite(weight_S) & (weight_S >= 0)))[0])
            raise InputError(
                f"sequence_weights {wanted.sequence_weights} has {weight_S[place]} for sequence {place}, wanted numbers from 0 up"
            )
    if wanted.select_by is not None:
        weight_S = weight_S * _in_range(_known(figures, wanted.select_by), wanted.select_from, wanted.select_to)
    if not weight_S.any():
        raise InputError(f"nothing is selected: none of the {sequences} sequences has a weight; widen the selection")
    if wanted.domains is not None:
        weight_S, note = _by_domain(figures, wanted, weight_S)
        notes.append(note)
    difficulty_S = None
    if wanted.curriculum is not None:
        difficulty_S = _known(figures, wanted.curriculum)
        difficulty_S = -difficulty_S if wanted.curriculum == "label_logp" else difficulty_S
        notes.append(
            f"curriculum by {wanted.curriculum}: the easiest {wanted.curriculum_start:.0%} first, then more, then all"
        )
    selection = Selection(weight_S, difficulty_S, 1.0 if difficulty_S is None else wanted.curriculum_start, ramp)
    return Choice(selection, (_summary(figures, selection), *notes))


def _known(figures: Figures, name: str) -> FloatS:
    """A column of which some sequence has a value."""
    value_S = figures.column(name)
    if np.isnan(value_S).all():
        raise InputError(
            f"no sequence of the cache has any {name} (an import knows as much as its files do): select by something else"
        )
    return value_S


def domain_factors(
    student_loss_D: FloatS, teacher_loss_D: FloatS, *, smoothing: float = 0.5, previous_D: FloatS | None = None
) -> FloatS:
    """DDK's share of each domain (Liu et al. 2024, arXiv 2407.16154, equation 2), `[D]`, sum 1.

        r' = smoothing * psi / sum(psi) + (1 - smoothing) / D        psi = r * exp(ppl_student / ppl_teacher)

    Args:
        student_loss_D: mean cross-entropy of the student on each domain, nats.
        teacher_loss_D: of the teacher.
        smoothing: the paper's alpha, 0.5 there.
        previous_D: r of the interval before; None: even, so that psi is that of the paper's equation 1.
    """
    ratio_D = np.exp(student_loss_D) / np.exp(teacher_loss_D)
    psi_D = np.exp(ratio_D - ratio_D.max())  # a factor that all share drops out
    psi_D = psi_D if previous_D is None else psi_D * previous_D
    return np.asarray(smoothing * psi_D / psi_D.sum() + (1 - smoothing) / len(psi_D))


def _in_range(value_S: FloatS, low: float, high: float) -> npt.NDArray[np.bool_]:
    """The sequences whose rank is in the range; those without a value are not. Ranges that meet share no sequence."""
    valid = np.flatnonzero(~np.isnan(value_S))
    ranked = valid[np.argsort(value_S[valid], kind="stable")]
    chosen_S = np.zeros(len(value_S), np.bool_)
    chosen_S[ranked[round(low * len(ranked)) : round(high * len(ranked))]] = True
    return chosen_S


def _by_domain(figures: Figures, wanted: Wanted, weight_S: FloatS) -> tuple[FloatS, str]:
    """Weights with the same sum, of which each domain has its factor."""
    assert wanted.domains is not None
    assert wanted.student_losses is not None
    found, domain_S = np.unique(figures.words(wanted.domains), return_inverse=True)
    names = [str(name) for name in found]
    many, known = len(names), figures.rows("domains")
    loss_S = figures.losses(wanted.student_losses)
    row_S = np.where(np.isnan(loss_S), 0, known.rows_S[: figures.sequences]).astype(np.float64)
    rows_D = np.bincount(domain_S, row_S, many)
    there_D = np.bincount(domain_S, weight_S, many)
    if np.any((rows_D == 0) & (there_D > 0)):
        name = names[int(np.flatnonzero((rows_D == 0) & (there_D > 0))[0])]
        raise InputError(
            f"no sequence of domain {name!r} is measured in {wanted.student_losses}: run `stillroom losses` again with a larger "
            "--sample"
        )
    use = np.flatnonzero(there_D)
    teacher_S = -known.label_logp_S[: figures.sequences]
    student_D, teacher_D = (
        (np.bincount(domain_S, np.where(row_S > 0, row_S * x_S, 0.0), many)[use] / rows_D[use])
        for x_S in (loss_S, teacher_S)
    )
    factor_D = np.zeros(many)
    factor_D[use] = domain_factors(student_D, teacher_D, smoothing=wanted.domain_smoothing)
    scale_D = factor_D * weight_S.sum() / np.where(there_D > 0, there_D, 1.0)
    said = [
        f"{names[d]} {there_D[d] / there_D.sum():.1%} -> {factor_D[d]:.1%}" for d in use[np.argsort(-factor_D[use])]
    ]
    more = ", ..." if len(said) > _DOMAINS_SHOWN else ""
    return weight_S * scale_D[domain_S], f"share of the {len(said)} domains: {', '.join(said[:_DOMAINS_SHOWN])}{more}"


def _summary(figures: Figures, selection: Selection) -> str:
    read_S = selection.weight_S > 0
    said = f"{np.count_nonzero(read_S):,} of {figures.sequences:,} sequences are read"
    if figures.known is not None:
        rows_S = figures.known.rows_S[: figures.sequences]
        said += f" ({rows_S[read_S].sum() / max(1, rows_S.sum()):.1%} of the rows with a target)"
    most = float(selection.weight_S.max())
    return f"{said}, {selection.size:,} in an epoch" + (f", at most {most:.2f} times each" if most > 1 else "")
