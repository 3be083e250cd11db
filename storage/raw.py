"""The stored codes of a shard, unpadded: what the encoder made, read back as it was. For verify and interchange.

Shapes: `B` sequences of a block, `P` bit planes, `W` padded width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.decode import decode_entries
from stillroom.storage.encode import EncodedRows
from stillroom.storage.errors import DamagedError
from stillroom.storage.gather import chunks_of, flat, lengths_of, standard
from stillroom.storage.layout import ArraySpec
from stillroom.storage.manifest import Manifest
from stillroom.storage.readers import ShardReader

Array = npt.NDArray[Any]
BLOCK_ROWS: Final = 1 << 15  # rows held at a time


def blocks_of(start: int, stop: int, seq_len: int) -> Iterator[tuple[int, int]]:
    """Cut sequences `start:stop` into runs of about `BLOCK_ROWS` rows."""
    step = max(1, BLOCK_ROWS // seq_len)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def read_block(reader: ShardReader, manifest: Manifest, start: int, stop: int) -> EncodedRows:
    """Codes of sequences `start:stop` of a shard, as the encoder gave them to `shard_objects`.

    Args:
        reader: of the shard.
        manifest: of the cache.
        start, stop: sequences, counted within the shard.

    Raises:
        DamagedError: a chunk does not decode, claims more than its width, or is padded with anything but zeros.
    """
    parts: dict[str, list[Array]] = {}
    lengths: dict[str, list[int]] = {run: [] for run in ("token", "row", "entry", "head", "tail")}
    for sequence in range(start, stop):
        arrays, sizes = _sequence(reader, manifest, sequence)
        for name, array in arrays.items():
            parts.setdefault(name, []).append(array)
        for run, size in sizes.items():
            lengths[run].append(size)
    return EncodedRows(
        {name: np.concatenate(part) for name, part in parts.items()},
        {run: np.array(sizes, np.int64) for run, sizes in lengths.items()},
    )


def _sequence(reader: ShardReader, manifest: Manifest, sequence: int) -> tuple[dict[str, Array], dict[str, int]]:
    place, seq_len = (reader, sequence), manifest.packing.seq_len
    chunks = chunks_of([place], list(reader.arrays))
    sizes = lengths_of(place, {name: parts[0] for name, parts in chunks.items()})
    sizes = {"token": seq_len + 1, "row": seq_len, "head": sizes["entry"]} | sizes
    sizes["tail"] = sizes["entry"] - sizes["head"]
    for name, parts in chunks.items():
        _check_padding(reader.arrays[name], parts[0], sizes, sequence)
    stored = flat([place], chunks, manifest)
    codes = standard(reader, stored, manifest)
    if manifest.profile == "fast" and "weight" not in codes:
        raw = {**codes, "id": codes["id"].copy()}
        weights = decode_entries(manifest.sampler, manifest.vocab_size, raw, logp=False).weights
        if not np.array_equal(weights.view(np.uint32), stored["weight"].view(np.uint32)):
            raise DamagedError(f"sequence {sequence} of weight is not what its codes say")
    return {**codes, "id": codes["id"].view(np.uint32)}, sizes


def _check_padding(array: ArraySpec, chunk: Array, sizes: dict[str, int], sequence: int) -> None:
    many = sizes[array.run]
    rest = np.unpackbits(chunk, axis=1, bitorder="little")[:, many:] if array.planes else chunk[many:]
    if rest.view(np.uint8).any():
        raise DamagedError(f"sequence {sequence} of {array.name} is not padded with zeros")


def decodable(block: EncodedRows) -> dict[str, Array]:
    """The arrays of a block as `decode_rows` takes them."""
    return {**block.arrays, "id": block.arrays["id"].astype(np.int32)}
