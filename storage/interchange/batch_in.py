"""A record batch from anywhere back to stored codes, every value checked.

Shapes: `B` sequences of a batch, `L` rows of a sequence, `R` = B * L rows, `E` entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.storage.decode import decode_rows
from stillroom.storage.encode import EncodedRows
from stillroom.storage.errors import DamagedError, FormatError
from stillroom.storage.interchange.batch_out import plain_columns, sequence_digests
from stillroom.storage.interchange.plan import CODE, code_arrays, columns
from stillroom.storage.invariants import first_problem, heads, most_entries
from stillroom.storage.manifest import Manifest
from stillroom.storage.raw import decodable

Array = npt.NDArray[Any]


def check_schema(manifest: Manifest, schema: pa.Schema, where: str) -> None:
    """Refuse a file whose columns are not those of an export of this manifest.

    Raises:
        FormatError: a column is missing or of another type.
    """
    for name, kind in columns(manifest).items():
        if schema.names.count(name) != 1:
            raise FormatError(
                f"{where} lacks the column {name!r} ({kind}): it is no export of such a cache; see docs/interchange.md"
            )
        came = schema.field(name).type
        if not (
            came == kind or (pa.types.is_list(came) and pa.types.is_list(kind) and came.value_type == kind.value_type)
        ):
            raise FormatError(f"{where} has the column {name!r} as {came}, wanted {kind}: export it again")


def from_batch(manifest: Manifest, batch: pa.RecordBatch, first: int) -> EncodedRows:
    """Codes of the sequences of a batch; the batch may come from anyone.

    Args:
        manifest: of the cache.
        batch: with the columns of `columns`.
        first: number of the sequence its first row must be.

    Raises:
        DamagedError: anything that an export of this manifest can not hold; the sentence names column and sequences.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DamagedError(f"its Arrow arrays are invalid ({error})") from error
    stop, seq_len = first + batch.num_rows, manifest.packing.seq_len
    values, lengths = _lists(manifest, batch)
    sequence_B = _flat(batch.column("sequence"), "sequence")
    if not np.array_equal(sequence_B, np.arange(first, stop)):
        raise DamagedError(f"sequences {sequence_B.tolist()[:3]} ... came, wanted {first} to {stop - 1}, in order")
    _expect(lengths["tokens"], seq_len + 1, "tokens")
    _expect(lengths["n"], seq_len, "n")
    n_R = values["n"].astype(np.int64)
    if n_R.size and n_R.max() > most_entries(manifest):
        raise DamagedError(f"`n` came up to {n_R.max()}, wanted at most {most_entries(manifest)}")
    entries_B = n_R.reshape(-1, seq_len).sum(1)
    for name in [name for name in values if name in ("ids", "weights", "logp")]:
        _expect(lengths[name], entries_B, name)
    _expect(lengths["label_logp"], seq_len, "label_logp")
    _expect(lengths["entropy"], seq_len, "entropy")
    block = _codes(manifest, values, lengths, n_R, entries_B)
    _check_values(manifest, block, values, first)
    for number, (came, wanted) in enumerate(zip(batch.column("digest").to_pylist(), sequence_digests(manifest, block))):
        if came != wanted:
            raise DamagedError(f"sequence {first + number}: its codes are not those its `digest` was made of")
    return block


def _lists(manifest: Manifest, batch: pa.RecordBatch) -> tuple[dict[str, Array], dict[str, npt.NDArray[np.int64]]]:
    values, lengths = {}, {}
    for name in columns(manifest):
        column = batch.column(name)
        if name not in ("sequence", "digest"):
            if column.null_count:
                raise DamagedError(f"`{name}` holds a null, wanted a list in every row")
            lengths[name] = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
            values[name] = _flat(column.flatten(), name)
    return values, lengths


def _flat(column: pa.Array, name: str) -> Array:
    if column.null_count:
        raise DamagedError(f"`{name}` holds a null, wanted numbers only")
    flat: Array = column.to_numpy(zero_copy_only=True)
    return flat


def _expect(came_B: npt.NDArray[np.int64], wanted_B: Any, name: str) -> None:
    if np.any(came_B != wanted_B):
        raise DamagedError(f"a list of `{name}` holds another number of elements than its sequence has")


def _codes(
    manifest: Manifest,
    values: dict[str, Array],
    lengths: dict[str, npt.NDArray[np.int64]],
    n_R: npt.NDArray[np.int64],
    entries_B: npt.NDArray[np.int64],
) -> EncodedRows:
    seq_len = manifest.packing.seq_len
    arrays = {spec.name: values[CODE + spec.name] for spec in code_arrays(manifest)}
    head_B = entries_B
    if "n_head" in arrays:
        _expect(lengths[CODE + "n_head"], seq_len, CODE + "n_head")
        if np.any(arrays["n_head"] > n_R):
            raise DamagedError("a row has more head entries than entries")
        head_B = arrays["n_head"].astype(np.int64).reshape(-1, seq_len).sum(1)
    elif "count" in arrays:
        head_B = lengths[CODE + "count"]
    sizes = {"row": np.full(len(entries_B), seq_len), "token": np.full(len(entries_B), seq_len + 1)}
    sizes |= {"entry": entries_B, "head": head_B, "tail": entries_B - head_B}
    for spec in code_arrays(manifest):
        _expect(lengths[CODE + spec.name], sizes[spec.run], CODE + spec.name)
    offsets = np.concatenate([[0], np.cumsum(n_R)])
    head_R = heads(manifest, arrays, offsets, values["weights"])
    if np.any(head_R.reshape(-1, seq_len).sum(1) != head_B):
        raise DamagedError("the weights of a sequence are not those of its counts")
    arrays |= {"tokens": values["tokens"], "n": values["n"], "id": _id_codes(values["ids"], offsets, head_R)}
    return EncodedRows(arrays, sizes)


def _id_codes(
    ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], head_R: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint32]:
    """Ids; in the tail, after its first, the step from the id before (as `layout` says)."""
    if ids.size and ids.min() < 0:
        raise DamagedError("`ids` came negative, wanted token ids")
    n_R = np.diff(offsets)
    place_E = np.arange(len(ids)) - np.repeat(offsets[:-1], n_R)
    code_E = ids.astype(np.int64)
    after = np.flatnonzero(place_E > np.repeat(head_R, n_R))
    code_E[after] -= ids[after - 1]
    if after.size and code_E[after].min() <= 0:
        raise DamagedError("`ids` do not ascend in the tail of a row")
    return code_E.astype(np.uint32)


def _check_values(manifest: Manifest, block: EncodedRows, values: dict[str, Array], first: int) -> None:
    """That the codes decode to exactly the plain columns, and to rows a sampler can make."""
    targets = decode_rows(manifest.sampler, manifest.vocab_size, decodable(block), logp=True)
    for name, (decoded, _) in plain_columns(block, targets).items():
        if values[name].tobytes() != np.ascontiguousarray(decoded, values[name].dtype).tobytes():
            raise DamagedError(f"`{name}` is not what the stored codes beside it say: it was edited or damaged")
    if problem := first_problem(manifest, block, targets):
        raise DamagedError(f"sequence {first + problem.sequence}: {problem.what}")
