"""What is true of every row a sampler can make: checked after decoding, by verify and by import.

Shapes: `B` sequences of a block, `L` rows of a sequence, `R` = B * L rows, `E` entries, `H` head entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stillroom.storage.codes import ENTROPY_STEP, PIVOT, UNIT
from stillroom.storage.encode import EncodedRows
from stillroom.storage.layout import TOP_KINDS, Run
from stillroom.storage.manifest import CONCAT, DOCUMENTS, Manifest
from stillroom.storage.spec import COUNT_KINDS
from stillroom.storage.targets import SparseTargets


class Problem(NamedTuple):
    """A row that can not be: its sequence, counted within the block, and what is wrong with it."""

    sequence: int
    what: str


class _Check(NamedTuple):
    """One rule: which elements of a run break it."""

    run: Run
    what: str
    broken: npt.NDArray[np.bool_]


def most_entries(manifest: Manifest) -> int:
    """The most entries of a row: N, and for a threshold sample N + 1."""
    return manifest.sampler.draws + (manifest.sampler.kind == "threshold")


def first_problem(manifest: Manifest, block: EncodedRows, targets: SparseTargets) -> Problem | None:
    """The first rule that a block breaks, with the first sequence that does, or None.

    Args:
        manifest: of the cache.
        block: its stored codes.
        targets: what they decode to.
    """
    for checks in (_rows(manifest, block, targets), _codes(manifest, block), _entries(manifest, block, targets)):
        for run, what, broken in checks:
            if broken.any():
                ends = np.cumsum(block.lengths[run])
                return Problem(int(np.searchsorted(ends, int(np.argmax(broken)), side="right")), what)
    return None


def _rows(manifest: Manifest, block: EncodedRows, targets: SparseTargets) -> Iterator[_Check]:
    n_R = np.diff(targets.offsets)
    most, highest = most_entries(manifest), math.log(manifest.vocab_size)
    known = max(manifest.vocab_size, manifest.tokenizer.vocab_size)
    yield _Check("token", f"a token id is not below the vocabulary size {known}", block.arrays["tokens"] >= known)
    yield _Check("row", f"a row has more than {most} entries", n_R > most)
    yield _Check("row", "the log-probability of a label is above 0", targets.label_logp > 0)
    impossible_R = (targets.entropy < 0) | (targets.entropy > highest + ENTROPY_STEP / 2 + 1e-6)
    yield _Check("row", f"an entropy is outside 0 to ln V = {highest:.3f}", impossible_R)
    if "starts" in block.arrays:
        starts_BL1 = block.arrays["starts"].reshape(-1, manifest.packing.seq_len + 1)
        yield _Check("token", "a start of a document is neither 0 nor 1", block.arrays["starts"] > 1)
        across_R = (starts_BL1[:, 1:] > 0).ravel() & (n_R > 0)
        yield _Check("row", "a row has entries though its label begins another document", across_R)
    if manifest.packing.policy in (CONCAT, DOCUMENTS):  # every row has a label there
        lacking_R = (np.isnan(targets.label_logp) | np.isnan(targets.entropy)) & (n_R > 0)
        yield _Check("row", "a row with entries lacks its label's log-probability or its entropy", lacking_R)


def _codes(manifest: Manifest, block: EncodedRows) -> Iterator[_Check]:
    arrays = block.arrays
    if "count" in arrays:
        yield _Check("head", "a head count is below 2", arrays["count"] < 2)
    if "logp_head" in arrays:
        yield _Check("head", "a head log-p code lies below 1/N", arrays["logp_head"] < PIVOT)
    if "logp_tail" in arrays:
        yield _Check("tail", "a tail log-p code lies above 1/N", arrays["logp_tail"] >= PIVOT)
    if "logp" in arrays and manifest.sampler.keep_logp == "head":
        below = (arrays["logp"] > 0) & (arrays["logp"] < PIVOT)
        yield _Check("entry", "a log-p code below 1/N is kept", below)


def _entries(manifest: Manifest, block: EncodedRows, targets: SparseTargets) -> Iterator[_Check]:
    ids, spec = targets.ids, manifest.sampler
    n_R = np.diff(targets.offsets)
    row_E = np.repeat(np.arange(targets.rows), n_R)
    key_E = (row_E << 24) | ids
    sorted_E = np.sort(key_E)
    twice = sorted_E[1:][sorted_E[1:] == sorted_E[:-1]]
    twice_E = np.isin(key_E, twice) if twice.size else np.zeros(len(ids), np.bool_)
    yield _Check("entry", "an id comes twice in a row", twice_E)
    possible_E = (targets.weights >= 0) & np.isfinite(targets.weights)
    yield _Check("entry", "a weight is negative or not finite", ~possible_E)
    yield from _order(manifest, block, targets, row_E)
    weight_E = targets.weights.astype(np.float64)
    if spec.kind == "threshold":
        units_R = np.bincount(row_E, weight_E * UNIT, targets.rows)
        yield _Check("row", "the weights of a row do not sum to 1", (n_R > 0) & (units_R != UNIT))
    elif spec.kind in COUNT_KINDS and spec.exponent == 1.0:
        draws_R = np.bincount(row_E, np.rint(weight_E * spec.draws), targets.rows)
        yield _Check("row", f"the counts of a row do not sum to {spec.draws}", (n_R > 0) & (draws_R != spec.draws))


def _order(
    manifest: Manifest, block: EncodedRows, targets: SparseTargets, row_E: npt.NDArray[np.int64]
) -> Iterator[_Check]:
    """Head by code descending, then id; tail by id. (Importance weights come as the sampler gave them.)"""
    place_E = np.arange(targets.entries) - targets.offsets[row_E]
    in_head_E = place_E < head_lengths(manifest, block, targets)[row_E]
    after_E = np.zeros(targets.entries, np.bool_)  # the entry before is of the same row and run
    after_E[1:] = (row_E[1:] == row_E[:-1]) & (in_head_E[1:] == in_head_E[:-1])
    step_E = np.diff(targets.ids, prepend=targets.ids[:1])
    yield _Check("entry", "the tail of a row does not ascend", after_E & ~in_head_E & (step_E <= 0))
    code_H = next((block.arrays[name] for name in ("count", "logp_head") if name in block.arrays), None)
    if manifest.sampler.kind in TOP_KINDS:
        code_H = block.arrays["logp"]
    if code_H is not None:
        code_E = np.zeros(targets.entries, np.int64)
        code_E[in_head_E] = code_H
        rise_E = np.diff(code_E, prepend=code_E[:1])
        wrong_E = (rise_E > 0) | ((rise_E == 0) & (step_E <= 0))
        # The first of a row of log-p codes is the most probable, whatever its code was rounded to.
        free = 0 if "count" in block.arrays else 1
        yield _Check("entry", "the head of a row is out of order", after_E & in_head_E & wrong_E & (place_E > free))


def head_lengths(manifest: Manifest, block: EncodedRows, targets: SparseTargets) -> npt.NDArray[np.int64]:
    """`[R]` int64: how many of a row's entries are its head."""
    return heads(manifest, block.arrays, targets.offsets, targets.weights)


def heads(
    manifest: Manifest,
    arrays: dict[str, npt.NDArray[Any]],
    offsets: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
) -> npt.NDArray[np.int64]:
    """`head_lengths` from the parts it needs."""
    n_R = np.diff(offsets)
    if "n_head" in arrays:
        return arrays["n_head"].astype(np.int64)
    if "count" in arrays:
        row_E = np.repeat(np.arange(len(n_R)), n_R)
        return np.bincount(row_E[weights > 1.5 / manifest.sampler.draws], minlength=len(n_R))
    return n_R
