"""A block of stored codes to an Arrow record batch: the rows of an export.

Shapes: `B` sequences of a batch, `E` entries.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.storage.decode import decode_rows
from stillroom.storage.encode import EncodedRows
from stillroom.storage.errors import DamagedError
from stillroom.storage.interchange.plan import CODE, code_arrays
from stillroom.storage.invariants import first_problem
from stillroom.storage.layout import Run, code_arrays_of
from stillroom.storage.manifest import Manifest
from stillroom.storage.raw import decodable
from stillroom.storage.targets import SparseTargets

Array = npt.NDArray[Any]


def to_batch(manifest: Manifest, first: int, block: EncodedRows, schema: pa.Schema) -> pa.RecordBatch:
    """Rows of an export from the codes of a block.

    Args:
        manifest: of the cache.
        first: number of the block's first sequence.
        block: its codes.
        schema: of the file.

    Raises:
        DamagedError: the codes contradict each other, or make a row that no sampler makes.
    """
    targets = decode_rows(manifest.sampler, manifest.vocab_size, decodable(block), logp=True)
    if problem := first_problem(manifest, block, targets):
        raise DamagedError(f"sequence {first + problem.sequence}: {problem.what}")
    plain = plain_columns(block, targets)
    numbers = pa.array(np.arange(first, first + len(block.lengths["row"])), pa.int64())
    arrays: list[pa.Array] = [numbers, pa.array(sequence_digests(manifest, block), pa.string())]
    codes = {CODE + spec.name: (block.arrays[spec.name], spec.run) for spec in code_arrays(manifest)}
    for name in schema.names[2:]:
        values, run = (plain | codes)[name]
        offsets = np.concatenate([[0], np.cumsum(block.lengths[run])]).astype(np.int32)
        element = schema.field(name).type.value_type
        native = np.ascontiguousarray(values, element.to_pandas_dtype())
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(native, element)))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def sequence_digests(manifest: Manifest, block: EncodedRows) -> list[str]:
    """SHA-256 of the codes of every sequence: lengths and little-endian elements of every array, in order of name.

    No codec enters into it, so that it holds for any version of the libraries, and no column can change unnoticed.
    """
    runs: dict[str, tuple[Array, Run]] = {
        spec.name: (block.arrays[spec.name].astype(spec.dtype, copy=False), spec.run)
        for spec in code_arrays_of(manifest)
        if not spec.name.startswith("id_")
    }
    runs["id"] = (block.arrays["id"].astype("<u4", copy=False), "entry")
    hashes = [hashlib.sha256() for _ in block.lengths["row"]]
    for name in sorted(runs):
        values, run = runs[name]
        values = np.ascontiguousarray(values)
        start = 0
        for number, length in enumerate(block.lengths[run].tolist()):
            hashes[number].update(f"{name} {length}\n".encode())
            hashes[number].update(values[start : start + length].data)
            start += length
    return [value.hexdigest() for value in hashes]


def plain_columns(block: EncodedRows, targets: SparseTargets) -> dict[str, tuple[Array, str]]:
    """Values of the columns that need nothing of ours to read, each with the run its elements belong to."""
    plain: dict[str, tuple[Array, str]] = {
        "tokens": (block.arrays["tokens"], "token"),
        "n": (block.arrays["n"], "row"),
        "ids": (targets.ids, "entry"),
        "weights": (targets.weights, "entry"),
        "label_logp": (targets.label_logp, "row"),
        "entropy": (targets.entropy, "row"),
    }
    if targets.logp is not None:
        plain["logp"] = (targets.logp, "entry")
    return plain
