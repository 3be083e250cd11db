"""The stored codes of a shard, unpadded: what the encoder made, read back as it was. For verify and interchange.

Shapes: `B` sequences of a block, `P` bit planes, `W` padded width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.encode import EncodedRows
from stillroom.storage.errors import DamagedError
from stillroom.storage.gather import gather
from stillroom.storage.layout import id_high_bits
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
    if manifest.profile != "standard":
        return _of_profile(reader, manifest, sequence)
    arrays: dict[str, Array] = {"n": reader.chunk("n", sequence)}
    seq_len = manifest.packing.seq_len
    entries = int(arrays["n"].sum(dtype=np.int64))
    sizes = {"token": seq_len + 1, "row": seq_len, "entry": entries, "head": entries}
    if "n_head" in reader.arrays:
        arrays["n_head"] = reader.chunk("n_head", sequence)
        sizes["head"] = int(arrays["n_head"].sum(dtype=np.int64))
    elif "count" in reader.arrays:
        arrays["count"] = reader.chunk("count", sequence)
        sizes["head"] = int(np.count_nonzero(arrays["count"]))
    sizes["tail"] = entries - sizes["head"]
    for run in ("entry", "head", "tail"):
        if not 0 <= sizes[run] <= getattr(reader.record.widths, run):
            raise DamagedError(f"sequence {sequence} claims {sizes[run]} {run} elements, more than it has")
    for name, spec in reader.arrays.items():
        if name in ("id_lo", "id_hi"):
            continue
        chunk = arrays[name] if name in arrays else reader.chunk(name, sequence)
        if chunk[sizes[spec.run] :].any():
            raise DamagedError(f"sequence {sequence} of {name} is not padded with zeros")
        arrays[name] = chunk[: sizes[spec.run]]
    arrays["id"] = _id_codes(reader, manifest, sequence, entries)
    return arrays, sizes


def _of_profile(reader: ShardReader, manifest: Manifest, sequence: int) -> tuple[dict[str, Array], dict[str, int]]:
    codes = gather([(reader, sequence)], list(reader.arrays), manifest)
    heads = next((codes[name] for name in ("count", "logp_head") if name in codes), codes["id"])
    sizes = {"token": manifest.packing.seq_len + 1, "row": manifest.packing.seq_len, "entry": len(codes["id"])}
    sizes |= {"head": len(heads), "tail": len(codes["id"]) - len(heads)}
    return {**codes, "id": codes["id"].view(np.uint32)}, sizes


def _id_codes(reader: ShardReader, manifest: Manifest, sequence: int, entries: int) -> npt.NDArray[np.uint32]:
    code_W = reader.chunk("id_lo", sequence).astype(np.uint32)
    planes = id_high_bits(manifest.vocab_size)
    if planes:
        bits_PW = np.unpackbits(reader.chunk("id_hi", sequence), axis=1, bitorder="little")
        for plane in range(planes):
            code_W |= bits_PW[plane].astype(np.uint32) << np.uint32(16 + plane)
    if code_W[entries:].any():
        raise DamagedError(f"sequence {sequence} of id_lo or id_hi is not padded with zeros")
    return code_W[:entries]


def decodable(block: EncodedRows) -> dict[str, Array]:
    """The arrays of a block as `decode_rows` takes them."""
    return {**block.arrays, "id": block.arrays["id"].astype(np.int32)}
