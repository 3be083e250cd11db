"""The stored arrays of several sequences, brought together for the decoder: padding gone, ids joined.

Zstandard frames of all arrays and sequences are put end to end and unfolded by one call: the codec's set-up costs as much
as a small frame.

Shapes: `B` sequences, `E` entries of all of them, `P` bit planes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.storage.commits import damaged
from stillroom.storage.layout import arrays_of, id_high_bits
from stillroom.storage.manifest import Manifest
from stillroom.storage.profiles import check_ranks, from_profile
from stillroom.storage.readers import DirectReader, ShardReader

Array = npt.NDArray[Any]
Place = tuple[ShardReader, int]  # and which of its sequences
Column = Literal["tokens", "logp", "label_logp", "entropy"]
COLUMNS: Final[tuple[Column, ...]] = ("tokens", "logp", "label_logp", "entropy")
_LOGP_ARRAYS: Final = ("logp", "logp_tail")


def needed(manifest: Manifest, columns: Collection[str]) -> list[str]:
    """Names of the arrays that ids, weights and `columns` are decoded from."""
    plan = {array.name: array for array in arrays_of(manifest)}
    if manifest.profile == "fast" and "logp" not in columns:
        return [name for name in ("n", "id", "weight", *columns) if name in plan]
    skip = {name for name in ("tokens", "label_logp", "entropy") if name not in columns} | {"starts"}
    if "logp" not in columns:
        skip |= {"logp_tail"} | ({"logp"} if "kept" not in plan else set())
    return [name for name in plan if name not in skip]


def gather(places: list[Place], names: list[str], manifest: Manifest) -> dict[str, Array]:
    """Flat standard codes of the sequences at `places`, one after the other, as `decode_rows` takes them.

    Args:
        places: reader and sequence within its shard; all of one cache.
        names: of the arrays wanted, ids and `n` among them.
        manifest: of the cache.

    Raises:
        DamagedError: bytes are not what they were, or a sequence claims more than it has.
    """
    if manifest.profile == "small" and len({id(reader) for reader, _ in places}) > 1:  # each shard has its own ranks
        parts = [gather([place], names, manifest) for place in places]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return standard(places[0][0], flat(places, chunks_of(places, names), manifest), manifest)


def standard(reader: ShardReader, stored: dict[str, Array], manifest: Manifest) -> dict[str, Array]:
    """What the profile stores of sequences of one shard back to standard codes.

    Raises:
        DamagedError: the arrays contradict each other.
    """
    small = manifest.profile == "small"
    return from_profile(manifest, stored, reader.once("id_of_rank", check_ranks) if small else None)


def flat(places: list[Place], chunks: dict[str, list[Array]], manifest: Manifest) -> dict[str, Array]:
    """The chunks of sequences end to end, padding gone: what the profile stores, but for ids, which are joined.

    Raises:
        DamagedError: a sequence claims more than it has.
    """
    lengths = [lengths_of(place, {name: chunks[name][i] for name in chunks}) for i, place in enumerate(places)]
    runs = {array.name: array.run for array in places[0][0].arrays.values()}
    raw: dict[str, Array] = {}
    for name, parts in chunks.items():
        if name in ("id_lo", "id_hi"):
            continue
        run = runs[name]
        parts = [part[: length[run]] if run in length else part for part, length in zip(parts, lengths)]
        raw[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if "id_lo" in chunks:
        planes = id_high_bits(manifest.vocab_size)
        entries = [length["entry"] for length in lengths]
        raw["id"] = _join_ids(chunks["id_lo"], chunks.get("id_hi", []), entries, planes)
    return raw


def starts_of(reader: ShardReader, sequence: int) -> npt.NDArray[np.bool_]:
    """Which tokens of a sequence begin a document, `[L+1]`.

    Raises:
        DamagedError: bytes are not what they were, or neither yes nor no.
    """
    flags = reader.chunk("starts", sequence)
    if flags.max() > 1:
        raise damaged(reader.record.shard, f"sequence {sequence} of starts is neither 0 nor 1")
    return flags.view(np.bool_)


def lengths_of(place: Place, chunks: dict[str, Array]) -> dict[str, int]:
    """Elements of every ragged run of one sequence, whose chunks these are.

    Raises:
        DamagedError: it claims more than it has.
    """
    reader, sequence = place
    lengths = {"entry": int(chunks["n"].sum(dtype=np.int64))}
    if "n_head" in chunks:
        lengths["head"] = int(chunks["n_head"].sum(dtype=np.int64))
    elif "count" in chunks:
        lengths["head"] = int(np.count_nonzero(chunks["count"]))
    elif "head_rank" in chunks:
        lengths["head"] = lengths["entry"]
    if "n_head" in chunks or "tail_rank" in chunks:
        lengths["tail"] = lengths["entry"] - lengths["head"]
    for run, length in lengths.items():
        if not 0 <= length <= getattr(reader.record.widths, run):
            raise damaged(reader.record.shard, f"sequence {sequence} claims {length} {run} elements, more than it has")
    return lengths


def _join_ids(low: list[Array], high: list[Array], entries: list[int], planes: int) -> npt.NDArray[np.int32]:
    code_E = np.empty(sum(entries), "<i4")
    third_E = code_E.view(np.uint8)[2::4]  # the third byte of every little-endian int32
    start = 0
    for i, count in enumerate(entries):
        code_E[start : start + count] = low[i][:count]
        if planes:
            bits_PE = np.unpackbits(high[i], axis=1, count=count, bitorder="little")
            for plane in range(1, planes):
                bits_PE[0] |= bits_PE[plane] << plane
            third_E[start : start + count] = bits_PE[0]
        start += count
    return code_E


def chunks_of(places: list[Place], names: list[str]) -> dict[str, list[Array]]:
    """Padded chunks by array, in the order of `places`.

    Raises:
        DamagedError: bytes are not what they were.
    """
    names = [name for name in names if name != "id_of_rank"]
    readers = [reader for reader, _ in places]
    direct = [reader for reader in readers if isinstance(reader, DirectReader)]
    if len(direct) < len(readers) or readers[0].arrays[names[0]].codec != "zstd":
        return {name: [reader.chunk(name, sequence) for reader, sequence in places] for name in names}
    whole = readers[0].arrays
    others = {name: [r.chunk(name, i) for r, i in places] for name in names if whole[name].codec != "zstd"}
    names = [name for name in names if name not in others]
    frames = [
        reader.frame(name, sequence) for name in names for reader, (_, sequence) in zip(direct, places, strict=True)
    ]
    size = sum(frame.nbytes for frame in frames)
    try:
        data = pa.Codec("zstd").decompress(b"".join([frame.data for frame in frames]), size)
    except (OSError, pa.ArrowException):  # one by one names the one that is damaged
        return {name: [reader.chunk(name, sequence) for reader, sequence in places] for name in [*names, *others]}
    chunks: dict[str, list[Array]] = {name: [] for name in names}
    start = 0
    for index, frame in enumerate(frames):
        elements = np.frombuffer(data, frame.dtype, frame.elements, start)
        chunks[names[index // len(places)]].append(elements if len(frame.shape) == 1 else elements.reshape(frame.shape))
        start += frame.nbytes
    return chunks | others
