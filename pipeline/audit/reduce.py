"""Logits and cached targets of some rows to `Facts`, at once: what does not depend on the cache in `Seen`, the rest here.

`Seen` is made once for rows whose logits are there; `cached_facts` is cheap, and may be asked again for other targets of the
same rows (the power study does).

Shapes: `N` rows, `V` vocabulary, `E` entries, `G` buckets, `T` temperatures, `A` alignments, `W` id widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillroom.pipeline.audit.buckets import Buckets
from stillroom.pipeline.audit.draws import alike, drawn, entry_rows, fresh, keys_of, only_likeliest
from stillroom.pipeline.audit.facts import ALIGNMENTS, ID_BITS, TEMPERATURES, Facts
from stillroom.storage.manifest import Manifest
from stillroom.storage.targets import SparseTargets

GROUP_ELEMENTS: Final = 1 << 21  # float64 log-probabilities in work at a time, 16 MiB
Columns = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where rows stand in the run, whole sequences after one another.

    Attributes:
        tokens_BL1: token ids of the sequences.
        sequence_N, row_N: sequence of the whole run, and row in it.
        shard_N, place_N: shard, and sequence counted within it.
        starts_BL1: where documents begin, or None.
    """

    tokens_BL1: npt.NDArray[np.int64]
    sequence_N: npt.NDArray[np.int64]
    row_N: npt.NDArray[np.int64]
    shard_N: npt.NDArray[np.int64]
    place_N: npt.NDArray[np.int64]

    @classmethod
    def of(cls, manifest: Manifest, tokens_BL1: npt.NDArray[np.integer], sequences: list[int]) -> Rows:
        """All rows of `sequences`, numbers of the whole run."""
        length = tokens_BL1.shape[1] - 1
        sequence_N = np.repeat(np.array(sequences, np.int64), length)
        row_N = np.tile(np.arange(length), len(sequences))
        shard_N = sequence_N // manifest.sequences_per_shard
        place_N = sequence_N - shard_N * manifest.sequences_per_shard
        return cls(tokens_BL1.astype(np.int64), sequence_N, row_N, shard_N, place_N)

    @property
    def labels_N(self) -> npt.NDArray[np.int64]:
        """Label of each row."""
        return self.tokens_BL1[:, 1:].ravel()

    def token_N(self, ahead: int) -> npt.NDArray[np.int64]:
        """The token `ahead` places after each row's label; -1 beyond the sequence."""
        padded = np.pad(self.tokens_BL1, ((0, 0), (2, 2)), constant_values=-1)
        length = self.tokens_BL1.shape[1] - 1
        return padded[:, 3 + ahead : 3 + ahead + length].ravel()


@dataclass(frozen=True, slots=True)
class Seen:
    """The teacher's part of some rows.

    Attributes:
        rows: where they stand.
        logits_NV: of the recomputed teacher. control_NV: of the control run, or None. apart_NV: of a reading that does not tell
            documents apart, or None.
        lse_N, control_lse_N, apart_lse_N: their normalisers, float64.
        columns: what is settled without the cache, by the name it has in `Facts`.
        edge_NK, top_NM: log-probabilities at the rank edges, and of the likeliest ids.
        fresh_keys: (row, id) of the tails of each fresh draw.
        seed_keys: of tails drawn with the manifest's seed, under three keys.
        replayed_N: rows of which those were drawn.
    """

    rows: Rows
    logits_NV: Tensor
    control_NV: Tensor | None
    apart_NV: Tensor | None
    lse_N: Tensor
    control_lse_N: Tensor | None
    apart_lse_N: Tensor | None
    columns: Columns
    edge_NK: Tensor
    top_NM: Tensor
    fresh_keys: list[npt.NDArray[np.int64]]
    seed_keys: dict[str, npt.NDArray[np.int64]]
    replayed_N: npt.NDArray[np.bool_]


@torch.inference_mode()
def seen(
    manifest: Manifest,
    rows: Rows,
    logits_NV: Tensor,
    control_NV: Tensor | None,
    apart_NV: Tensor | None,
    *,
    seed: int,
    replay_rows: int,
) -> Seen:
    """Everything about the teacher that findings need.

    Args:
        manifest: of the cache: its sampler draws the fresh draws.
        rows: where the rows stand.
        logits_NV: float32.
        control_NV, apart_NV: see `Seen`.
        seed: of the audit's own draws.
        replay_rows: how many rows, evenly spread, are drawn with the manifest's own seed.
    """
    parts: list[Columns] = []
    edges, tops = [], []
    step = max(1, GROUP_ELEMENTS // logits_NV.shape[1])
    for start in range(0, len(logits_NV), step):
        group = slice(start, start + step)
        columns, edge_NK, top_NM = _teacher_group(
            rows, group, logits_NV[group], None if control_NV is None else control_NV[group]
        )
        parts.append(columns)
        edges.append(edge_NK)
        tops.append(top_NM)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    edge_NK = torch.cat(edges)
    lse_N = _lse(logits_NV)
    sequence_N, row_N = torch.from_numpy(rows.sequence_N), torch.from_numpy(rows.row_N)
    labels_N = torch.from_numpy(rows.labels_N)
    new = fresh(manifest, logits_NV, labels_N, sequence_N, row_N, seed)
    columns |= _drawn_columns(manifest, new, logits_NV, lse_N, edge_NK, torch.cat(tops), columns)
    replayed_N = np.zeros(len(rows.row_N), np.bool_)
    own: dict[str, npt.NDArray[np.int64]] = {}
    if new:
        replayed_N[
            np.unique(np.linspace(0, len(replayed_N) - 1, min(replay_rows, len(replayed_N))).astype(np.int64))
        ] = True
        own = seeded(manifest, rows, logits_NV, lse_N, replayed_N)
    return Seen(
        rows=rows,
        logits_NV=logits_NV,
        control_NV=control_NV,
        apart_NV=apart_NV,
        lse_N=lse_N,
        control_lse_N=None if control_NV is None else _lse(control_NV),
        apart_lse_N=None if apart_NV is None else _lse(apart_NV),
        columns=columns,
        edge_NK=edge_NK,
        top_NM=torch.cat(tops),
        fresh_keys=[_tail_keys(manifest, each, logits_NV, lse_N) for each in new],
        seed_keys=own,
        replayed_N=replayed_N,
    )


def seeded(
    manifest: Manifest, rows: Rows, logits_NV: Tensor, lse_N: Tensor, replayed_N: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[np.int64]]:
    """Tails drawn with the manifest's seed, keyed by the sequence, its place in the shard, and 0: (row, id) of all rows."""
    chosen = torch.from_numpy(np.flatnonzero(replayed_N))
    some_NV, labels_N = logits_NV[chosen.to(logits_NV.device)], torch.from_numpy(rows.labels_N)[chosen]
    place_N = torch.from_numpy(np.flatnonzero(replayed_N)).numpy()
    result = {}
    for name, key_N in (("own", rows.sequence_N), ("shard", rows.place_N), ("zero", np.zeros_like(rows.sequence_N))):
        keyed = torch.from_numpy(key_N)[chosen]
        targets = drawn(manifest.sampler, some_NV, labels_N, keyed, torch.from_numpy(rows.row_N)[chosen])
        keys = _tail_keys(manifest, targets, some_NV, lse_N[chosen.to(lse_N.device)])
        result[name] = (place_N[keys >> 24] << 24) | (keys & 0xFFFFFF)
    return result


def _teacher_group(
    rows: Rows, group: slice, logits_GV: Tensor, control_GV: Tensor | None
) -> tuple[Columns, Tensor, Tensor]:
    logp_GV = logits_GV.double().log_softmax(-1)
    p_GV = logp_GV.exp()
    buckets = Buckets.of(logp_GV)
    mass_GG = buckets.masses(p_GV)
    labels_G = torch.from_numpy(rows.labels_N[group]).to(logits_GV.device)
    columns: dict[str, Tensor] = {
        "label_R": logp_GV.gather(1, labels_G[:, None])[:, 0],
        "entropy_R": _entropy(logp_GV, p_GV),
        "square_R": (p_GV**2).sum(1),
        "confidence_R": p_GV.gather(1, buckets.order_NM[:, :1])[:, 0],
        "hit_R": buckets.order_NM[:, 0] == labels_G,
        "mass_RG": mass_GG,
        "normaliser_RT": torch.stack([(logp_GV / t).logsumexp(1) for t in TEMPERATURES], 1),
    }
    shifts = []
    for ahead in ALIGNMENTS:
        token_G = torch.from_numpy(rows.token_N(ahead)[group]).to(logits_GV.device)
        shifts.append(logp_GV.gather(1, token_G.clamp_min(0)[:, None])[:, 0].where(token_G >= 0, torch.nan))
    columns["label_shift_RA"] = torch.stack(shifts, 1)
    if control_GV is None:
        nan_G = torch.full_like(columns["label_R"], torch.nan)
        columns |= {"control_label_R": nan_G, "control_entropy_R": nan_G, "control_RG": torch.zeros_like(mass_GG)}
    else:
        control_logp_GV = control_GV.double().log_softmax(-1)
        control_p_GV = control_logp_GV.exp()
        columns["control_label_R"] = control_logp_GV.gather(1, labels_G[:, None])[:, 0]
        columns["control_entropy_R"] = _entropy(control_logp_GV, control_p_GV)
        columns["control_RG"] = buckets.masses(control_p_GV) - mass_GG
    top_GM = logp_GV.gather(1, buckets.order_NM)
    return {name: column.cpu().numpy() for name, column in columns.items()}, buckets.edge_NK, top_GM


def _drawn_columns(
    manifest: Manifest,
    new: list[SparseTargets],
    logits_NV: Tensor,
    lse_N: Tensor,
    edge_NK: Tensor,
    top_NM: Tensor,
    columns: Columns,
) -> Columns:
    """Moments of the fresh draws."""
    mass_NG, square_N = columns["mass_RG"].astype(np.float64), columns["square_R"].astype(np.float64)
    variance_NG, largest_NG = np.zeros_like(mass_NG), np.zeros_like(mass_NG)
    error_N, fisher_N, top_N = np.zeros(len(square_N)), np.zeros(len(square_N)), np.zeros(len(square_N), np.int64)
    for targets in new:
        row_E, id_E, logp_E = _entries(targets, logits_NV, lse_N)
        bucket_E3 = _bucket_of(logp_E, row_E, id_E, edge_NK, manifest.vocab_size)
        weight_E = targets.weights.astype(np.float64)
        difference_NG = _into(bucket_E3, row_E, weight_E, mass_NG.shape) - mass_NG
        variance_NG += difference_NG**2 / len(new)
        largest_NG = np.maximum(largest_NG, np.abs(difference_NG))
        squared, fisher = errors(row_E.numpy(), weight_E, logp_E.cpu().numpy(), square_N)
        error_N += squared / len(new)
        fisher_N += fisher / len(new)
        top_N += only_likeliest(targets, logp_E, top_NM)
    return {
        "drawn_variance_RG": variance_NG,
        "drawn_largest_RG": largest_NG,
        "drawn_square_R": error_N if new else np.full(len(square_N), np.nan),
        "drawn_fisher_R": fisher_N if new else np.full(len(square_N), np.nan),
        "drawn_top_R": top_N,
    }


@torch.inference_mode()
def cached_facts(manifest: Manifest, part: Seen, targets: SparseTargets) -> Facts:
    """The facts of the rows of `part` that have a target.

    Args:
        manifest: of the cache.
        part: the teacher's side.
        targets: of the same rows, in the same order.
    """
    rows, lse_N = part.rows, part.lse_N
    row_E, id_E, logp_E = _entries(targets, part.logits_NV, lse_N)
    count, entries = len(rows.row_N), len(id_E)
    weight_E = targets.weights.astype(np.float64)
    nan_E = np.full(entries, np.nan)
    logp = logp_E.cpu().numpy()
    tail_E = logp < -np.log(manifest.sampler.draws)
    keys = keys_of(targets, np.ones(count, np.bool_), tail_E)
    top_E = _largest_weight(targets, weight_E)
    guess_N, guess_hit_N = np.zeros(count), np.zeros(count, np.bool_)
    guess_N[row_E.numpy()[top_E]] = weight_E[top_E]
    guess_hit_N[row_E.numpy()[top_E]] = targets.ids[top_E] == rows.labels_N[row_E.numpy()[top_E]]
    seeds = {name: alike(keys_of_rows(keys, part.replayed_N), own, count) for name, own in part.seed_keys.items()}
    no_N = np.zeros(count, np.bool_)
    result = Facts(
        **part.columns,  # type: ignore[arg-type]
        sequence_R=rows.sequence_N,
        shard_R=rows.shard_N,
        row_R=rows.row_N,
        stored_label_R=targets.label_logp.astype(np.float64),
        stored_entropy_R=targets.entropy.astype(np.float64),
        drawn_common_R=np.sum(
            [no_N, *(alike(keys, fresh, count) for fresh in part.fresh_keys)], axis=0, dtype=np.int64
        ),
        same_own_R=seeds.get("own", no_N),
        same_shard_R=seeds.get("shard", no_N),
        same_zero_R=seeds.get("zero", no_N),
        replayed_R=part.replayed_N,
        top_R=only_likeliest(targets, logp_E, part.top_NM),
        tail_R=np.bincount(row_E.numpy()[tail_E], minlength=count),
        kept_R=_over_rows(row_E.numpy(), np.exp(logp), count),
        guess_R=guess_N,
        guess_hit_R=guess_hit_N,
        row_E=row_E.numpy(),
        id_E=targets.ids.astype(np.int64),
        weight_E=weight_E,
        stored_E=nan_E if targets.logp is None else targets.logp.astype(np.float64),
        logp_E=logp,
        control_E=_at(part.control_NV, part.control_lse_N, row_E, id_E, nan_E),
        bucket_E3=_bucket_of(logp_E, row_E, id_E, part.edge_NK, manifest.vocab_size).cpu().numpy(),
        shift_EA=_shifted(part, row_E, id_E),
        wrapped_EW=_wrapped(part, row_E, id_E),
        apart_E=_at(part.apart_NV, part.apart_lse_N, row_E, id_E, nan_E),
    )
    return result.only(np.diff(targets.offsets) > 0)


def errors(
    row_E: npt.NDArray[np.int64],
    weight_E: npt.NDArray[np.float64],
    logp_E: npt.NDArray[np.float64],
    square_N: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Squared distance sum (e - p)**2 and Fisher-weighted sum (e - p)**2 / p of each row's target from the teacher, `[N]`."""
    p_E, rows = np.exp(logp_E), len(square_N)
    squared_N = square_N + _over_rows(row_E, weight_E**2 - 2 * weight_E * p_E, rows)
    fisher_N = 1 + _over_rows(row_E, weight_E**2 / np.maximum(p_E, 1e-12) - 2 * weight_E, rows)
    return squared_N, fisher_N


def _over_rows(row_E: npt.NDArray[np.int64], value_E: npt.NDArray[np.float64], rows: int) -> npt.NDArray[np.float64]:
    return np.asarray(np.bincount(row_E, value_E, rows), np.float64)


def keys_of_rows(keys: npt.NDArray[np.int64], rows_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Those of some rows."""
    kept: npt.NDArray[np.int64] = keys[rows_N[keys >> 24]]
    return kept


def _largest_weight(targets: SparseTargets, weight_E: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Place of the largest weight of each row that has one (the first, where several are)."""
    order = np.lexsort((-weight_E, entry_rows(targets)))
    result: npt.NDArray[np.int64] = order[targets.offsets[:-1][np.diff(targets.offsets) > 0]]
    return result


def _entries(targets: SparseTargets, logits_NV: Tensor, lse_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row_E, id_E = torch.from_numpy(entry_rows(targets)), torch.from_numpy(targets.ids.astype(np.int64))
    return row_E, id_E, _gather(logits_NV, lse_N, row_E, id_E)


def _gather(logits_NV: Tensor, lse_N: Tensor, row_E: Tensor, id_E: Tensor) -> Tensor:
    row_E, id_E = row_E.to(logits_NV.device), id_E.to(logits_NV.device)
    return logits_NV[row_E, id_E].double() - lse_N[row_E]


def _at(
    logits_NV: Tensor | None, lse_N: Tensor | None, row_E: Tensor, id_E: Tensor, missing_E: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    if logits_NV is None or lse_N is None:
        return missing_E
    result: npt.NDArray[np.float64] = _gather(logits_NV, lse_N, row_E, id_E).cpu().numpy()
    return result


def _shifted(part: Seen, row_E: Tensor, id_E: Tensor) -> npt.NDArray[np.float64]:
    length = part.rows.tokens_BL1.shape[1] - 1
    columns = []
    for ahead in ALIGNMENTS:
        place_E = torch.from_numpy(part.rows.row_N)[row_E] + ahead
        inside_E = (place_E >= 0) & (place_E < length)
        logp_E = _gather(part.logits_NV, part.lse_N, (row_E + ahead).where(inside_E, row_E), id_E).cpu()
        columns.append(logp_E.where(inside_E, torch.nan))
    result: npt.NDArray[np.float64] = torch.stack(columns, 1).numpy()
    return result


def _wrapped(part: Seen, row_E: Tensor, id_E: Tensor) -> npt.NDArray[np.float64]:
    """Log of the mass of all ids with the same low bits; NaN where the vocabulary fits them, or an id does not."""
    vocabulary, columns = part.logits_NV.shape[1], []
    for bits in ID_BITS:
        if vocabulary <= 1 << bits:
            columns.append(torch.full((len(id_E),), torch.nan, dtype=torch.float64))
            continue
        total_E = torch.full((len(id_E),), -torch.inf, dtype=torch.float64)
        for high in range(0, vocabulary, 1 << bits):
            other_E = id_E + high
            logp_E = _gather(part.logits_NV, part.lse_N, row_E, other_E.clamp_max(vocabulary - 1)).cpu()
            total_E = torch.logaddexp(total_E, logp_E.where(other_E < vocabulary, -torch.inf))
        columns.append(total_E.where(id_E < 1 << bits, -torch.inf))
    result: npt.NDArray[np.float64] = torch.stack(columns, 1).numpy()
    return result


def _bucket_of(logp_E: Tensor, row_E: Tensor, id_E: Tensor, edge_NK: Tensor, vocab_size: int) -> Tensor:
    return Buckets.places(logp_E, edge_NK[row_E.to(edge_NK.device)], id_E.to(logp_E.device), vocab_size)


def _into(
    bucket_E3: Tensor, row_E: Tensor, weight_E: npt.NDArray[np.float64], shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    total = np.zeros(shape[0] * shape[1])
    for place_E in bucket_E3.cpu().numpy().T:
        total += np.bincount(row_E.numpy() * shape[1] + place_E, weight_E, len(total))
    return total.reshape(shape[0], shape[1])


def _tail_keys(manifest: Manifest, targets: SparseTargets, logits_NV: Tensor, lse_N: Tensor) -> npt.NDArray[np.int64]:
    _, _, logp_E = _entries(targets, logits_NV, lse_N)
    tail_E = logp_E.cpu().numpy() < -np.log(manifest.sampler.draws)
    return keys_of(targets, np.ones(targets.rows, np.bool_), tail_E)


def _lse(logits_NV: Tensor) -> Tensor:
    step = max(1, GROUP_ELEMENTS // logits_NV.shape[1])
    return torch.cat(
        [logits_NV[start : start + step].double().logsumexp(1) for start in range(0, len(logits_NV), step)]
    )


def _entropy(logp_NV: Tensor, p_NV: Tensor) -> Tensor:
    return -(p_NV * logp_NV.where(p_NV > 0, 0.0)).sum(1)
