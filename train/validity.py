"""Which loss may use which targets: the table of docs/losses.md in code. No torch.

Every divergence here is an expectation under the teacher, so a sample of it whose p is known gives value and gradient without
bias; what is not such an expectation, or lacks what it needs, is said to be so.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

from stillroom.storage.errors import InputError
from stillroom.storage.spec import SamplerSpec
from stillroom.train.config import LossName, MissingMass

Kind = Literal[
    "top", "counts", "counts with log p", "threshold", "threshold, head only", "several teachers", "reduced vocabulary"
]
Verdict = Literal["exact", "unbiased", "heavy-tailed", "small bias", "bounded bias", "badly biased", "undefined"]

PARTIAL_KINDS: Final = ("top_k", "top_p")  # their targets do not sum to one
BY_LABEL: Final[tuple[LossName, ...]] = ("dkd", "atkd")  # split at the label: forward KL at T = 1
NOT_TEMPERED: Final[tuple[LossName, ...]] = (*BY_LABEL, "taid", "akl", "tail_aware", "ce")

_NEEDS_P: Final[Mapping[Kind, Verdict]] = {
    "top": "bounded bias", "counts": "undefined", "counts with log p": "unbiased", "threshold": "unbiased",
    "threshold, head only": "undefined", "several teachers": "undefined", "reduced vocabulary": "undefined",
}  # fmt: skip
_LINEAR: Final[Mapping[Kind, Verdict]] = {
    "top": "bounded bias", "counts": "unbiased", "counts with log p": "unbiased", "threshold": "unbiased",
    "threshold, head only": "unbiased", "several teachers": "unbiased", "reduced vocabulary": "small bias",
}  # fmt: skip
_NORMALISED: Final[Mapping[Kind, Verdict]] = {
    **_NEEDS_P, "counts with log p": "small bias", "threshold": "small bias"
}  # fmt: skip
TABLE: Final[Mapping[LossName, Mapping[Kind, Verdict]]] = MappingProxyType({
    "forward_kl": _LINEAR,
    "reverse_kl": {**_NEEDS_P, "counts with log p": "heavy-tailed", "threshold": "heavy-tailed"},
    "jsd": _NEEDS_P,
    "skew_kl": _NEEDS_P,
    "skew_reverse_kl": _NEEDS_P,
    "tvd": _NEEDS_P,
    "dkd": {**_LINEAR, "reduced vocabulary": "undefined"},
    "atkd": {**_LINEAR, "several teachers": "undefined", "reduced vocabulary": "undefined"},
    "taid": _NORMALISED,
    "akl": _NORMALISED,
    "tail_aware": {**_LINEAR, "top": "undefined", "counts": "undefined", "counts with log p": "undefined",
                   "several teachers": "undefined", "reduced vocabulary": "undefined"},
})  # fmt: skip


def kind_of(spec: SamplerSpec) -> Kind:
    """The kind of targets a sampler keeps, as far as losses care."""
    if spec.kind in PARTIAL_KINDS:
        return "top"
    if spec.kind == "threshold":
        return "threshold" if spec.keep_logp == "all" else "threshold, head only"
    return "counts with log p" if spec.keep_logp == "all" else "counts"


def verdict(
    loss: LossName, kind: Kind | None, *, missing: MissingMass | None = None, tempered: bool = False
) -> Verdict:
    """What a loss is worth on targets of a kind.

    Args:
        loss: which.
        kind: of the targets; None for a live teacher.
        missing: convention for the mass that `top` lacks.
        tempered: whether the temperature is other than 1 somewhere in the run.
    """
    if kind is None or loss == "ce":
        return "exact"
    found = TABLE[loss][kind]
    if tempered and loss == "forward_kl":
        found = _NORMALISED[kind]
    elif tempered and found == "unbiased":
        found = "small bias"
    if kind == "top" and found == "bounded bias" and (missing != "tail_bucket" or tempered):
        return "badly biased"
    return found


def settle(
    loss: LossName, kind: Kind | None, *, missing: MissingMass | None, tempered: bool, allow_biased: bool
) -> tuple[MissingMass, tuple[str, ...]]:
    """The convention for missing mass, and what the user should be told.

    Args:
        loss: which.
        kind: of the targets it reads; None where it reads none from a cache (a live teacher, `ce`).
        missing: as the user gave it.
        tempered: whether the temperature is other than 1 somewhere in the run.
        allow_biased: whether the user insists.

    Raises:
        InputError: targets that cannot carry the loss, or badly, naming the remedy.
    """
    if tempered and loss in NOT_TEMPERED:
        raise InputError(f"loss {loss} has no temperature: drop --temperature, or choose --loss forward_kl")
    if kind != "top":
        if missing is not None:
            what = f"loss {loss} reads no cached targets" if kind is None else "the targets of this cache sum to one"
            raise InputError(f"missing came as {missing}, but {what}: drop --missing")
    elif missing is None:
        raise InputError(
            "a top_k or top_p cache keeps less than the teacher's whole mass, and what becomes of the rest changes the "
            "student: name it with --missing truncate, renormalise_teacher, renormalise_both or tail_bucket"
        )
    if loss in BY_LABEL and missing == "renormalise_both":
        raise InputError(
            f"loss {loss} needs the student's whole vocabulary: choose another --missing than renormalise_both"
        )
    found = verdict(loss, kind, missing=missing, tempered=tempered)
    what = f"loss {loss}" + (" at a temperature other than 1" if tempered else "")
    if found == "undefined":
        raise InputError(_undefined(what, loss, kind))
    if found == "badly biased":
        words = f"{what} is badly biased on a top_k or top_p cache with missing mass {missing}"
        if not allow_biased:
            remedy = "" if tempered else ", or name --missing tail_bucket, whose bias is bounded"
            raise InputError(
                f"{words}: make the cache with --sampler threshold{remedy}; --allow-biased trains all the same"
            )
        return missing or "truncate", (words,)
    notes = {
        "heavy-tailed": f"{what} is unbiased on a sampled cache but heavy-tailed while student and teacher are far apart: "
        "skew_reverse_kl is the safe stand-in",
        "small bias": f"{what} has a bias of O(1/N) on a sampled cache of N draws",
    }
    return missing or "truncate", (notes[found],) if found in notes else ()


def _undefined(what: str, loss: LossName, kind: Kind | None) -> str:
    if kind == "several teachers":
        return f"{what} needs more of a mixture than samples of several teachers tell: choose --loss forward_kl, or one cache"
    if kind == "reduced vocabulary":
        return f"{what} is not defined on what a smaller vocabulary keeps of a teacher: choose --loss forward_kl"
    if loss == "tail_aware":
        return f"{what} needs an exact head and a sampled tail ({kind} came): make the cache with --sampler threshold"
    return (
        f"{what} needs the teacher's log-probability of every entry, and this cache does not keep it ({kind}): make it with "
        "--keep-logp all, or choose --loss forward_kl"
    )
