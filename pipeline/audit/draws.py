"""Fresh draws from the recomputed teacher, coded as a cache codes them: what a sound cache of these rows could have been.

They carry what no formula does: the covariance of systematic draws, the rounding of stored codes. And draws made with the
manifest's own seed tell whose random numbers a cache holds.

Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillroom.kernels.sample import STREAM_ROUNDING, sample, uniforms
from stillroom.pipeline.host import to_host
from stillroom.storage.decode import decode_rows
from stillroom.storage.encode import encode_rows
from stillroom.storage.layout import TOP_KINDS
from stillroom.storage.manifest import Manifest, PackingInfo
from stillroom.storage.raw import decodable
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets

DRAWS: Final = 4  # fresh draws of each row
_APART: Final = 0x5EED_0F_A0D1  # keeps the audit's random numbers apart from any cache's


def drawn(spec: SamplerSpec, logits_NV: Tensor, labels_N: Tensor, sequence_N: Tensor, row_N: Tensor) -> SparseTargets:
    """What the sampler gives these rows, exact (not yet coded), on the host."""
    device = logits_NV.device
    return to_host(
        sample(
            logits_NV,
            labels_N.to(device),
            kind=spec.kind,
            draws=spec.draws,
            seed=spec.seed,
            sequence_N=sequence_N.to(device),
            row_N=row_N.to(device),
            exponent=spec.exponent,
            top_p=spec.top_p,
        )
    )


def coded(manifest: Manifest, targets: SparseTargets, rounding_N3: npt.NDArray[np.float64]) -> SparseTargets:
    """Targets as they come back from a cache."""
    one = replace(
        manifest, packing=PackingInfo(seq_len=targets.rows), sequences=1, sequences_per_shard=1, profile="standard"
    )
    tokens_1L1 = np.zeros((1, targets.rows + 1), np.uint32)
    block = encode_rows(one, tokens_1L1, targets, rounding_N3)
    return decode_rows(manifest.sampler, manifest.vocab_size, decodable(block), logp=True)


def fresh(
    manifest: Manifest, logits_NV: Tensor, labels_N: Tensor, sequence_N: Tensor, row_N: Tensor, seed: int
) -> list[SparseTargets]:
    """`DRAWS` independent coded draws of each row; none of a sampler that does not draw."""
    if manifest.sampler.kind in TOP_KINDS:
        return []
    result = []
    for number in range(DRAWS):
        key = (_APART + 0x9E3779B97F4A7C15 * (DRAWS * seed + number + 1)) % (1 << 64)
        targets = drawn(replace(manifest.sampler, seed=key), logits_NV, labels_N, sequence_N, row_N)
        rounding_N3 = uniforms(key, sequence_N.cpu(), row_N.cpu(), stream=STREAM_ROUNDING, count=3).numpy()
        result.append(coded(manifest, targets, rounding_N3))
    return result


def entry_rows(targets: SparseTargets) -> npt.NDArray[np.int64]:
    """Row of every entry."""
    return np.repeat(np.arange(targets.rows), np.diff(targets.offsets))


def keys_of(
    targets: SparseTargets, rows_N: npt.NDArray[np.bool_], tail_E: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Row and id of tail entries as one ascending integer each."""
    row_E = entry_rows(targets)
    wanted_E = rows_N[row_E] & tail_E
    return np.sort((row_E[wanted_E] << 24) | targets.ids[wanted_E])


def alike(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.bool_]:
    """Rows whose two sets of ids share at least half of their union, and hold something: `[N]`.

    Half, because another machine's last bits move a draw here and there.
    """
    common = np.bincount(np.intersect1d(one, other, assume_unique=True) >> 24, minlength=rows)
    union = np.bincount(one >> 24, minlength=rows) + np.bincount(other >> 24, minlength=rows) - common
    result: npt.NDArray[np.bool_] = (2 * common >= union) & (union > 0)
    return result


def only_likeliest(targets: SparseTargets, logp_E: Tensor, reach_NM: Tensor) -> npt.NDArray[np.bool_]:
    """Rows that keep just their most likely ids and nothing else, `[N]`; rows of more entries than `reach_NM` has ranks: False.

    Args:
        targets: the rows.
        logp_E: teacher's log-probability of each entry.
        reach_NM: log-probabilities of the likeliest ids, descending.
    """
    n_N = np.diff(targets.offsets)
    inside_N = (n_N > 0) & (n_N <= reach_NM.shape[1])
    last_N = reach_NM.gather(
        1, torch.from_numpy(np.clip(n_N - 1, 0, reach_NM.shape[1] - 1))[:, None].to(reach_NM.device)
    )
    of_row_E = torch.from_numpy(entry_rows(targets)).to(logp_E.device)
    below_E = (logp_E < last_N[of_row_E, 0] - 1e-9).cpu().numpy()
    result: npt.NDArray[np.bool_] = inside_N & (np.bincount(entry_rows(targets), below_E, targets.rows) == 0)
    return result
