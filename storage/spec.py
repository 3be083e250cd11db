"""`SamplerSpec`: how targets were drawn and what of them is stored, enough to turn codes back into weights for ever."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

from stillroom.storage.errors import InputError

SamplerKind = Literal["threshold", "random", "systematic", "stratified", "top_k", "top_p"]
KeepLogp = Literal["all", "head", "none"]
COUNT_KINDS: Final = ("random", "systematic", "stratified")
MAX_DRAWS: Final = 4096


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """One sampler and its record.

    Attributes:
        kind: `threshold` (exact head p >= 1/draws, systematic tail), `random` (draws with replacement), `systematic`
            (evenly spaced draws, one random offset), `stratified` (one draw in each Nth of the mass), `top_k` or `top_p`.
        draws: N, the knob of every sampler: number of draws, threshold 1/N; for `top_k` the k, for `top_p` the cap on
            the number of entries.
        seed: 64-bit key of the counter-based generator.
        exponent: proposal q ~ p**exponent of `random`; 1.0 for every other kind.
        top_p: probability mass `top_p` keeps; 1.0 for every other kind.
        keep_logp: which entries keep the teacher's log-probability: `all`, `head` (p >= 1/draws) or `none`. For
            `threshold` the head's log-probability is its weight, so `none` is refused; `top_k` and `top_p` need `all`.
    """

    kind: SamplerKind = "threshold"
    draws: int = 50
    seed: int = 0
    exponent: float = 1.0
    top_p: float = 1.0
    keep_logp: KeepLogp = "all"

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplerKind):
            raise InputError(f"sampler {self.kind!r} is unknown: choose one of {', '.join(get_args(SamplerKind))}")
        if not 1 <= self.draws <= MAX_DRAWS:
            raise InputError(f"draws came as {self.draws}, wanted 1 to {MAX_DRAWS}: change `draws`")
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed came as {self.seed}, wanted 0 to 2**64 - 1: change `seed`")
        if not 0.25 <= self.exponent <= 4.0 or (self.exponent != 1.0 and self.kind != "random"):
            raise InputError(
                f"exponent came as {self.exponent} with sampler {self.kind}: only `random` takes one, from 0.25 to 4"
            )
        if not 0.0 < self.top_p <= 1.0 or (self.top_p != 1.0 and self.kind != "top_p"):
            raise InputError(f"top_p came as {self.top_p} with sampler {self.kind}: only `top_p` takes one, in (0, 1]")
        allowed = {"threshold": ("all", "head"), "top_k": ("all",), "top_p": ("all",)}.get(
            self.kind, get_args(KeepLogp)
        )
        if self.keep_logp not in allowed:
            raise InputError(
                f"keep_logp came as {self.keep_logp!r} with sampler {self.kind}: choose one of {', '.join(allowed)}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object; `from_json` gives an equal spec back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SamplerSpec:
        """Inverse of `to_json`.

        Raises:
            InputError: an unknown or missing key, or a value out of range.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise InputError(f"sampler description {data} does not fit: {error}") from error
