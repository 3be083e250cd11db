"""Which arrays a shard holds, with what shapes, and the Zarr v3 metadata that says so. A pure function of the manifest.

Shapes: `S` sequences of a shard, `L` rows of a sequence. A row has n entries: first its head, then its tail.

docs/format.md lists the arrays, says what their elements mean, and decodes them with stock zarr and numpy; this module is
where the writer and both readers take names, types and shapes from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from stillroom.storage.codes import tail_code_max
from stillroom.storage.manifest import DOCUMENTS, Manifest
from stillroom.storage.spec import COUNT_KINDS, SamplerSpec

Run = Literal["token", "row", "entry", "head", "tail", "vocab"]
Codec = Literal["zstd", "crc32c", "pcodec"]
PCODEC: Final = {
    "level": 8,
    "mode_spec": "auto",
    "delta_spec": "auto",
    "paging_spec": "equal_pages_up_to",
    "delta_encoding_order": None,
    "equal_pages_up_to": 262144,
}
ZSTD_LEVEL: Final = 1
TOP_KINDS: Final = ("top_k", "top_p")


@dataclass(frozen=True, slots=True)
class Widths:
    """Padded widths of a shard's ragged runs: entries, head entries and tail entries of its widest sequence."""

    entry: int
    head: int
    tail: int


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a shard.

    Attributes:
        name: of the array.
        dtype: of its elements.
        run: what one element belongs to, hence how many a sequence has.
        planes: 0, or the number of packed bit planes.
        codec: what a chunk is stored with.
        whole: 0, or the elements of an array that has one chunk, for all sequences.
    """

    name: str
    dtype: np.dtype[Any]
    run: Run
    planes: int = 0
    codec: Codec = "zstd"
    whole: int = 0

    def chunks(self, sequences: int) -> int:
        """How many chunks it has in a shard of so many sequences."""
        return 1 if self.whole else sequences

    def chunk_shape(self, seq_len: int, widths: Widths) -> tuple[int, ...]:
        """Shape of one sequence's chunk, without the leading 1."""
        if self.whole:
            return (self.whole,)
        if self.run == "token":
            return (seq_len + 1,)
        if self.run == "row":
            return (seq_len,)
        width: int = getattr(widths, self.run)
        return (self.planes, width // 8) if self.planes else (width,)

    @property
    def object_name(self) -> str:
        """Name of its one shard object, relative to the group."""
        return f"{self.name}/c/0/0/0" if self.planes else f"{self.name}/c/0/0"


def padded(width: int) -> int:
    """`width` rounded up to a multiple of 8, at least 8."""
    return max(8, -(-width // 8) * 8)


def widest(spec: SamplerSpec, seq_len: int) -> int:
    """The most entries a sequence may have: a legal row has at most N, a threshold row N + 1."""
    return padded((spec.draws + 1) * seq_len)


def arrays_of(manifest: Manifest) -> tuple[ArraySpec, ...]:
    """The arrays of every shard of a cache, in the order they are written."""
    codes = code_arrays_of(manifest)
    if manifest.profile == "standard":
        return codes
    rest = [array for array in codes if array.name not in ("id_lo", "id_hi")]
    u32, f32 = np.dtype("<u4"), np.dtype("<f4")
    if manifest.profile == "fast":
        plain = [ArraySpec("id", u32, "entry")]
        if all(array.name != "weight" for array in rest):
            plain.append(ArraySpec("weight", f32, "entry"))
        return tuple(replace(array, codec="crc32c") for array in [*rest, *plain])
    ranked = (ArraySpec("head_rank", u32, "head", codec="pcodec"), ArraySpec("tail_rank", u32, "tail", codec="pcodec"))
    return (*rest, *ranked, ArraySpec("id_of_rank", u32, "vocab", codec="pcodec", whole=manifest.vocab_size))


def code_arrays_of(manifest: Manifest) -> tuple[ArraySpec, ...]:
    """The arrays of profile `standard`: what the encoder makes, whatever a shard then stores."""
    spec = manifest.sampler
    small: npt.DTypeLike = np.uint8 if spec.draws + 1 <= 255 else np.uint16
    tokens: npt.DTypeLike = (
        np.uint16 if max(manifest.vocab_size, manifest.tokenizer.vocab_size) <= 1 << 16 else np.uint32
    )
    high_bits = id_high_bits(manifest.vocab_size)
    plan: list[tuple[str, npt.DTypeLike, Run, bool]] = [
        ("tokens", tokens, "token", True),
        ("starts", np.uint8, "token", manifest.packing.policy == DOCUMENTS),
        ("n", small, "row", True),
        ("id_lo", np.uint16, "entry", True),
        ("id_hi", np.uint8, "entry", high_bits > 0),
        ("label_logp", np.uint16, "row", True),
        ("entropy", np.uint8, "row", True),
        (
            "count",
            np.uint8 if spec.draws <= 255 else np.uint16,
            "head",
            spec.kind in COUNT_KINDS and spec.exponent == 1.0,
        ),
        ("weight", np.float32, "entry", spec.exponent != 1.0),
        ("n_head", small, "row", spec.kind == "threshold"),
        ("logp_head", np.uint8, "head", spec.kind == "threshold"),
        ("logp_tail", np.uint8, "tail", spec.kind == "threshold" and spec.keep_logp == "all"),
        (
            "tail",
            np.uint8 if tail_code_max(spec.draws) == 255 else np.uint16,
            "row",
            spec.kind == "threshold",
        ),
        ("logp", np.uint8, "entry", spec.kind != "threshold" and spec.keep_logp != "none"),
        ("kept", np.float32, "row", spec.kind in TOP_KINDS),
    ]
    return tuple(
        ArraySpec(name, np.dtype(dtype).newbyteorder("<"), run, high_bits if name == "id_hi" else 0)
        for name, dtype, run, used in plan
        if used
    )


def id_high_bits(vocab_size: int) -> int:
    """k: how many bits of an id lie above the low 16."""
    return max(0, (vocab_size - 1).bit_length() - 16)


def array_metadata(array: ArraySpec, sequences: int, chunk_shape: tuple[int, ...]) -> dict[str, Any]:
    """Zarr v3 metadata: one shard object for the whole array, one inner chunk for each sequence, core codecs only."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner: dict[Codec, list[dict[str, Any]]] = {
        "zstd": [little, {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": True}}],
        "crc32c": [little, {"name": "crc32c"}],
        "pcodec": [{"name": "numcodecs.pcodec", "configuration": PCODEC}, {"name": "crc32c"}],
    }
    shape = [array.chunks(sequences), *chunk_shape]
    width = {"token": "token", "row": "row", "vocab": "rank"}.get(array.run, f"{array.run}_slot")
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if array.dtype.kind == "f" else 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *chunk_shape],
                    "codecs": inner[array.codec],
                    "index_codecs": [little, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "dimension_names": ["sequence", "bit", "slot_byte"] if array.planes else ["sequence", width],
        "attributes": {},
    }


def group_metadata(manifest: Manifest, index: int, widths: Widths) -> dict[str, Any]:
    """Zarr v3 group metadata; its attributes make the shard readable on its own."""
    start, stop = manifest.shard_range(index)
    attributes = {
        "format": "stillroom-shard",
        "format_version": manifest.format_version,
        "shard": index,
        "sequences": [start, stop],
        "seq_len": manifest.packing.seq_len,
        "vocab_size": manifest.vocab_size,
        "widths": {"entry": widths.entry, "head": widths.head, "tail": widths.tail},
        "sampler": manifest.sampler.to_json(),
        "teacher": manifest.teacher.fingerprint,
        "tokenizer": manifest.tokenizer.fingerprint,
        "corpus": manifest.corpus.fingerprint,
    }
    if manifest.profile != "standard":
        attributes["profile"] = manifest.profile
    return {"zarr_format": 3, "node_type": "group", "attributes": {"stillroom": attributes}}
