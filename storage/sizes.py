"""What a cache weighs, sequence by sequence: the sample from which the size of a larger one is reckoned.

Shapes: `S` sequences, `R` rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache
from stillroom.storage.commits import record_name
from stillroom.storage.encode import encode_rows
from stillroom.storage.frames import INDEX_ENTRY_BYTES, read_index
from stillroom.storage.layout import arrays_of
from stillroom.storage.manifest import Manifest
from stillroom.storage.shard import shard_objects, widths_of
from stillroom.storage.targets import SparseTargets


@dataclass(frozen=True, slots=True)
class Weight:
    """Bytes of a cache on a local disk.

    Attributes:
        by_array: per array, `[S]` int64: bytes of each sequence's chunk and of its place in the shard's index.
        per_shard: mean bytes of a shard that no sequence has: metadata, checksums, the commit record.
    """

    by_array: dict[str, npt.NDArray[np.int64]]
    per_shard: float

    @property
    def sequences(self) -> npt.NDArray[np.int64]:
        """All bytes of each sequence, `[S]`."""
        total: npt.NDArray[np.int64] = np.sum(list(self.by_array.values()), axis=0, dtype=np.int64)
        return total


def weigh(cache: Cache) -> Weight:
    """Weigh every sequence of a cache in a local directory; of the files only indices are read.

    Raises:
        ValueError: an index does not fit its file.
    """
    sizes: dict[str, list[npt.NDArray[Any]]] = {}
    total = 0
    for shard in cache.shards:
        record = cache.record(shard)
        total += sum(item.size_bytes for item in record.objects) + (cache.path / record_name(shard)).stat().st_size
        for array in arrays_of(cache.manifest):
            if not array.whole:
                index_S2 = read_index(cache.path / record.path / array.object_name, record.stop - record.start)
                sizes.setdefault(array.name, []).append(index_S2[:, 1].astype(np.int64) + INDEX_ENTRY_BYTES)
    by_array = {name: np.concatenate(parts) for name, parts in sizes.items()}
    of_sequences = sum(int(size_S.sum()) for size_S in by_array.values())
    return Weight(by_array, (total - of_sequences) / max(1, len(cache.shards)))


def bytes_of_rows(
    manifest: Manifest, tokens_SL1: npt.NDArray[np.uint32], targets: SparseTargets, rounding_R3: npt.NDArray[np.float64]
) -> int:
    """Bytes of the objects of a shard of these rows, encoded and compressed in memory as the writer does it.

    Args:
        manifest: of a cache whose first shard they are.
        tokens_SL1: token ids.
        targets: S * L rows.
        rounding_R3: as for the writer.

    Raises:
        ValueError: targets that the sampler of the manifest does not make.
    """
    block = encode_rows(manifest, tokens_SL1, targets, rounding_R3)
    return sum(len(data) for _, data in shard_objects(manifest, 0, [block], widths_of([block])))
