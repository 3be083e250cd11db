"""What a comparison shows, in sentences made from its figures: arms at equal entries, gaps that seeds do not resolve."""

from __future__ import annotations

import statistics

from stillroom.comparing.result import GAPS, Comparison


def findings(result: Comparison) -> list[str]:
    """What the figures show, in sentences: arms at equal entries, gaps that seeds do not resolve."""
    found = [_equal_entries(result, name, arm.entries_like) for name, arm in result.arms.items() if arm.entries_like]
    for key, words in GAPS.items():
        if not result.resolved(key) and result.gap is not None and (measured := result.gap_and_spread(key)):
            found.append(
                f"{result.gap[0]} and {result.gap[1]} end {measured[0]:.4f} nats of {words} apart, seeds of one of them up to "
                f"{measured[1]:.4f}: that gap is not resolved at this size, so shares of it are left out."
            )
    return found


def _equal_entries(result: Comparison, name: str, other: str) -> str:
    """Whether an arm does at least as well as the one whose entries it keeps, by seed, in held-out KL."""
    mine, its = result.arms[name], result.arms[other]
    pairs = list(zip(mine.values("kl"), its.values("kl")))
    better = [a <= b for a, b in pairs]
    seeds = "the one seed" if len(pairs) == 1 else "both seeds" if len(pairs) == 2 else f"all {len(pairs)} seeds"
    verdict = (
        f"at least as close to the teacher in {seeds}" if all(better)
        else f"less close to the teacher in {seeds}" if not any(better)
        else f"at least as close to the teacher in {sum(better)} of {len(pairs)} seeds"
    )  # fmt: skip
    told = ", ".join(f"{a:.4f} against {b:.4f}" for a, b in pairs)
    if closed := [_shares(result, arm) for arm in (name, other) if _shares(result, arm)]:
        told += "; share of the KL gap closed: " + " against ".join(closed)
    entries = " and ".join("?" if arm.entries_per_row is None else f"{arm.entries_per_row:.2f}" for arm in (mine, its))
    text = f"At equal entries per row ({entries}) {name} is {verdict} than {other} (KL {told})."
    if len(pairs) > 1:
        apart = abs(statistics.mean(a - b for a, b in pairs))
        spread = max(max(arm.values("kl")) - min(arm.values("kl")) for arm in (mine, its))
        relation = "more" if apart > spread else "less"
        text += (
            f" Their mean distance, {apart:.4f}, is {relation} than the seeds of one arm are apart ({spread:.4f})"
            + (
                "."
                if apart > spread
                else ": the sign by seed is what this size can tell, not how large the difference is."
            )
        )
    return text


def _shares(result: Comparison, name: str) -> str:
    return ", ".join(f"{share:.1%}" for share in result.cells(name, "kl_gap"))
