"""The bytes of a shard: Zarr v3 objects written by hand, so that the same targets always give the same bytes.

Shapes: `S` sequences of the shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from stillroom.storage import strict
from stillroom.storage.chunks import encoder
from stillroom.storage.encode import EncodedRows
from stillroom.storage.layout import (
    ArraySpec,
    Widths,
    array_metadata,
    arrays_of,
    group_metadata,
    padded,
)
from stillroom.storage.manifest import Manifest
from stillroom.storage.pack import pack_planes
from stillroom.storage.profiles import ids_by_use, to_profile

INDEX_ENTRY_BYTES: Final = 16  # offset and length, both u64
INDEX_CRC_BYTES: Final = 4


def widths_of(blocks: list[EncodedRows]) -> Widths:
    """Padded widths that hold every sequence of the shard."""
    return Widths(
        *(
            padded(max((int(block.lengths[run].max()) for block in blocks), default=0))
            for run in ("entry", "head", "tail")
        )
    )


def shard_objects(
    manifest: Manifest, index: int, blocks: list[EncodedRows], widths: Widths
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every object of shard `index`, relative to its group."""
    seq_len = manifest.packing.seq_len
    sequences = sum(len(block.lengths["row"]) for block in blocks)
    ranks_V = ids_by_use(manifest, blocks) if manifest.profile == "small" else None
    stored = [to_profile(manifest, block, ranks_V) for block in blocks]
    yield "zarr.json", strict.dumps(group_metadata(manifest, index, widths)).encode()
    for array in arrays_of(manifest):
        chunk_shape = array.chunk_shape(seq_len, widths)
        yield f"{array.name}/zarr.json", strict.dumps(array_metadata(array, sequences, chunk_shape)).encode()
        if array.whole and ranks_V is not None:
            yield array.object_name, _array_object(array, [ranks_V])
        else:
            chunks = (chunk for block in stored for chunk in _chunks(array, block, chunk_shape))
            yield array.object_name, _array_object(array, chunks)


def _array_object(array: ArraySpec, elements: Iterable[npt.NDArray[Any]]) -> bytes:
    encode = encoder(array.codec)
    chunks = [encode(chunk) for chunk in elements]
    index_S2 = np.zeros((len(chunks), 2), "<u8")
    index_S2[:, 1] = [len(chunk) for chunk in chunks]
    index_S2[1:, 0] = np.cumsum(index_S2[:-1, 1])
    index = index_S2.tobytes()
    return b"".join([*chunks, index, google_crc32c.value(index).to_bytes(INDEX_CRC_BYTES, "little")])


def _chunks(array: ArraySpec, block: EncodedRows, chunk_shape: tuple[int, ...]) -> Iterator[npt.NDArray[Any]]:
    flat = block.arrays["id" if array.name in ("id_lo", "id_hi") else array.name]
    ends = np.cumsum(block.lengths[array.run])
    for start, end in zip(ends - block.lengths[array.run], ends, strict=True):
        chunk = np.zeros(chunk_shape, array.dtype)
        if array.planes:
            _put_planes(flat[start:end], chunk)
        else:
            chunk[: end - start] = flat[start:end]  # of an id code its low 16 bits, for id_lo
        yield chunk


def _put_planes(code_E: npt.NDArray[np.uint32], chunk: npt.NDArray[np.uint8]) -> None:
    if not pack_planes(code_E, chunk):
        bits = (code_E >> np.arange(16, 16 + len(chunk), dtype=np.uint32)[:, None]) & np.uint32(1)
        packed = np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")
        chunk[:, : packed.shape[1]] = packed
